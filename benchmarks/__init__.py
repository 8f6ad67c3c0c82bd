"""Benchmarks of luke_kernels: `python -m benchmarks --help`."""

import os
from pathlib import Path

# Records are of the built-in tiles, whatever tune() kept on this machine: a folder that is never there.
os.environ["LUKE_KERNELS_CACHE"] = str(Path(__file__).parents[1] / "build" / "no-tuned-tiles")
