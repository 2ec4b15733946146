"""Build of the compiled kernels; everything else is in pyproject.toml."""

import platform
import sys
from pathlib import Path
from typing import Any

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup
from setuptools.errors import CCompilerError, ExecError, PlatformError

# Files with these endings are compiled for an instruction set of their own and used where the processor has it; a
# binary built here runs on any processor of the same architecture (no -march=native).
X86 = platform.machine().lower() in ("x86_64", "amd64")
ISA_FLAGS = {"_avx512.cpp": ["-mavx512f", "-mfma"], "_avx2.cpp": ["-mavx2", "-mfma"]} if X86 else {}
# torch's own copy of the OpenMP library is used, because torch is imported first.
OPENMP_FLAGS = ["-fopenmp"] if sys.platform == "linux" else []


SOURCES = [
    str(path)
    for path in sorted(Path("csrc").rglob("*.cpp"))
    if X86 or not path.name.endswith(("_avx512.cpp", "_avx2.cpp"))
]


class OptionalBuildExt(build_ext):
    """Where there is no working compiler the package installs without its kernels, with one clear warning."""

    def build_extensions(self) -> None:
        compile_one = self.compiler._compile

        def compile_for_isa(obj: str, src: str, ext: str, cc_args: list[str], extra: list[str], pp: list[str]) -> Any:
            flags = next((flags for ending, flags in ISA_FLAGS.items() if src.endswith(ending)), [])
            return compile_one(obj, src, ext, cc_args, [*extra, *flags], pp)

        self.compiler._compile = compile_for_isa
        super().build_extensions()

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
    package_data={"sparse_moon": ["py.typed"], "sparse_moon.ops": ["*.json"], "sparse_moon.presets": ["*.yaml"]},
    ext_modules=[
        Pybind11Extension(
            "sparse_moon._C",
            SOURCES,
            include_dirs=["csrc"],
            cxx_std=17,
            extra_compile_args=["-O3", "-Wall", "-Wextra", "-ffp-contract=fast", *OPENMP_FLAGS],
            extra_link_args=OPENMP_FLAGS,
        )
    ],
    cmdclass={"build_ext": OptionalBuildExt},
)
