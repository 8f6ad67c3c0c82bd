"""Tiles that tune() timed on this machine's GPUs, kept between processes for the Triton backend."""

import contextlib
import functools
import hashlib
import json
import os
import re
import warnings
from pathlib import Path
from typing import NamedTuple

import torch

Tile = dict[str, int | None]
TILE_FIELDS = ("BLOCK_M", "BLOCK_N", "TAIL", "num_warps", "num_stages", "maxnreg")


class Key(NamedTuple):
    """What a tile is for: "fwd", "bwd_dq" or "bwd_dkdv"; the padded head_dim; whether the grid is small."""

    kernel: str
    dtype: str
    block_d: int
    dropout: bool
    small: bool


def cache_folder() -> Path:
    """Return $LUKE_KERNELS_CACHE, or luke_kernels in the user's cache folder."""
    if folder := os.environ.get("LUKE_KERNELS_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "luke_kernels"


def path_of(device: torch.device) -> Path:
    return cache_folder() / f"triton-{re.sub('[^a-z0-9]+', '-', _gpu(device).lower())}.json"


def fingerprint(device: torch.device) -> dict[str, str]:
    """Return what tiles were timed with: with anything else they may be wrong, or slow."""
    import triton

    source = Path(__file__).parent / "backends" / "triton.py"
    return {
        "gpu": _gpu(device),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "kernels": hashlib.sha256(source.read_bytes()).hexdigest()[:16],
    }


@functools.cache
def load(device: torch.device) -> dict[Key, Tile]:
    """Return the tiles kept for a GPU. A file that is stale or damaged is ignored, with one warning."""
    try:
        path = path_of(device)
    except RuntimeError:  # no home
        return {}
    try:
        tiles, then = _read(path)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        warnings.warn(f"{path} must hold tuned tiles, got {error!r}: ignored (luke-kernels tune)", stacklevel=2)
        return {}
    now = fingerprint(device)
    if then != now:
        of = ", ".join(f"{name} {then.get(name)}" for name in now if then.get(name) != now[name])
        warnings.warn(f"the tuned tiles in {path} are of {of}: ignored (luke-kernels tune)", stacklevel=2)
        return {}
    return tiles


def keep(device: torch.device, key: Key, tile: Tile) -> Path:
    """Set a tile of a GPU, for this process and in the file, whose other tiles stay unless they are stale."""
    load(device)[key] = tile
    path = path_of(device)
    tiles: dict[Key, Tile] = {}
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
        # Anew: other processes may have kept some.
        found, then = _read(path)
        tiles = found if then == fingerprint(device) else {}
    tiles[key] = tile
    entries = [{"key": key._asdict(), "tile": tile} for key, tile in sorted(tiles.items())]
    path.parent.mkdir(parents=True, exist_ok=True)
    # Aside first: another process may be reading.
    aside = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        aside.write_text(json.dumps({"fingerprint": fingerprint(device), "tiles": entries}, indent=1), encoding="utf-8")
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    return path


def _read(path: Path) -> tuple[dict[Key, Tile], dict[str, str]]:
    found = json.loads(path.read_text(encoding="utf-8"))
    tiles = {Key(**entry["key"]): {name: entry["tile"][name] for name in TILE_FIELDS} for entry in found["tiles"]}
    for name, value in (field for tile in tiles.values() for field in tile.items()):
        if name == "maxnreg" and value is None:
            continue
        least = 16 if name in ("BLOCK_M", "BLOCK_N", "TAIL") else 1
        if (
            type(value) is not int
            or value < least
            or (name not in ("num_stages", "maxnreg") and value.bit_count() != 1)
        ):
            raise ValueError(f"{name} {value!r}")
    return tiles, dict(found["fingerprint"])


def _gpu(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
