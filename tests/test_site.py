"""The documentation site, built as ``mkdocs build --strict`` builds it, which executes the notebooks."""

import json
import os
import posixpath
import re
import subprocess
import sys
import zlib
from importlib.util import find_spec
from pathlib import Path

import pytest

import sparse_moon as sm

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), *NOTEBOOKS]
LINK = re.compile(r"\]\(([^()\s#:]+)[#)]")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Folder of the site, which has to come without a warning: links, anchors, and names of the reference are right."""
    for package in ("material", "mkdocstrings", "nbconvert", "ipykernel"):
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    return folder


def test_the_reference_has_every_public_name(site):
    header, _, names = (site / "objects.inv").read_bytes().partition(b"zlib.\n")
    assert header.startswith(b"# Sphinx inventory version 2")
    found = {line.split()[0] for line in zlib.decompress(names).decode().splitlines()}
    assert {f"sparse_moon.{name}" for name in sm.__all__} <= found
    assert {f"sparse_moon.ood.{name}" for name in sm.ood.__all__} <= found


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_executed(notebook, site):
    page = (site / "notebooks" / notebook.stem / "index.html").read_text(encoding="utf-8")
    assert f'href="../{notebook.name}"' in page and (site / "notebooks" / notebook.name).is_file()
    private = re.findall(rf"{re.escape(str(Path.home()))}/|{re.escape(str(ROOT))}|site-packages| at 0x|Warning", page)
    assert not private, "results that differ from machine to machine, or a warning"


def test_readers_load_nothing_from_other_servers(site):
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert not re.findall(r"<(?:script|img|link rel=\"stylesheet\")[^>]*(?:src|href)=\"(?:https?:)?//[^\"]*", text)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_kept_without_results(notebook):
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    assert [cell["id"] for cell in cells] == [f"cell-{number + 1}" for number in range(len(cells))]
    for cell in cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_work_in_the_repository(page):
    for target in LINK.findall(
        re.sub(r"^```.*?^```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    ):
        place = posixpath.normpath(posixpath.join(page.parent.relative_to(ROOT).as_posix(), target))
        assert (ROOT / place).is_file(), f"{page.name}: {target}"
