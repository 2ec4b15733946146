"""What the source promises besides the contracts of ``lint-imports``: see ARCHITECTURE.md and CONTRIBUTING.md."""

import ast
import re
import sys
from graphlib import CycleError, TopologicalSorter
from importlib import import_module
from pathlib import Path
from pkgutil import resolve_name
from typing import get_args

import pytest

from private_names import private_uses
from sparse_moon.algorithms import ALGORITHMS
from sparse_moon.options import ReliabilityMethod, TrainingMethod
from sparse_moon.reliability import RELIABILITY

ROOT = Path(__file__).parents[1]
PACKAGE = sorted((ROOT / "sparse_moon").rglob("*.py"))
KERNELS = sorted((ROOT / "kernels").glob("*.py"))
PAGES = [ROOT / "README.md", ROOT / "ARCHITECTURE.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

MOST_LINES = {"sparse_moon": 400, "kernels": 400, "csrc": 500, "tests": 500, "benchmarks": 500}
# Each of these wants to be two files; none may grow.
LONGER = {}
# What tests use of files' private names, at most ten, and why.
_RUNS = "no public way says which runs of a comparison would start"
PRIVATE = {
    ("tests/test_cli_errors.py", "sparse_moon.app.cli._GROUPS"): "each option is in one group of the help",
    ("tests/test_compare.py", "sparse_moon.app.compare._prepare"): _RUNS,
    ("tests/test_compare.py", "sparse_moon.app.compare._start"): _RUNS,
    ("tests/test_data.py", "sparse_moon.app.datasets._FOLDER_STATISTICS_IMAGES"): "a folder of 20,000 images is large",
    ("tests/test_snippets.py", "sparse_moon.app.cli._parser"): "commands in documents are parsed, not run",
    ("tests/test_snippets.py", "sparse_moon.app.cli._with_presets"): "commands in documents are parsed, not run",
}


def run_nodes(tree):
    """All of a tree but what is under ``if TYPE_CHECKING``."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node = ast.Module(body=node.orelse, type_ignores=[])
        yield node
        yield from run_nodes(node)


def imports_of(node):
    """Each module that a statement imports and, where names come from it, each name; and what it is called here."""
    if isinstance(node, ast.Import):
        return [(alias.name, None, alias.asname or alias.name) for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        module = ".".join(
            filter(None, ("sparse_moon" if node.level else None, node.module))
        )  # relative: in __init__.pyi
        return [(module, alias.name, alias.asname or alias.name) for alias in node.names]
    return []


WORDS = {"none", "set"}  # which mean other things as well: they count where something is compared with them


def imports(tree):
    """Those of a whole file, inside functions as well."""
    return [found for node in ast.walk(tree) for found in imports_of(node)]


def modules():
    """The file of each module by its dotted name."""
    folders = [(ROOT / "sparse_moon", PACKAGE, "sparse_moon"), (ROOT / "kernels", KERNELS, "sparse_moon.kernels")]
    return {
        ".".join((package, *path.relative_to(folder).with_suffix("").parts)).removesuffix(".__init__"): path
        for folder, paths, package in folders
        for path in paths
    }


def operator_of(call, *functions):
    """The operator that a call of one of these functions is about, or None."""
    if not call.args or ast.unparse(call.func) not in functions:
        return None
    first = call.args[0].values[0] if isinstance(call.args[0], ast.JoinedStr) else call.args[0]
    return first.value.partition("(")[0] if isinstance(first, ast.Constant) else None


def operators_named(nodes):
    """The operators that attributes of ``torch.ops.sparse_moon`` name."""
    attributes = (node for node in nodes if isinstance(node, ast.Attribute))
    return {node.attr for node in attributes if ast.unparse(node.value) == "torch.ops.sparse_moon"}


def uses_of_modules():
    """The modules that each module imports, or whose operators it calls by their names."""
    files = modules()
    nodes = {name: list(run_nodes(ast.parse(path.read_text(encoding="utf-8")))) for name, path in files.items()}
    nodes["sparse_moon"] += run_nodes(ast.parse(files["sparse_moon"].with_suffix(".pyi").read_text(encoding="utf-8")))
    calls = {name: [node for node in nodes[name] if isinstance(node, ast.Call)] for name in files}
    home = {operator_of(call, "define", "Product"): name for name in files for call in calls[name]}
    uses = {}
    for name in files:
        imported = (
            f"{module}.{attribute}" if f"{module}.{attribute}" in files else module
            for node in nodes[name]
            for module, attribute, _ in imports_of(node)
        )
        operators = {operator_of(call, "call", "implement") for call in calls[name]} | operators_named(nodes[name])
        homes = {home[operator] for operator in operators - {None}}
        uses[name] = {used for used in (*imported, *homes) if used in files and used != name}
    return uses


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.name)
def test_kernels_import_torch_and_triton_only(path):
    allowed = {"torch", "triton", *sys.stdlib_module_names}
    for module, *_ in imports(ast.parse(path.read_text(encoding="utf-8"))):
        own = module == "sparse_moon.kernels" or module.startswith("sparse_moon.kernels.")
        assert own or module.split(".")[0] in allowed, f"{path.name} imports {module}"


def test_private_names_stay_in_their_file():
    found = {(path.name, used) for path in (*PACKAGE, *KERNELS) for used in private_uses(path)}
    assert not found, "give what another file needs a public name"


def methods_named(path):
    """Names of training methods and reliability methods as strings, defaults apart, and their classes."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {*get_args(TrainingMethod), *get_args(ReliabilityMethod)}
    defaults = [node.value for node in ast.walk(tree) if isinstance(node, ast.AnnAssign)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare | ast.MatchValue):
            yield from (one.value for one in ast.walk(node) if isinstance(one, ast.Constant) and one.value in names)
        elif isinstance(node, ast.Constant) and node.value in names - WORDS and node not in defaults:
            yield node.value
    classes = {kind.__name__ for kind in (*ALGORITHMS.values(), *RELIABILITY.values())}
    yield from (name for _, name, _ in imports(tree) if name in classes)


def test_the_application_knows_no_method_by_name():
    app = ROOT / "sparse_moon" / "app"
    found = {str(path.relative_to(app)): sorted(methods_named(path)) for path in app.rglob("*.py")}
    found = {name: named for name, named in found.items() if named}
    assert not found, "ask the method's class"


def test_few_tests_use_private_names():
    files = sorted((ROOT / "tests").glob("*.py"))
    found = {(path.relative_to(ROOT).as_posix(), used) for path in files for used in private_uses(path)}
    assert not found - PRIVATE.keys(), "test what is public, or give it a public name"
    assert not PRIVATE.keys() - found, "these are no exceptions any more: take them from the list"
    assert len(PRIVATE) <= 10


@pytest.mark.parametrize("code", [
    "from sparse_moon.ops.choice import _measured",
    "def f():\n    from sparse_moon.ops.choice import _measured",
    "from sparse_moon.ops import choice\nchoice._measured",
    "import sparse_moon.ops.choice as c\nc._measured",
    "import sys\nsys.modules['sparse_moon.ops.choice']._measured",
    "from sparse_moon.ops import choice\nmonkeypatch.setattr(choice, '_measured', {})",
    "mock.patch('sparse_moon.ops.choice._measured')",
    "method._steps_now()",
])  # fmt: skip
def test_a_use_of_a_private_name_is_found(code, tmp_path):
    path = tmp_path / "user.py"
    path.write_text(code)
    assert len(list(private_uses(path))) == 1


def test_no_module_uses_itself_by_way_of_others():
    uses = uses_of_modules()
    try:
        TopologicalSorter(uses).prepare()
    except CycleError as error:
        pytest.fail(f"a circle: {' -> '.join(reversed(error.args[1]))}")


def test_torch_is_asked_for_an_operator_where_it_is_defined():
    for path in PACKAGE:
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        defined = {operator_of(node, "define", "Product") for node in nodes if isinstance(node, ast.Call)}
        assert operators_named(nodes) <= defined, f"{path}: call its public function, or that of ops/registry.py"


def test_files_are_short():
    wanted = {".py", ".cpp", ".cu", ".h"}
    paths = [path for folder in MOST_LINES for path in (ROOT / folder).rglob("*") if path.suffix in wanted]
    lines = {path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines()) for path in paths}
    long = {name: count for name, count in lines.items() if count > LONGER.get(name, MOST_LINES[name.split("/")[0]])}
    assert not long, "cut these files in two"
    short = [name for name in LONGER if lines.get(name, 0) <= MOST_LINES[name.split("/")[0]]]
    assert not short, "these are short now: take them from the list"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_name_files_that_exist(page):
    text = page.read_text(encoding="utf-8")
    folders = "|".join(
        sorted(path.name for at in (ROOT, ROOT / "sparse_moon") for path in at.iterdir() if path.is_dir())
    )
    named = re.findall(rf"`((?:{folders})/[\w./]+)`", text)
    missing = [name for name in named if not any((at / name).exists() for at in (ROOT, ROOT / "sparse_moon"))]
    missing += [link for link in re.findall(r"\]\(([\w./-]+\.md)", text) if not (page.parent / link).exists()]
    assert not missing


