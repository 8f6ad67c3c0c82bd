"""tune(): the fastest tiles of the Triton kernels on this machine's GPU, found by timing, kept for later processes."""

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from luke_kernels.ops.backends import reason_against
from luke_kernels.ops.layout import Layout
from luke_kernels.ops.tuned import TILE_FIELDS, Key, Tile, cache_folder, keep, load, path_of
from luke_kernels.selfcheck import check_backend

# (batch, words, entities), by whether the grid is small: the first that is so on a GPU is timed.
SHAPES = {
    True: ((1, 512, 64), (1, 256, 32), (1, 128, 16), (1, 64, 8)),
    False: tuple((batch, 512, 128) for batch in (32, 64, 128, 256, 512)),
}
# Words and entities that a tile is checked on: its loops over whole blocks run a few times, of either kind.
CHECKED = 700, 300
# What must be gained over the built-in tile, more than noise.
LEAST_GAIN = 0.02
_BLOCKS = {
    "fwd": ((64, 32), (64, 64), (64, 128), (128, 32), (128, 64)),
    "bwd_dq": ((64, 32), (64, 64), (128, 32), (128, 64)),
    "bwd_dkdv": ((32, 64), (64, 64), (32, 128), (64, 128)),
}
_FLOAT32_BLOCKS = ((16, 32), (32, 16), (32, 32), (64, 32), (32, 64))


class Tuned(NamedTuple):
    """The tile chosen for a kernel, milliseconds with it and with the built-in one; how many were tried.

    The times are of the forward, or of the whole backward. `wrong` and `failed` say how many gave wrong results, or did
    not compile or fit.
    """

    key: Key
    tile: Tile
    ms: float
    built_in_ms: float
    tried: int
    wrong: int
    failed: int


def tune(
    *,
    head_dim: int = 64,
    num_heads: int = 16,
    dtype: torch.dtype = torch.bfloat16,
    dropout: bool = False,
    device: torch.device | str = "cuda",
) -> list[Tuned]:
    """Time tiles of the Triton kernels on a GPU, each checked first, and keep the fastest for this and later processes.

    They are kept in the user's cache folder (LUKE_KERNELS_CACHE names another), for this GPU, these versions of torch
    and Triton, and this source of the kernels. Takes minutes, most of them to compile.

    Args:
        head_dim: Size of a head; tiles hold for all that are padded to the same power of two.
        num_heads: Heads of the batches that are timed.
        dtype: float32, bfloat16 or float16.
        dropout: Whether the kernels draw a mask.
        device: A GPU.

    Returns:
        Six entries: three kernels, for small grids and large ones.

    Raises:
        TypeError, ValueError: an argument is not what it must be.
        OSError: the cache folder cannot be written to.
        NotImplementedError: there is no GPU, or the Triton backend cannot serve this; the message says why.
    """
    return list(tune_each(head_dim, num_heads, dtype, dropout, _gpu(device), _milliseconds))


def _gpu(device: torch.device | str) -> torch.device:
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        found = None
    if found is None or found.type != "cuda":
        raise ValueError(f"device must be a GPU, cuda or cuda:N, got {str(device)!r}")
    if not torch.cuda.is_available():
        raise NotImplementedError("tune must have a GPU, got none that torch can see")
    return found


