"""Builds luke_kernels._C from csrc/ with ninja. All other metadata stands in pyproject.toml."""

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import NamedTuple

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
AVX512_BF16 = [*AVX512, "-mavx512bf16"]
AMX = [*AVX512_BF16, "-mamx-tile", "-mamx-bf16"]
ISAS = {"portable": [], "avx2": AVX2, "avx512": AVX512, "avx512_bf16": AVX512_BF16, "amx": AMX}


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


# What the CUDA kernels are compiled for: +PTX is for GPUs to come, the a of 90a for Hopper's own instructions.
CUDA_ARCHITECTURES = "80 86 89 90a 100 120+PTX"
OLDEST_NVCC = (12, 0)
CUDA_KERNELS = "csrc/cuda/kernels.cu"
CUDA_DTYPES = ("kFloat32", "kBFloat16", "kFloat16")
CUDA_HEAD_DIMS = (32, 64, 128)
CUDA_FLAGS = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC,-fvisibility=hidden"]
# What a compilation by nvcc takes at most.
NVCC_BYTES = 2 * 2**30


class Cuda(NamedTuple):
    nvcc: str
    root: Path
    architectures: list[str]

    @property
    def targets(self) -> list[str]:
        """Return the options that name the architectures."""
        options = []
        for architecture in self.architectures:
            number, plus, _ = architecture.partition("+")
            options.append(f"-gencode=arch=compute_{number},code=sm_{number}")
            if plus:
                # Without the letter: what is written for one architecture alone runs on no later one.
                number = number.rstrip("af")
                options.append(f"-gencode=arch=compute_{number},code=compute_{number}")
        return options


