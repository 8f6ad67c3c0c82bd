"""Compile every Triton kernel for chips that need not be here, and check what the compiler made of it.

Prints one JSON line a kernel: the chip, registers, bytes spilled, bytes of shared memory. Run as a script, without
TRITON_INTERPRET; test_triton.py does so under each Triton it can find.
"""

import json
import re
import subprocess
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
# Bytes of registers spilled. Some bytes move between versions of Triton; a tile too large spills thousands.
SPILL_LIMIT = 64
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
        **backend.config(name, dtype, block_d),
        **overrides,
    }
    if not dropout:
        constants["seed"] = None
    options = {option: constants.pop(option) for option in ("num_warps", "num_stages", "enable_fp_fusion")}
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
    types = {"lse": "*fp32", "delta": "*fp32", "seed": "*i64", "scale": "fp32", "keep_scale": "fp32"}
    return types.get(argument, "*i32" if argument.endswith(("_offsets", "_lengths")) else "i32")


def resources(cubin):
    """Return (registers, bytes of stack) of the one kernel of a cubin."""
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True)
    return tuple(int(re.search(rf"\b{what}:(\d+)", usage.stdout)[1]) for what in ("REG", "STACK"))


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
        **{k: constants[k] for k in ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")},
        "registers": registers,
        "stack_bytes": stack_bytes,
        "shared_bytes": compiled.metadata.shared,
        "triton": triton.__version__,
    }
    print(json.dumps(record), flush=True)
    assert compiled.metadata.shared <= SHARED_LIMITS[capability], record
    assert stack_bytes <= SPILL_LIMIT, f"registers spill: {record}"
    if dtype != torch.float32:
        assert re.search(TENSOR_CORES[capability], ptx), f"no tensor-core instruction: {record}"
    if name == "bwd_dkdv" and capability == 90:
        # It marks the transpose of a dot's result, which gives wrong gradients in Triton 3.4 to 3.7.0.
        assert "stmatrix" not in ptx, record


if __name__ == "__main__":
    for case in CASES:
        for name in KERNELS:
            check(name, *case)
