"""Tiles that tune() timed on this machine's GPUs, kept between processes for the Triton backend."""

import functools
import hashlib
import json
import os
import re
import tempfile
import warnings
from collections.abc import Mapping
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
    path = path_of(device)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        tiles = {Key(**entry["key"]): {name: entry["tile"][name] for name in TILE_FIELDS} for entry in found["tiles"]}
        then, now = found["fingerprint"], fingerprint(device)
        if then != now:
            of = ", ".join(f"{name} {then.get(name)}" for name in now if then.get(name) != now[name])
            warnings.warn(f"the tuned tiles in {path} are of {of}: ignored (luke-kernels tune)", stacklevel=2)
            return {}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        warnings.warn(f"{path} must hold tuned tiles, got {error!r}: ignored (luke-kernels tune)", stacklevel=2)
        return {}
    return tiles


def save(device: torch.device, tiles: Mapping[Key, Tile]) -> Path:
    """Write the tiles of a GPU, all of them, in place of what was there."""
    path = path_of(device)
    entries = [{"key": key._asdict(), "tile": tile} for key, tile in sorted(tiles.items())]
    path.parent.mkdir(parents=True, exist_ok=True)
    # Aside first: another process may be reading.
    with tempfile.NamedTemporaryFile("w", dir=path.parent, encoding="utf-8", delete=False) as file:
        json.dump({"fingerprint": fingerprint(device), "tiles": entries}, file, indent=1)
    os.replace(file.name, path)
    return path


def _gpu(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
