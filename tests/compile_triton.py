"""Compile every Triton kernel for a chip that need not be here, and check what the compiler made of it.

    python tests/compile_triton.py 90 halves     one JSON line a kernel: registers, spills, bytes of shared memory; of
                                                 halves, dropout and float32, or some of them
    python tests/compile_triton.py --write       docs/triton-configurations.md: every chip, all of them

Without TRITON_INTERPRET; test_triton.py runs it under each Triton it can find. The page is of Triton 3.6.0.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

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


class Chip(NamedTuple):
    """What a multiprocessor has, by compute capability (CUDA C++ Programming Guide); and its tensor-core instructions.

    All have 65,536 registers, which warps get by 256; a block takes 1 KB of shared memory besides its own.
    """

    block_shared_bytes: int
    shared_bytes: int
    threads: int
    blocks: int
    products: str


CHIPS = {
    80: Chip(163 * 1024, 164 * 1024, 2048, 32, r"\bmma\.sync"),
    86: Chip(99 * 1024, 100 * 1024, 1536, 16, r"\bmma\.sync"),
    90: Chip(227 * 1024, 228 * 1024, 2048, 32, r"\bwgmma\.mma_async"),
    100: Chip(227 * 1024, 228 * 1024, 2048, 32, r"\btcgen05\.mma|\bmma\.sync"),
    120: Chip(99 * 1024, 100 * 1024, 1536, 24, r"\bmma\.sync"),
}
PAGE = Path(__file__).parents[1] / "docs" / "triton-configurations.md"
OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")
# Instructions that spill or reload a register in a loop with products, where they are allowed: (kernel, compute
# capability, head_dim, dropout). Outside of such loops a program does it once.
SPILLS_ALLOWED = {
    # Triton 3.9's; of 3.6 there are none.
    ("bwd_dkdv", 90, 32, False): 64,
    ("bwd_dkdv", 90, 128, False): 64,
    ("bwd_dkdv", 90, 80, False): 64,
    ("bwd_dq", 80, 128, True): 2,
    ("bwd_dkdv", 80, 64, True): 2,
    ("bwd_dkdv", 86, 64, True): 8,
}
HEAD_DIMS = (32, 64, 128)
# (dtype, head_dim, dropout): every tile there is, and a head that is padded. Float32 has the same with dropout.
CASES = {
    "halves": [(torch.bfloat16, head_dim, False) for head_dim in (*HEAD_DIMS, 80)],
    "dropout": [(torch.bfloat16, head_dim, True) for head_dim in HEAD_DIMS],
    "float32": [(torch.float32, head_dim, False) for head_dim in HEAD_DIMS],
}


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


def blocks_of_multiprocessor(chip, registers, num_warps, shared_bytes):
    """Return how many blocks of a kernel a multiprocessor holds at a time."""
    of_registers = 65536 // (-(-registers * 32 // 256) * 256 * num_warps)
    of_threads = chip.threads // (32 * num_warps)
    return min(of_registers, of_threads, chip.blocks, chip.shared_bytes // (shared_bytes + 1024))


def row(record):
    """Return a record as a row of the page."""
    tile = "{BLOCK_M}x{BLOCK_N}, {TAIL}".format(**record)
    shared = f"{record['shared_bytes'] / 1024:.1f}"
    names = ("num_warps", "num_stages", "maxnreg", "registers", "stack_bytes", "loop_spills")
    numbers = [record[name] if record[name] is not None else "" for name in names]
    kind = record["dtype"] + (", dropout" if record["dropout"] else "")
    cells = (record["kernel"], kind, record["head_dim"], tile, *numbers, shared, record["blocks"])
    return f"| {' | '.join(map(str, cells))} |"


HEADER = """# What the Triton kernels compile to

Written by `python tests/compile_triton.py --write` under Triton {}; no figure is typed by hand, and a test holds
that the page is not stale. [What limits the kernels](backends.md#what-limits-the-triton-kernels) is another question.

- tile: rows x keys of a block, and of the blocks after the last whole one
- cap: the most registers a thread may get, where there is a limit below 255
- stack: bytes a thread keeps in memory; in loops: instructions that touch it in a loop with products
- blocks: how many a multiprocessor holds at a time, by registers, shared memory (KiB) and threads

"""
COLUMNS = "kernel | tensors | head_dim | tile | warps | stages | cap | registers | stack | in loops | shared | blocks"


def page(records):
    """Return the page of the records of every chip."""
    lines = [HEADER.format(records[0]["triton"])]
    for capability in CHIPS:
        lines.append(f"## sm_{capability}\n\n| {COLUMNS} |\n|{' --- |' * len(COLUMNS.split('|'))}")
        lines += [row(r) for r in records if r["sm"] == capability and r["head_dim"] in HEAD_DIMS]
        lines.append("")
    return "\n".join(lines)


def check(name, capability, dtype, head_dim, dropout):
    """Compile and check a kernel; return its record."""
    compiled, constants = compile_kernel(name, capability, dtype, head_dim, dropout)
    chip, ptx, shared_bytes = CHIPS[capability], compiled.asm["ptx"], compiled.metadata.shared
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
        "shared_bytes": shared_bytes,
        "blocks": blocks_of_multiprocessor(chip, registers, constants["num_warps"], shared_bytes),
        "triton": triton.__version__,
    }
    assert shared_bytes <= chip.block_shared_bytes, record
    assert record["loop_spills"] <= SPILLS_ALLOWED.get((name, capability, head_dim, dropout), 0), (
        f"registers spill: {record}"
    )
    if dtype != torch.float32:
        assert re.search(chip.products, ptx), f"no tensor-core instruction: {record}"
    if name == "bwd_dkdv" and capability == 90:
        # It marks the transpose of a dot's result on tensor cores, which gives wrong gradients in Triton 3.4 to 3.7.0.
        assert not re.search(r"\bstmatrix" if dtype != torch.float32 else r"\bstmatrix\S*\.trans", ptx), record
    return record


def records_of(capability, kinds=tuple(CASES)):
    return [check(name, capability, *case) for kind in kinds for case in CASES[kind] for name in KERNELS]


if __name__ == "__main__":
    if sys.argv[1] == "--write":
        PAGE.write_text(page([record for capability in CHIPS for record in records_of(capability)]))
    else:
        for record in records_of(int(sys.argv[1]), sys.argv[2:]):
            print(json.dumps(record))
