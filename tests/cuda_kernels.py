"""What nvcc made of the CUDA kernels in luke_kernels._C: registers, stack, instructions.

    python tests/cuda_kernels.py --write     docs/cuda-kernels.md, of the extension as it is built

It asks cuobjdump, of the CUDA toolkit or of Triton.
"""

import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from os import environ
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).parents[1]
PAGE = REPOSITORY / "docs" / "cuda-kernels.md"
KERNELS = ("Forward", "QueryGradient", "KeyGradient")
DTYPES = {"0": "float32", "2": "bfloat16", "3": "float16"}
# Bytes of shared memory, and threads, that a multiprocessor has (CUDA C++ Programming Guide).
CHIPS = {"sm_80": (164 * 1024, 2048), "sm_90a": (228 * 1024, 2048)}
# The smallest that a block may have on any architecture from sm_80 on: kernels have one configuration for all.
SMALLEST_SHARED_BYTES = 99 * 1024


class Kernel(NamedTuple):
    name: str
    dtype: str
    head_dim: int
    dropout: bool
    warpgroups: bool

    @classmethod
    def of_symbol(cls, symbol: str) -> "Kernel | None":
        found = re.search(rf"\d({'|'.join(KERNELS)})ILNS_5DTypeE(\d)ELi(\d+)ELb([01])ELb([01])E", symbol)
        return found and cls(found[1], DTYPES[found[2]], int(found[3]), found[4] == "1", found[5] == "1")

    @property
    def has_warpgroups(self) -> bool:
        """Return whether there are two of the kernel, one of them for the warpgroups of Hopper."""
        return self.dtype != "float32"

    def is_built_for(self, architecture: str) -> bool:
        """Return whether it is more than a trap there."""
        return self.warpgroups == (architecture == "sm_90a" and self.has_warpgroups)

    def products(self) -> str:
        return "FFMA" if self.dtype == "float32" else "HGMMA" if self.warpgroups else "HMMA"


class Usage(NamedTuple):
    registers: int
    stack: int


def cuobjdump() -> str | None:
    """Return the tool's path, or None."""
    if found := shutil.which("cuobjdump"):
        return found
    try:
        import triton
    except ImportError:
        return None
    return shutil.which("cuobjdump", path=str(Path(triton.__file__).parent / "backends/nvidia/bin"))


def usages(library: Path) -> dict[str, dict[Kernel, Usage]]:
    """Return architecture -> kernel -> what it uses."""
    listing = _run(cuobjdump(), "--dump-resource-usage", library)
    found: dict[str, dict[Kernel, Usage]] = {}
    for architecture, lines in _by_architecture(listing):
        kernel = None
        for line in lines:
            if head := re.match(r"\s*Function (\S+):$", line):
                kernel = Kernel.of_symbol(head[1])
            elif kernel and (use := re.search(r"REG:(\d+) STACK:(\d+)", line)) and kernel.is_built_for(architecture):
                found.setdefault(architecture, {})[kernel] = Usage(int(use[1]), int(use[2]))
    return found


def instructions(library: Path, architecture: str) -> dict[Kernel, dict[str, int]]:
    """Return kernel -> how often each instruction occurs, by the part of its name before the first dot."""
    found: dict[Kernel, dict[str, int]] = {}
    kernel = None
    for line in _run(cuobjdump(), "-sass", "-arch", architecture, library).splitlines():
        if head := re.match(r"\s*Function : (\S+)$", line):
            kernel = Kernel.of_symbol(head[1])
        elif kernel and (each := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@\S+ )?([A-Z0-9]+)", line)):
            counts = found.setdefault(kernel, {})
            counts[each[1]] = counts.get(each[1], 0) + 1
    return {kernel: counts for kernel, counts in found.items() if kernel.is_built_for(architecture)}


def build_unit_tests(program: Path) -> None:
    """Compile tests/cpp/test_cuda.cpp."""
    compiler = shlex.split(environ.get("CXX", "")) or ["c++"]
    folder = REPOSITORY / "tests" / "cpp"
    flags = ["-std=c++17", "-O1", "-DLUKE_EMULATOR", f"-I{folder}", *shlex.split(environ.get("CXXFLAGS", ""))]
    flags.append("-U_FORTIFY_SOURCE")  # fibers jump from stack to stack
    subprocess.run([*compiler, *flags, folder / "test_cuda.cpp", "-o", program], check=True)


def launches(program: Path) -> dict[Kernel, tuple[int, int]]:
    """Return kernel -> threads of a block and bytes of its shared memory, as the unit tests print them."""
    found = {}
    for line in _run(program, "--table").splitlines():
        name, dtype, head_dim, dropout, warpgroups, threads, shared = line.split()
        found[Kernel(name, dtype, int(head_dim), dropout == "1", warpgroups == "1")] = int(threads), int(shared)
    return found


def page(found: dict[str, dict[Kernel, Usage]], asked: dict[Kernel, tuple[int, int]]) -> str:
    """Return the table of docs/cuda-kernels.md."""
    lines = [
        "# What the CUDA kernels compile to",
        "",
        "Written by `python tests/cuda_kernels.py --write` from the extension that nvcc 13.0 built; a test holds",
        "that it is not stale. None of these kernels has run on a GPU yet ([what waits](../benchmarks/GPU_QUEUE.md)):",
        "configurations are what compiles without a stack.",
        "",
        "- products: instructions that multiply, FFMA, HMMA (mma.sync) or HGMMA (wgmma)",
        "- shared: KiB of shared memory a block",
        "- stack: bytes a thread keeps in memory",
        "- blocks: how many a multiprocessor holds at a time, by registers, shared memory and threads",
        "",
        "| chip | kernel | products | tensors | head_dim | threads | registers | stack | shared | blocks |",
        "| --- | --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for chip, kernels in found.items():
        for kernel in sorted(kernels, key=lambda k: (k.dtype, k.head_dim, k.dropout, KERNELS.index(k.name))):
            usage, (threads, shared) = kernels[kernel], asked[kernel]
            tensors = kernel.dtype + (", dropout" if kernel.dropout else "")
            shown = (
                chip,
                kernel.name,
                kernel.products(),
                tensors,
                kernel.head_dim,
                threads,
                usage.registers,
                usage.stack,
            )
            shown += (f"{shared / 1024:.1f}", blocks(chip, usage.registers, threads, shared))
            lines.append(f"| {' | '.join(map(str, shown))} |")
    return "\n".join([*lines, ""])


def blocks(chip: str, registers: int, threads: int, shared: int) -> int:
    """Return how many blocks a multiprocessor holds. Warps get registers by 256; a block takes 1 KiB of its own."""
    shared_bytes, most_threads = CHIPS[chip]
    registers_of_warp = -(-registers * 32 // 256) * 256
    warps = threads // 32
    return min(65536 // registers_of_warp // warps, shared_bytes // (shared + 1024), most_threads // threads, 32)


def _by_architecture(listing: str) -> Iterator[tuple[str, list[str]]]:
    for part in listing.split("\nFatbin elf code:\n")[1:]:
        yield re.search(r"^arch = (\S+)$", part, re.MULTILINE)[1], part.splitlines()


def _run(*command) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main() -> None:
    from luke_kernels import _C

    if sys.argv[1:] != ["--write"]:
        sys.exit(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "test_cuda"
        build_unit_tests(program)
        PAGE.write_text(page(usages(Path(_C.__file__)), launches(program)))
    print(PAGE)


if __name__ == "__main__":
    main()