def find_cuda(compiler: str) -> Cuda | None:
    """Return what builds the CUDA kernels, as LUKE_KERNELS_CUDA (auto, 0 or 1) says, or None.

    Raises:
        PlatformError: it is asked for and not there, too old, or does not work with the compiler.
    """
    wanted = os.environ.get("LUKE_KERNELS_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        raise PlatformError(f"LUKE_KERNELS_CUDA must be auto, 0 or 1, got {wanted!r}")
    if wanted == "0":
        return None
    homes = [Path(os.environ[name]) / "bin" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    nvcc = next(filter(None, (shutil.which("nvcc", path=str(home)) for home in homes)), shutil.which("nvcc"))
    if nvcc is None:
        if wanted == "1":
            raise PlatformError(
                "LUKE_KERNELS_CUDA=1 must find nvcc, got none in $CUDA_HOME/bin, $CUDA_PATH/bin or PATH"
            )
        print("luke_kernels: no nvcc, so the CUDA kernels are not built")
        return None
    told = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", told)
    if release is None or (int(release[1]), int(release[2])) < OLDEST_NVCC:
        found = release[0] if release else "no release in its answer"
        raise PlatformError(
            f"nvcc must be of CUDA {'.'.join(map(str, OLDEST_NVCC))} or later, got {found} from {nvcc}; "
            "LUKE_KERNELS_CUDA=0 builds without"
        )
    dry = subprocess.run([nvcc, "--dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.*)$", dry, re.MULTILINE)
    root = Path(top[1]).resolve() if top else Path(nvcc).resolve().parents[1]
    cuda = Cuda(nvcc, root, cuda_architectures(nvcc))
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cu"
        source.write_text("__global__ void probe() {}\n")
        command = [nvcc, *ccbin(compiler), *CUDA_FLAGS, *cuda.targets, "-c", source, "-o", Path(folder) / "probe.o"]
        probe = subprocess.run(command, capture_output=True, text=True)
    if probe.returncode:
        raise PlatformError(
            f"{nvcc} must compile with {compiler} for {' '.join(cuda.architectures)}, got: {probe.stderr.strip()}; "
            "CXX names another compiler, LUKE_KERNELS_CUDA_ARCHS other targets, LUKE_KERNELS_CUDA=0 builds without"
        )
    return cuda


def cuda_architectures(nvcc: str) -> list[str]:
    """Return LUKE_KERNELS_CUDA_ARCHS, or those of CUDA_ARCHITECTURES that this nvcc knows."""
    chosen = os.environ.get("LUKE_KERNELS_CUDA_ARCHS", "").replace(";", " ").replace(",", " ").split()
    for architecture in chosen:
        match = re.fullmatch(r"(\d+)[af]?(\+PTX)?", architecture)
        if match is None or int(match[1]) < 80:
            raise PlatformError(
                f"LUKE_KERNELS_CUDA_ARCHS must list architectures from 80 on, as in {CUDA_ARCHITECTURES!r}, got "
                f"{architecture!r}"
            )
    if "90a" in chosen and {"90", "90+PTX"} & {*chosen}:
        raise PlatformError(f"LUKE_KERNELS_CUDA_ARCHS must list 90 or 90a, not both, got {' '.join(chosen)!r}")
    if chosen:
        return chosen
    known = re.findall(
        r"compute_(\d+)", subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout
    )
    supported = [each for each in CUDA_ARCHITECTURES.split() if re.match(r"\d+", each)[0] in known]
    return [*supported[:-1], supported[-1].removesuffix("+PTX") + "+PTX"]


def ccbin(compiler: str) -> list[str]:
    """Return how nvcc is told of the compiler, unless NVCC_CCBIN tells it; wrappers and flags it cannot take."""
    if os.environ.get("NVCC_CCBIN"):
        return []
    return ["-ccbin", [word for word in shlex.split(compiler) if not word.startswith("-")][-1]]


def runs(compiler: str, *flags: str) -> bool:
    """Return whether the compiler builds a shared library with these flags."""
    command = [*shlex.split(compiler), "-x", "c++", "-", "-shared", "-fPIC", "-o", os.devnull, *flags]
    return subprocess.run(command, input=b"int f() { return 0; }", capture_output=True).returncode == 0


class NinjaBuildExt(build_ext):
    """Writes one build.ninja an extension and runs it: parallel, and only what changed."""

    def build_extension(self, ext: Extension) -> None:
        compiler = find_compiler()
        cuda = find_cuda(compiler)

        import ninja
        import pybind11

        openmp = ["-fopenmp"] if runs(compiler, "-fopenmp") else []
        includes = [f"-I{p}" for p in (pybind11.get_include(), sysconfig.get_paths()["include"])]
        isas = {isa: options for isa, options in ISAS.items() if runs(compiler, *options)}
        # Compilers of before 2021 know all but AMX.
        if not {*ISAS} - {"amx"} <= {*isas}:
            isas = {"portable": []}
        defines = [
            *(["-DLUKE_X86"] if "avx512_bf16" in isas else []),
            *(["-DLUKE_AMX"] if "amx" in isas else []),
            *(["-DLUKE_CUDA"] if cuda else []),
        ]
        flags = [*CXX_FLAGS, *openmp, *defines, *includes, *os.environ.get("CXXFLAGS", "").split()]
        undefined = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
        link_flags = ["-shared", *openmp, *undefined, *os.environ.get("LDFLAGS", "").split()]
        folder = Path(self.build_temp).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).absolute()
        kernels = {isa: folder / "csrc/cpu" / f"kernels_{isa}.o" for isa in isas}
        sources = [*ext.sources, *(["csrc/cuda/attention.cpp"] if cuda else [])]
        objects = {folder / Path(source).with_suffix(".o"): Path(source).absolute() for source in sources}
        cuda_lines, cuda_objects = cuda_rules(cuda, compiler, folder) if cuda else ([], [])
        if cuda:
            library = cuda.root / "lib64" if (cuda.root / "lib64").is_dir() else cuda.root / "lib"
            link_flags += [
                quote(f"-L{library}"),
                "-lcudart_static",
                "-ldl",
                "-lrt",
                "-lpthread",
                "-Wl,--exclude-libs,ALL",
            ]
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
            *cuda_lines,
            f"build {escape(target)}: link {' '.join(map(escape, [*objects, *kernels.values(), *cuda_objects]))}",
            "",
        ]
        (folder / "build.ninja").write_text("\n".join(lines))
        command = [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(folder), *(["-v"] if self.verbose else [])]
        if subprocess.run(command).returncode:
            raise CompileError(f"luke_kernels._C must compile, got an error from {compiler} (its message stands above)")


def cuda_rules(cuda: Cuda, compiler: str, folder: Path) -> tuple[list[str], list[Path]]:
    """Return lines of build.ninja that compile the kernels of each dtype and head_dim, and their objects."""
    architectures = ", ".join(f"sm_{each}" for each in cuda.architectures)
    named = f'-DLUKE_CUDA_ARCHITECTURES="{architectures}"'
    hopper = ["-DLUKE_HOPPER"] if any(each.startswith("90a") for each in cuda.architectures) else []
    flags = [*ccbin(compiler), *CUDA_FLAGS, *cuda.targets, *hopper]
    jobs = max(1, min(os.cpu_count() or 1, memory_bytes() // NVCC_BYTES))
    lines = [
        "pool nvcc",
        f"  depth = {jobs}",
        "rule cuda",
        f"  command = {quote(cuda.nvcc)} -MMD -MF $out.d {' '.join(flags)} $defines -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  pool = nvcc",
    ]
    objects = {folder / "csrc/cuda/device.o": ("csrc/cuda/device.cu", shlex.quote(named))}
    for head_dim in reversed(CUDA_HEAD_DIMS):
        for dtype in CUDA_DTYPES:
            path = folder / "csrc/cuda" / f"kernels_{dtype}_{head_dim}.o"
            objects[path] = CUDA_KERNELS, f"-DLUKE_DTYPE={dtype} -DLUKE_HEAD_DIM={head_dim}"
    for path, (source, own) in objects.items():
        lines += [f"build {escape(path)}: cuda {escape(Path(source).absolute())}", f"  defines = {own}"]
    return lines, [*objects]


def memory_bytes() -> int:
    """Return the memory of this machine, or of the container it is; 4 GiB where that is not known."""
    found = []
    with contextlib.suppress(OSError, ValueError):
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with contextlib.suppress(OSError, ValueError):
        found.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(found, default=4 * 2**30)


def quote(word: str) -> str:
    """Return a word for a command that ninja hands to the shell."""
    return shlex.quote(word).replace("$", "$$")


def escape(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


sources = ["csrc/bindings.cpp", *sorted(str(p) for p in Path("csrc/cpu").glob("*.cpp") if str(p) != KERNELS)]
setup(ext_modules=[Extension("luke_kernels._C", sources)], cmdclass={"build_ext": NinjaBuildExt})
