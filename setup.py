"""Build of the compiled kernels; everything else is in pyproject.toml."""

import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup
from setuptools.errors import CCompilerError, ExecError, PlatformError

# Files with these endings are compiled for an instruction set of their own and used where the processor has it; a
# binary built here runs on any processor of the same architecture (no -march=native).
X86 = platform.machine().lower() in ("x86_64", "amd64")
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mfma"]
ISA_FLAGS = {"_avx512.cpp": AVX512, "_avx2.cpp": ["-mavx2", "-mfma"]} if X86 else {}
# torch's own copy of the OpenMP library is used, because torch is imported first.
OPENMP_FLAGS = ["-fopenmp"] if sys.platform == "linux" else []

SOURCES = [
    str(path)
    for path in [Path("csrc/register_cpu.cpp"), *sorted(Path("csrc/cpu").glob("*.cpp"))]
    if X86 or not path.name.endswith(("_avx512.cpp", "_avx2.cpp"))
]

HEADERS = [str(path) for path in sorted(Path("csrc").rglob("*.h"))]

# A100, H100 and H200, B200; what comes later compiles the newest one's PTX when it is first used.
CUDA_ARCHITECTURES = [int(arch) for arch in os.environ.get("SPARSE_MOON_CUDA_ARCHITECTURES", "80 90 100").split()]
CUDA_JOBS = int(os.environ.get("MAX_JOBS", "2"))  # each compiles for all of them, in a gigabyte

ParallelCompile("MAX_JOBS").install()  # the C++ files: as many at a time as there are cores, or MAX_JOBS


def find_nvcc() -> Path | None:
    """nvcc of ``CUDA_HOME``, or the one on the path."""
    home = os.environ.get("CUDA_HOME")
    found = shutil.which("nvcc", path=str(Path(home) / "bin")) if home else None
    found = found or shutil.which("nvcc")
    return Path(found) if found and sys.platform == "linux" else None


def cuda_root(nvcc: Path) -> Path:
    """The toolkit's folder, also where what is on the path is a link or a script that starts the real one."""
    dry_run = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-E", os.devnull], capture_output=True, text=True)
    top = next((line.partition("TOP=")[2] for line in dry_run.stderr.splitlines() if "TOP=" in line), None)
    return Path(top.strip()).resolve() if top else nvcc.resolve().parent.parent


def cuda_targets(nvcc: Path) -> list[str]:
    """``-gencode`` flags for the architectures that this nvcc knows, with PTX of the newest."""
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    targets = [arch for arch in CUDA_ARCHITECTURES if f"sm_{arch}" in known]
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in targets]
    return [*flags, f"-gencode=arch=compute_{targets[-1]},code=compute_{targets[-1]}"]


def compile_cuda(nvcc: Path, build_temp: Path) -> list[str]:
    """Objects of ``csrc/cuda/*.cu``; one that is newer than its source and every header is kept."""
    targets = cuda_targets(nvcc)
    headers = max(Path(path).stat().st_mtime for path in HEADERS)

    def compile_one(source: Path) -> str:
        out = build_temp / source.with_suffix(".o")
        if not out.exists() or out.stat().st_mtime < max(source.stat().st_mtime, headers):
            out.parent.mkdir(parents=True, exist_ok=True)
            flags = ["-std=c++17", "-O3", "-Icsrc", "-Xcompiler=-fPIC,-fvisibility=hidden", *targets]
            command = [str(nvcc), *flags, "-c", str(source), "-o", str(out)]
            print(*command, flush=True)
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            if done.returncode:
                out.unlink(missing_ok=True)
                raise ExecError(f"nvcc failed on {source}:\n{done.stdout[-1000:].strip()}")
        return str(out)

    with ThreadPoolExecutor(CUDA_JOBS) as pool:
        return list(pool.map(compile_one, sorted(Path("csrc/cuda").glob("*.cu"))))


def warn(message: str) -> None:
    print(f"WARNING: {message}", file=sys.stderr, flush=True)


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
        cuda = ext.name == "sparse_moon._C_cuda"
        try:
            if cuda:
                self._add_cuda(ext)
            super().build_extension(ext)
        except (CCompilerError, ExecError, PlatformError, OSError, subprocess.SubprocessError) as error:
            ext.optional = True
            if cuda:
                warn(f"the CUDA kernels of sparse_moon were not built ({error}). Everything else is installed.")
            else:
                warn(
                    f"the CPU kernels of sparse_moon were not built ({error}). The package works on its slower "
                    "reference path; install a C++17 compiler and reinstall to build them."
                )

    def _add_cuda(self, ext: Pybind11Extension) -> None:
        """Compile the kernels and link them with the CUDA runtime inside, which looks for a driver when first used."""
        nvcc = find_nvcc()
        if nvcc is None:
            raise ExecError("nvcc is neither in CUDA_HOME/bin nor on the path")
        ext.extra_objects = compile_cuda(nvcc, Path(self.build_temp))
        ext.depends = [*ext.extra_objects, *HEADERS]
        ext.library_dirs = [str(path) for path in (cuda_root(nvcc) / "lib64", cuda_root(nvcc) / "lib") if path.exists()]
        ext.libraries = ["cudart_static", "dl", "rt", "pthread"]

    def copy_extensions_to_source(self) -> None:
        """Editable installs: copy what was built, and nothing where nothing was."""
        self.extensions: list[Pybind11Extension] = [
            ext for ext in self.extensions if Path(self.get_ext_fullpath(ext.name)).exists() or not ext.optional
        ]
        super().copy_extensions_to_source()


setup(
    packages=[
        "sparse_moon",
        "sparse_moon.algorithms",
        "sparse_moon.app",
        "sparse_moon.app.commands",
        "sparse_moon.capture",
        "sparse_moon.formats",
        "sparse_moon.integrations",
        "sparse_moon.losses",
        "sparse_moon.nn",
        "sparse_moon.ood",
        "sparse_moon.ops",
        "sparse_moon.ops.batch_norm_relu",
        "sparse_moon.ops.sparse_conv2d",
        "sparse_moon.ops.sparse_linear",
        "sparse_moon.ops.sparse_mlp",
        "sparse_moon.reliability",
        "sparse_moon.kernels",
        "sparse_moon.app.presets",
    ],
    package_dir={"sparse_moon.kernels": "kernels"},
    package_data={
        "sparse_moon": ["py.typed", "*.pyi"],
        "sparse_moon.ops": ["tables/*.json"],
        "sparse_moon.app": ["report.css", "report.html.jinja", "published.yaml"],
        "sparse_moon.app.presets": ["*.yaml"],
    },
    ext_modules=[
        Pybind11Extension(
            "sparse_moon._C",
            SOURCES,
            include_dirs=["csrc"],
            cxx_std=17,
            extra_compile_args=["-O3", "-Wall", "-Wextra", "-ffp-contract=fast", *OPENMP_FLAGS],
            extra_link_args=OPENMP_FLAGS,
            depends=HEADERS,
        ),
        Pybind11Extension(
            "sparse_moon._C_cuda",
            ["csrc/register_cuda.cpp"],
            include_dirs=["csrc"],
            cxx_std=17,
            extra_compile_args=["-O3", "-Wall", "-Wextra"],
        ),
    ],
    cmdclass={"build_ext": OptionalBuildExt},
)
