"""Compile every Triton kernel for a chip that need not be here, and check what the compiler made of it.

Prints one JSON line a kernel: the chip, registers, spills, bytes of shared memory. Run as a script, its argument the
compute capability, without TRITON_INTERPRET; test_triton.py does so under each Triton it can find.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from luke_kernels.ops.backends import triton as backend

KERNELS = {
    "fwd": backend.attention_fwd_kernel,
    "bwd_dq": backend.attention_bwd_dq_kernel,
    "bwd_dkdv": backend.attention_bwd_dkdv_kernel,
}
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
# Largest shared memory of a block, bytes (CUDA C++ Programming Guide, compute capabilities).
SHARED_LIMITS = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TENSOR_CORES = {80: r"\bmma\.sync", 90: r"\bwgmma\.mma_async", 100: r"\btcgen05\.mma|\bmma\.sync"}
OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")
# Instructions that spill or reload a register in a loop with products. Outside of them a program does it once.
SPILL_LIMIT = 0
# Tiles that spill and were the fastest of all tried on an H100 nevertheless.
SPILLS_ALLOWED = {("bwd_dkdv", 90): 64}
# (compute capability, dtype, head_dim, dropout)
CASES = [(capability, torch.bfloat16, head_dim, False) for capability in SHARED_LIMITS for head_dim in (32, 64, 128)]
CASES += [(80, torch.float32, 64, False), (90, torch.bfloat16, 64, True), (90, torch.bfloat16, 80, False)]


def compile_kernel(name, capability, dtype, head_dim, dropout, **overrides):
    """Compile as the launcher would for contiguous stacks of 4; return (compiled kernel, its constants)."""
    kernel, block_d = KERNELS[name], max(32, triton.next_power_of_2(head_dim))
    constants = {
        "STACK": 4,
        "HEAD_DIM": head_dim,
        "BLOCK_D": block_d,
        "DROPOUT": dropout,
        "NEGATE": False,
        "PRECISION": "ieee",
        "enable_fp_fusion": True,
        **backend.config(name, capability, dtype, block_d, dropout),
        **overrides,
    }
    if not dropout:
        constants["seed"] = None
    options = {option: constants.pop(option) for option in OPTIONS}
    constants = {argument: value for argument, value in constants.items() if argument in kernel.arg_names}
    signature = {argument: _type_of(argument, constants, DTYPES[dtype]) for argument in kernel.arg_names}
    attributes = {
        (position,): [["tt.divisibility", 16]]
        for position, (argument, type_) in enumerate(signature.items())
        if type_.startswith("*") or argument.startswith("stride_")
    }
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options), {**constants, **options}


def _type_of(argument, constants, element):
    if argument in constants:
        return "constexpr"
    if argument in ("words", "entities", "out", "dout_words", "dout_entities", "dwords", "dentities"):
        return f"*{element}"
    types = {"lse": "*fp32", "statistics": "*fp32", "seed": "*i64", "scale": "fp32", "keep_scale": "fp32"}
    return types.get(argument, "*i32" if argument.endswith(("_offsets", "_lengths")) else "i32")


def disassemble(cubin, option):
    """Return what cuobjdump prints of a cubin."""
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([cuobjdump, option, file.name], capture_output=True, text=True, check=True).stdout


def resources(cubin):
    """Return (registers, bytes of stack) of the one kernel of a cubin."""
    usage = disassemble(cubin, "-res-usage")
    return tuple(int(re.search(rf"\b{what}:(\d+)", usage)[1]) for what in ("REG", "STACK"))


def loop_spills(cubin):
    """Return the most instructions on the stack of any innermost loop that multiplies."""
    code = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", disassemble(cubin, "-sass"), re.MULTILINE)
    code = [(int(address, 16), text) for address, text in code]
    jumps = [(int(m[1], 16), address) for address, text in code if (m := re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text))]
    loops = [(begin, end) for begin, end in jumps if begin <= end]
    inner = [a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    bodies = [" ".join(text for address, text in code if begin <= address <= end) for begin, end in inner]
    spills = [len(re.findall(r"\b(?:LDL|STL)\b", body)) for body in bodies if re.search(r"MMA|FFMA", body)]
    assert spills, "no loop found"
    return max(spills)


def check(name, capability, dtype, head_dim, dropout):
    compiled, constants = compile_kernel(name, capability, dtype, head_dim, dropout)
    ptx = compiled.asm["ptx"]
    registers, stack_bytes = resources(compiled.asm["cubin"])
    record = {
        "kernel": name,
        "sm": capability,
        "dtype": DTYPES[dtype],
        "head_dim": head_dim,
        "dropout": dropout,
        **{k: constants[k] for k in ("BLOCK_M", "BLOCK_N", "TAIL", *OPTIONS[:3])},
        "registers": registers,
        "stack_bytes": stack_bytes,
        "loop_spills": loop_spills(compiled.asm["cubin"]),
        "shared_bytes": compiled.metadata.shared,
        "triton": triton.__version__,
    }
    print(json.dumps(record), flush=True)
    assert compiled.metadata.shared <= SHARED_LIMITS[capability], record
    spills_allowed = SPILLS_ALLOWED.get((name, capability), SPILL_LIMIT)
    assert record["loop_spills"] <= spills_allowed, f"registers spill: {record}"
    if dtype != torch.float32:
        assert re.search(TENSOR_CORES[capability], ptx), f"no tensor-core instruction: {record}"
    if name == "bwd_dkdv" and capability == 90:
        # It marks the transpose of a dot's result, which gives wrong gradients in Triton 3.4 to 3.7.0.
        assert "stmatrix" not in ptx, record


if __name__ == "__main__":
    for case in CASES:
        if case[0] == int(sys.argv[1]):
            for name in KERNELS:
                check(name, *case)
