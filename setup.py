"""Build of the compiled kernels; everything else is in pyproject.toml."""

import sys
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup
from setuptools.errors import CCompilerError, ExecError, PlatformError


class OptionalBuildExt(build_ext):
    """Where there is no working compiler the package installs without its kernels, with one clear warning."""

    def build_extension(self, ext: Pybind11Extension) -> None:
        try:
            super().build_extension(ext)
        except (CCompilerError, ExecError, PlatformError, OSError) as error:
            ext.optional = True
            print(
                f"WARNING: the CPU kernels of sparse_moon were not built ({error}). The package works on its slower "
                "reference path; install a C++17 compiler and reinstall to build them.",
                file=sys.stderr,
            )

    def copy_extensions_to_source(self) -> None:
        """Editable installs: copy what was built, and nothing where nothing was."""
        self.extensions: list[Pybind11Extension] = [
            ext for ext in self.extensions if Path(self.get_ext_fullpath(ext.name)).exists() or not ext.optional
        ]
        super().copy_extensions_to_source()


setup(
    packages=["sparse_moon", "sparse_moon.ops", "sparse_moon.kernels", "sparse_moon.presets"],
    package_dir={"sparse_moon.kernels": "kernels"},
    package_data={"sparse_moon": ["py.typed"], "sparse_moon.presets": ["*.yaml"]},
    ext_modules=[
        Pybind11Extension(
            "sparse_moon._C",
            ["csrc/bindings.cpp", *sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp"))],
            include_dirs=["csrc"],
            cxx_std=17,
            extra_compile_args=["-O3", "-Wall", "-Wextra"],
        )
    ],
    cmdclass={"build_ext": OptionalBuildExt},
)