def show(
    console: Console, head_dim: int, num_heads: int, dtype: torch.dtype, dropout: bool, device: torch.device | str
) -> None:
    """Tune, and print a line for each kernel as soon as its tile is kept."""
    device = _gpu(device)
    for tuned in tune_each(head_dim, num_heads, dtype, dropout, device, _milliseconds):
        grid = "small" if tuned.key.small else "large"
        tile = ", ".join(f"{name} {value}" for name, value in tuned.tile.items() if value is not None)
        console.print(
            f"{tuned.key.kernel:8} {grid} grid  {tuned.ms:.4f} ms (built-in {tuned.built_in_ms:.4f})  {tile}  "
            f"[{tuned.tried} tiles: {tuned.wrong} wrong, {tuned.failed} failed]",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    console.print(f"kept in {path_of(device)}", markup=False, highlight=False, soft_wrap=True)


def tune_each(
    head_dim: int,
    num_heads: int,
    dtype: torch.dtype,
    dropout: bool,
    device: torch.device,
    milliseconds: Callable[[Callable[[], object]], float],
) -> Iterator[Tuned]:
    """Yield what tune() returns, each as soon as it is kept."""
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype, got {dtype!r}")
    for name, value in (("head_dim", head_dim), ("num_heads", num_heads)):
        if not isinstance(value, int):
            raise TypeError(f"{name} must be an int, got {value!r}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if (reason := reason_against("triton", device, dtype, head_dim)) is not None:
        raise NotImplementedError(
            f"tune must be of what the triton backend takes, got {dtype}, head_dim {head_dim} on {device}: {reason}"
        )
    folder = cache_folder()
    # Before the work, not after it.
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"the cache folder must be writable (LUKE_KERNELS_CACHE names another), got {folder}")
    from luke_kernels.ops.backends import triton as backend

    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    for small, kernel in itertools.product(SHAPES, _BLOCKS):
        shape = _shape(small, num_heads, device)
        key = Key(kernel, str(dtype).removeprefix("torch."), backend.padded_head_dim(head_dim), dropout, small)
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            run = _bind(kernel, shape, num_heads, head_dim, dtype, dropout, device)
            tuned = _tune_kernel(key, run, device, head_dim, milliseconds)
        keep(device, key, tuned.tile)
        yield tuned


def _shape(small: bool, num_heads: int, device: torch.device) -> tuple[int, int, int]:
    from luke_kernels.ops.backends import triton as backend

    for batch, num_words, num_entities in SHAPES[small]:
        if backend.is_small(batch, num_words + num_entities, num_heads, device) == small:
            return batch, num_words, num_entities
    raise ValueError(f"num_heads must give a {'small' if small else 'large'} grid for some batch, got {num_heads}")


def _tune_kernel(
    key: Key,
    run: Callable[[], object],
    device: torch.device,
    head_dim: int,
    milliseconds: Callable[[Callable[[], object]], float],
) -> Tuned:
    from luke_kernels.ops.backends import triton as backend

    dtypes, dropout_p = (getattr(torch, key.dtype),), 0.1 if key.dropout else 0.0
    tiles = load(device)
    # The checks may be of a small grid where a large one is timed.
    keys = [key._replace(small=small) for small in (True, False)]
    before = {k: tiles[k] for k in keys if k in tiles}

    def time(tile: Tile) -> float | None:
        tiles.update(dict.fromkeys(keys, tile))
        checks = check_backend("triton", device, dtypes, head_dim, dropout_p, CHECKED)
        return milliseconds(run) if all(check.passed for check in checks) else None

    built_in = backend.built_in_tile(key, device)
    others = [tile for tile in candidates(key, built_in) if tile != built_in]
    times: list[tuple[float, Tile]] = []
    wrong = failed = 0
    try:
        built_in_ms = time(built_in)
        if built_in_ms is None:
            raise RuntimeError(f"the built-in tile must be right, got wrong results of {key}")
        for tile in others:
            try:
                ms = time(tile)
            except backend.failures():
                failed += 1
                continue
            if ms is None:
                wrong += 1
            else:
                times.append((ms, tile))
    finally:
        for k in keys:
            tiles.pop(k, None)
        tiles.update(before)
    ms, tile = min(times, key=lambda timed: timed[0], default=(built_in_ms, built_in))
    if ms > built_in_ms * (1 - LEAST_GAIN):
        ms, tile = built_in_ms, built_in
    return Tuned(key, tile, ms, built_in_ms, 1 + len(others), wrong, failed)


def candidates(key: Key, built_in: Tile) -> list[Tile]:
    """Return the tiles that are tried, with the tail of the built-in one."""
    tail = built_in["TAIL"]
    choices: list[tuple[int | None, ...]] = []
    if key.dtype == "float32":
        choices = [(*block, 16, warps, 2, None) for block in _FLOAT32_BLOCKS for warps in (4, 8)]
    else:
        for block, stages in itertools.product(_BLOCKS[key.kernel], (2, 3, 4)):
            choices += [(*block, tail, 4, stages, cap) for cap in (None, 128)]
            if max(block) == 128:
                choices.append((*block, tail, 8, stages, None))
    return [dict(zip(TILE_FIELDS, choice, strict=True)) for choice in choices]


def _bind(
    kernel: str,
    shape: tuple[int, int, int],
    num_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    dropout: bool,
    device: torch.device,
) -> Callable[[], object]:
    """Return a call of the direction a kernel is part of, on a dense batch."""
    from luke_kernels.ops.backends import triton as backend

    batch, num_words, num_entities = shape
    generator = torch.Generator(device).manual_seed(0)

    def draw(tokens: int, *rest: int) -> Tensor:
        return torch.randn(batch * tokens, *rest, num_heads, head_dim, generator=generator, device=device).to(dtype)

    words, entities = draw(num_words, 4), draw(num_entities, 4)
    layout = Layout(None, None, None, None, batch, num_words, num_entities, True)
    seed = torch.zeros(2, dtype=torch.int64, device=device) if dropout else None
    scale, dropout_p = head_dim**-0.5, 0.1 if dropout else 0.0
    if kernel == "fwd":
        return lambda: backend.forward(words, entities, layout, scale, dropout_p, seed)
    out, lse = backend.forward(words, entities, layout, scale, dropout_p, seed)
    douts = draw(num_words), draw(num_entities)
    return lambda: backend.backward(*douts, out, lse, words, entities, layout, scale, dropout_p, seed)


def _milliseconds(run: Callable[[], object]) -> float:
    """Return the median time of a call in a CUDA graph, where launches cost the GPU nothing."""
    from triton.testing import do_bench_cudagraph

    return do_bench_cudagraph(run, rep=30, return_mode="median")
