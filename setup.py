"""Builds luke_kernels._C from csrc/ with ninja. All other metadata stands in pyproject.toml."""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, PlatformError

CXX_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
# The kernels are compiled once for each instruction set, and chosen at run time.
KERNELS = "csrc/cpu/kernels.cpp"
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
# GCC 12 takes its own intrinsics for uninitialised.
QUIET = ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
AVX512 = [*AVX2, *QUIET, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
ISAS = {"portable": [], "avx2": AVX2, "avx512": AVX512, "avx512_bf16": [*AVX512, "-mavx512bf16"]}


def find_compiler() -> str:
    """Return the command of the compiler: $CXX, which may hold a wrapper and flags, or the first that is found."""
    chosen = os.environ.get("CXX", "")
    if chosen.strip():
        if shutil.which(shlex.split(chosen)[0]) is None:
            raise PlatformError(f"CXX must name a C++17 compiler, got {chosen!r}, which is not found")
        return chosen
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return name
    raise PlatformError("luke_kernels needs a C++17 compiler to build, found none of $CXX, c++, g++, clang++")


def cuda_sources() -> list[str]:
    """Return the CUDA sources to build, as LUKE_KERNELS_CUDA (auto, 0 or 1) says."""
    wanted = os.environ.get("LUKE_KERNELS_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        raise PlatformError(f"LUKE_KERNELS_CUDA must be auto, 0 or 1, got {wanted!r}")
    sources = sorted(map(str, Path("csrc/cuda").glob("*.cu")))
    if wanted == "1" and not (shutil.which("nvcc") and sources):
        missing = "no CUDA sources in this version" if not sources else "no nvcc on PATH"
        raise PlatformError(f"LUKE_KERNELS_CUDA=1 must find nvcc and CUDA sources, got {missing}")
    return sources if wanted != "0" and shutil.which("nvcc") else []


def runs(compiler: str, *flags: str) -> bool:
    """Return whether the compiler builds a shared library with these flags."""
    command = [*shlex.split(compiler), "-x", "c++", "-", "-shared", "-fPIC", "-o", os.devnull, *flags]
    return subprocess.run(command, input=b"int f() { return 0; }", capture_output=True).returncode == 0


class NinjaBuildExt(build_ext):
    """Writes one build.ninja an extension and runs it: parallel, and only what changed."""

    def build_extension(self, ext: Extension) -> None:
        compiler = find_compiler()
        sources = [*ext.sources, *cuda_sources()]

        import ninja
        import pybind11

        openmp = ["-fopenmp"] if runs(compiler, "-fopenmp") else []
        includes = [f"-I{p}" for p in (pybind11.get_include(), sysconfig.get_paths()["include"])]
        x86 = all(runs(compiler, *options) for options in ISAS.values())
        isas = ISAS if x86 else {"portable": []}
        defines = ["-DLUKE_X86"] if x86 else []
        flags = [*CXX_FLAGS, *openmp, *defines, *includes, *os.environ.get("CXXFLAGS", "").split()]
        undefined = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
        link_flags = ["-shared", *openmp, *undefined, *os.environ.get("LDFLAGS", "").split()]
        folder = Path(self.build_temp).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).absolute()
        kernels = {isa: folder / "csrc/cpu" / f"kernels_{isa}.o" for isa in isas}
        objects = {folder / Path(source).with_suffix(".o"): Path(source).absolute() for source in sources}
        lines = [
            "rule compile",
            f"  command = {compiler} -MMD -MF $out.d {' '.join(flags)} $isa -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = {compiler} $in -o $out {' '.join(link_flags)}",
            *(f"build {escape(path)}: compile {escape(source)}" for path, source in objects.items()),
            *(
                f"build {escape(path)}: compile {escape(Path(KERNELS).absolute())}\n"
                f"  isa = -DLUKE_ISA={isa} {' '.join(isas[isa])}"
                for isa, path in kernels.items()
            ),
            f"build {escape(target)}: link {' '.join(map(escape, [*objects, *kernels.values()]))}",
            "",
        ]
        (folder / "build.ninja").write_text("\n".join(lines))
        command = [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(folder), *(["-v"] if self.verbose else [])]
        if subprocess.run(command).returncode:
            raise CompileError(f"luke_kernels._C must compile, got an error from {compiler} (its message stands above)")


def escape(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


sources = ["csrc/bindings.cpp", *sorted(str(p) for p in Path("csrc/cpu").glob("*.cpp") if str(p) != KERNELS)]
setup(ext_modules=[Extension("luke_kernels._C", sources)], cmdclass={"build_ext": NinjaBuildExt})
