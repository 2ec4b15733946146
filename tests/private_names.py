"""Where Python files use private names of files of the package: imported, read or patched, inside functions as well."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from torch import nn

ROOT = Path(__file__).parents[1]
EXTENSIONS = ("_C", "_C_cuda")
BY_STRING = ("getattr", "setattr", "delattr", "patch", "object")  # the last two are of unittest.mock


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in EXTENSIONS


def is_module(name: str) -> bool:
    path = ROOT / name.replace("sparse_moon.kernels", "kernels").replace(".", "/")
    return name.startswith("sparse_moon") and (path.with_suffix(".py").is_file() or (path / "__init__.py").is_file())


def members_of(tree: ast.AST) -> set[str]:
    """Private methods and attributes of a file's classes."""
    kinds = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    methods = {node.name for kind in kinds for node in kind.body if isinstance(node, ast.FunctionDef)}
    attributes = {
        node.attr
        for kind in kinds
        for node in ast.walk(kind)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self"
    }
    return {name for name in methods | attributes if is_private(name)}


@cache
def members_of_the_package() -> set[str]:
    """Those of all its classes, but for what a module of torch has by itself."""
    paths = [*(ROOT / "sparse_moon").rglob("*.py"), *(ROOT / "kernels").glob("*.py")]
    found = set().union(*(members_of(ast.parse(path.read_text(encoding="utf-8"))) for path in paths))
    return found - set(dir(nn.Module()))


def modules_by_alias(tree: ast.AST) -> dict[str, str]:
    """What a file calls the modules of the package that it imports, with those names that it imports from them."""
    named = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            named |= {alias.asname or alias.name: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            named |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return {alias: name for alias, name in named.items() if name.split(".")[0] == "sparse_moon"}


def private_uses(path: Path) -> Iterator[str]:
    """Each private name of another file that this file uses, behind its module or what its object is called here.

    A class may use what its base class keeps for itself.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    named = modules_by_alias(tree)
    foreign = members_of_the_package() - members_of(tree)
    yield from (name for name in named.values() if is_private(name.split(".")[-1]))

    def used(owner: ast.expr, name: str) -> Iterator[str]:
        inside = ast.unparse(owner)
        module = named.get(inside, inside.removeprefix("sys.modules[").strip("]'"))
        if is_private(name) and (is_module(module) or (name in foreign and inside not in ("self", "cls", "super()"))):
            yield f"{module}.{name}"

    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield from used(node.value, node.attr)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in BY_STRING:
            match node.args:
                case [ast.Constant(value=str(target)), *_] if is_module(target.rpartition(".")[0]):  # of mock.patch
                    yield from (target,) if is_private(target.rpartition(".")[2]) else ()
                case [owner, ast.Constant(value=str(name)), *_]:
                    yield from used(owner, name)
