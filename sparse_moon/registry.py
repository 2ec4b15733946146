"""Classes by name: detectors, training methods and reliability methods register themselves when they are defined."""

from typing import TypeVar

T = TypeVar("T")


class Registry(dict[str, type[T]]):
    """The classes of one kind, ours and those of other packages, by their ``name``.

    Args:
        kind: what they are, for messages: ``"detector"``.
        package: the package of ours; an `import_path` has no module for a class in it.
        base: name of the class that all of them inherit from.
    """

    def __init__(self, kind: str, package: str, base: str) -> None:
        super().__init__()
        self.kind, self.package, self.base = kind, package, base

    def add(self, cls: type[T]) -> bool:
        """Take in a class that has a name of its own and can be imported; one defined anew replaces the first.

        Returns:
            Whether it was taken in: abstract classes have no name, and those of a function cannot be imported.

        Raises:
            ValueError: another class has the name.
        """
        name = vars(cls).get("name")
        if not isinstance(name, str) or "<locals>" in cls.__qualname__:
            return False
        if name in self and self.import_path(self[name]) != self.import_path(cls):
            both = f"{self.import_path(self[name])} and {self.import_path(cls)}"
            raise ValueError(f"{self.kind}s need distinct names, two are called {name!r}: {both}")
        self[name] = cls
        return True

    def import_path(self, cls: type[T]) -> str:
        """``module.Class``, how files and the command line name a class; for ours ``Class`` alone."""
        if cls.__module__.startswith(f"{self.package}."):
            return cls.__name__
        return f"{cls.__module__}.{cls.__qualname__}"

    def by_import_path(self, path: str) -> type[T]:
        """The class with this `import_path`; imports nothing.

        Raises:
            ValueError: there is none.
        """
        for cls in self.values():
            if self.import_path(cls) == path:
                return cls
        module = path.rpartition(".")[0]
        hint = ""
        if module:
            hint = (
                f": import {module}, where it must be a {self.base} with a name of its own; "
                "the command line imports what is named there, and is told again of a finished run"
            )
        raise ValueError(f"no {self.kind} {path} is known{hint}")

    def find(self, name: str) -> type[T]:
        """The class with this name or `import_path`; imports nothing.

        Raises:
            ValueError: there is none.
        """
        if name in self:
            return self[name]
        if "." in name:
            return self.by_import_path(name)
        raise ValueError(f"unknown {self.kind} {name!r}, expected one of {', '.join(self)}")
