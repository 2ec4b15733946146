import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]


def argument_of_setup(name):
    """A literal argument of ``setup.py``'s call of ``setup``."""
    for node in ast.walk(ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "setup":
            return next(ast.literal_eval(keyword.value) for keyword in node.keywords if keyword.arg == name)
    raise AssertionError("setup.py calls no setup")


def test_wheels_have_every_package():
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "sparse_moon").rglob("__init__.py")}
    assert set(argument_of_setup("packages")) == found | {"sparse_moon.kernels"}


def test_wheels_have_every_file_that_is_no_module():
    """The style and the template of the report, presets, tables, types."""
    data = argument_of_setup("package_data")
    folders = {name: ROOT.joinpath(*name.split(".")) for name in data}
    listed = {path for name, patterns in data.items() for pattern in patterns for path in folders[name].glob(pattern)}
    modules = {".py", ".pyc", ".so", ".pyd"}
    there = {path for path in (ROOT / "sparse_moon").rglob("*") if path.is_file() and path.suffix not in modules}
    assert {"report.css", "report.html.jinja", "py.typed"} <= {path.name for path in there}
    assert there == listed
