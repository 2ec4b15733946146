"""What the site has beside the pages of docs/, made when it is built.

- Files of the repository that pages link to. Links are written so that they work on the repository's host, and are
  turned into the site's here.
- Notebooks with their results. They are executed, each in a folder of its own, and become Markdown, so that their links
  are checked as those of other pages.
- The reference: a page for each module that the navigation names.
"""

import logging
import os
import posixpath
import re
import time
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbclient import NotebookClient
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parents[2]
# Files outside of docs/ that are part of the site, at their own path; README.md is its first page.
OUTSIDE = ("*.md", "LICENSE", "benchmarks/results/*/table.md", "benchmarks/results/*/plot.png")
CELL_SECONDS = 300
REFERENCE = "---\ntitle: {name}\n---\n\n::: {name}\n    options:\n      heading_level: 1\n"
LINK = re.compile(r"(?<=\]\()(?P<target>[^()\s#:]+)(?=[#)])")

log = logging.getLogger("mkdocs.hooks.pages")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for path in (path for pattern in OUTSIDE for path in sorted(ROOT.glob(pattern))):
        name = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, place(name), abs_src_path=str(path)))
    for notebook in [file for file in files if file.src_uri.endswith(".ipynb")]:
        markdown, pictures = executed(Path(notebook.abs_src_path).read_text(encoding="utf-8"), notebook.src_uri)
        files.append(File.generated(config, place(f"docs/{notebook.src_uri}"), content=markdown))
        for name, content in pictures.items():
            files.append(
                File.generated(config, posixpath.join(posixpath.dirname(notebook.src_uri), name), content=content)
            )
    for uri in in_navigation(config.nav):
        if uri.startswith("reference/"):
            files.append(File.generated(config, uri, content=REFERENCE.format(name=Path(uri).stem)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    uri = page.file.src_uri
    source = next(
        (name for name in ("README.md", uri) if place(name) == uri and (ROOT / name).is_file()), f"docs/{uri}"
    )

    def of_the_site(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link["target"]))
        if not (ROOT / target).is_file():
            return link["target"]
        return posixpath.relpath(place(target), posixpath.dirname(uri) or ".")

    markdown = LINK.sub(of_the_site, markdown)
    notebook = Path(uri).with_suffix(".ipynb").name
    if (ROOT / source).with_suffix(".ipynb").is_file():
        markdown = markdown.replace("\n", f"\n\nA notebook: [{notebook}]({notebook}).\n", 1)
    return markdown


def place(path: str) -> str:
    """Where a file of the repository stands in the site."""
    if path == "README.md":
        return "index.md"
    return re.sub(r"\.ipynb$", ".md", path.removeprefix("docs/"))


def in_navigation(nav: Any) -> list[str]:
    """All pages of the navigation."""
    if isinstance(nav, str):
        return [nav]
    return [uri for item in (nav.values() if isinstance(nav, dict) else nav) for uri in in_navigation(item)]


@cache  # `mkdocs serve` executes what has changed
def executed(text: str, name: str) -> tuple[str, dict[str, bytes]]:
    """A notebook with its results as Markdown, and its pictures by file name."""
    notebook = nbformat.reads(text, as_version=4)
    begin = time.perf_counter()
    with TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook,
            timeout=CELL_SECONDS,
            kernel_name="python3",
            resources={"metadata": {"path": folder}},
            extra_arguments=["--HistoryManager.enabled=False"],
        )
        client.execute(env={**os.environ, "OMP_NUM_THREADS": "1"})  # as fast on a machine that does other things, too
    log.info("%s: executed in %.1f s", name, time.perf_counter() - begin)
    stem = Path(name).stem
    markdown, resources = MarkdownExporter().from_notebook_node(
        notebook, resources={"unique_key": stem, "output_files_dir": f"{stem}_files"}
    )
    return markdown, resources["outputs"]