def exists(name):
    """Whether there is such a module, or such a name in it; a module whose packages are not installed cannot say."""
    parts = re.sub(r"^sm\b", "sparse_moon", name).split(".")
    for length in range(2, len(parts) + 1):
        try:
            import_module(".".join(parts[:length]))
        except ModuleNotFoundError as error:
            if not (error.name or "").startswith("sparse_moon"):  # another package's
                return True
            break
    try:
        resolve_name(".".join(parts))
    except (ImportError, AttributeError):
        return False
    return True


def test_pages_and_docstrings_name_what_exists():
    texts = {path: path.read_text(encoding="utf-8") for path in (*PAGES, *PACKAGE, *KERNELS)}
    changes = ROOT / "CHANGELOG.md"
    texts[changes] = re.sub(r"^\|[^|]*\|", "", changes.read_text(encoding="utf-8"), flags=re.M)  # but for what was
    named = {
        (path.relative_to(ROOT).as_posix(), name)
        for path, text in texts.items()
        for name in re.findall(r"(?<![\w./])(?:sparse_moon|sm)(?:\.[A-Za-z]\w*)+", text)
    }
    assert len(named) > 300 and not [(path, name) for path, name in named if not exists(name)]


def test_results_name_no_folder_of_the_machine_that_wrote_them():
    named = {
        str(path.relative_to(ROOT)): found
        for path in sorted((ROOT / "benchmarks" / "results").rglob("*.json"))
        if (found := re.findall(r"(?<![\w.:/])/(?:tmp|home|root|work|mnt|data|var|opt|usr)/[^\s\"]*", path.read_text()))
    }
    assert not named
