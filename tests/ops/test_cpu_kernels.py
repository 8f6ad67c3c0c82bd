"""The C++ kernels on their own: tests/cpp built for each instruction set; and that none leaks into what others run."""

import os
import re
import shlex
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

_C = pytest.importorskip("luke_kernels._C", reason="luke_kernels._C is not built")
SOURCE = Path(__file__).parents[1] / "cpp" / "test_kernels.cpp"
FLAGS = {
    "portable": [],
    "avx2": ["-march=x86-64-v3"],
    "avx512": ["-march=x86-64-v4"],
    "avx512_bf16": ["-march=x86-64-v4", "-mavx512bf16"],
    "amx": ["-march=x86-64-v4", "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
}


def test_kernels(isa, tmp_path):
    """CXXFLAGS may add sanitizers: memory is of exactly the size the kernels ask for."""
    compiler = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"{compiler[0]} is not installed")
    program = tmp_path / "test_kernels"
    flags = ["-std=c++17", "-O1", f"-DLUKE_ISA={isa}", *FLAGS[isa], *shlex.split(os.environ.get("CXXFLAGS", ""))]
    subprocess.run([*compiler, *flags, SOURCE, "-o", program], check=True)
    run = subprocess.run([program], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump is not installed")
@pytest.mark.skipif(_C.cpu_isa() == "portable", reason="this build or machine has one instruction set")
def test_no_instruction_set_leaks():
    """A function outside an instruction set's namespace may have been linked from any of its files."""
    command = ["objdump", "--disassemble", "--no-show-raw-insn", _C.__file__]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    wide = {"avx512", "avx512_bf16", "amx"}
    allowed = {"%tmm": {"amx"}, "%zmm": wide, "%ymm": {"avx2", *wide}, "vector": {"avx2", *wide}}
    found = {kind: Counter() for kind in allowed}
    leaks, place, symbol = set(), "", ""
    for line in listing.splitlines():
        if head := re.fullmatch(r"[0-9a-f]+ <(.*)>:", line):
            symbol = head[1]
            names = re.search(r"12luke_kernels(?:8(portable)|4(avx2)|6(avx512)|11(avx512_bf16)|3(amx))", symbol)
            place = names[names.lastindex] if names else ""
            continue
        instruction = line.split("\t")[1:2]
        for kind in allowed:
            # Encoded as AVX is: the mnemonic begins with a v. No other of x86-64's does, but for virtual machines.
            hit = instruction and instruction[0].startswith("v") if kind == "vector" else kind in line
            if hit:
                found[kind][place] += 1
                if place not in allowed[kind]:
                    leaks.add((kind, symbol))
    assert not leaks
    assert all(set(found[kind]) == allowed[kind] for kind in ("%tmm", "%zmm", "%ymm"))
