"""What each backend supports, as data; and the choice among them. A backend asked for by name never falls back."""

import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

FLOAT64, FLOAT32, BFLOAT16, FLOAT16 = torch.float64, torch.float32, torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Support:
    """What a backend can take.

    `missing` says why the backend cannot run at all on a device, or anywhere on this machine, or None.
    """

    module: str
    dtypes: tuple[torch.dtype, ...]
    devices: tuple[str, ...] | None = None
    max_head_dim: int | None = None
    missing: Callable[[torch.device | None], str | None] = lambda device: None


# Found out here and not on demand: torch.compile traces the choice of a backend, but no imports.
_CPU_ISA = _CUDA_ARCHITECTURES = None
try:
    _core = importlib.import_module("luke_kernels._C")
    _CUDA_ARCHITECTURES = _core.cuda_architectures() if hasattr(_core, "cuda_architectures") else None
    # For tests and comparisons: the best instruction set that may be used. Otherwise the best of the machine.
    if isa := os.environ.get("LUKE_KERNELS_CPU_ISA"):
        _core.set_cpu_isa(isa)
    _CPU_ISA = _core.cpu_isa()
    _EXTENSION_MISSING = None
except ValueError as error:
    _EXTENSION_MISSING = str(error)
    warnings.warn(f"{error}: the cpu backend is off", stacklevel=2)
except ImportError as error:
    _EXTENSION_MISSING = (
        f"luke_kernels._C does not load from {Path(__file__).parents[2]} ({error}): in a source tree run `make build`, "
        "or leave it for the installed package"
    )
_CUDA_DEVICES: set[int] = set()  # those found to run the CUDA kernels
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None

# Whether Triton kernels run in its interpreter, on the CPU; Triton reads this when they are imported.
INTERPRETING = os.environ.get("TRITON_INTERPRET", "0") == "1"


def _cuda_missing(device: torch.device | None) -> str | None:
    if _CUDA_ARCHITECTURES is None:
        if _EXTENSION_MISSING is not None:
            return _EXTENSION_MISSING
        return "luke_kernels._C was built without CUDA: install it where nvcc is on PATH"
    if not torch.cuda.is_available():
        return f"no GPU that torch can see (built for {_CUDA_ARCHITECTURES})"
    # Without a device nothing is asked that would start CUDA, after which a process cannot fork.
    if device is None or device.type != "cuda":
        return None
    return _device_missing(torch.cuda.current_device() if device.index is None else device.index)


def _device_missing(index: int) -> str | None:
    if index not in _CUDA_DEVICES and (reason := _core.cuda_missing(index)):
        return reason
    _CUDA_DEVICES.add(index)
    return None


# torch.compile takes the answer as it is; it would trace into the function, and stop at the extension. The decorator
# torch.compiler.assume_constant_result does this, but imports all of dynamo: as long as it takes to import torch.
_device_missing._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _triton_missing(device: torch.device | None) -> str | None:
    if not _TRITON_INSTALLED:
        return "triton is not installed (pip install triton)"
    if INTERPRETING:
        return None
    if torch.version.hip is not None:
        return f"tiles are for CUDA, got ROCm {torch.version.hip}"
    if torch.cuda.is_available():
        return None
    return "no GPU that torch can see (TRITON_INTERPRET=1 runs the kernels in Triton's interpreter)"


TABLE: dict[str, Support] = {
    "reference": Support("luke_kernels.ops.reference", (FLOAT64, FLOAT32, BFLOAT16, FLOAT16)),
    "sdpa": Support("luke_kernels.ops.backends.sdpa", (FLOAT64, FLOAT32, BFLOAT16, FLOAT16)),
    "cpu": Support(
        "luke_kernels.ops.backends.cpu",
        (FLOAT64, FLOAT32, BFLOAT16, FLOAT16),
        devices=("cpu",),
        max_head_dim=256,
        missing=lambda device: _EXTENSION_MISSING,
    ),
    "triton": Support(
        "luke_kernels.ops.backends.triton",
        # The interpreter multiplies the bit patterns of bfloat16.
        (FLOAT32, FLOAT16) if INTERPRETING else (FLOAT32, BFLOAT16, FLOAT16),
        devices=("cpu",) if INTERPRETING else ("cuda",),
        max_head_dim=128,
        missing=_triton_missing,
    ),
    "cuda": Support(
        "luke_kernels.ops.backends.cuda",
        (FLOAT32, BFLOAT16, FLOAT16),
        devices=("cuda",),
        max_head_dim=128,
        missing=_cuda_missing,
    ),
}
# Fastest first, by device and whether there is dropout. The reference is a specification and is never chosen. Without
# dropout torch's kernel beats our portable ones, which know no instructions beyond the compiler's default.
PREFERENCE: Mapping[tuple[str, bool], tuple[str, ...]] = {
    ("cpu", False): ("sdpa", "cpu") if _CPU_ISA == "portable" else ("cpu", "sdpa"),
    ("cpu", True): ("cpu", "sdpa"),  # sdpa draws the mask in PyTorch
    ("cuda", False): ("triton", "sdpa"),
    ("cuda", True): ("triton", "sdpa"),
}


def check_name(name: str) -> None:
    """Raise unless `name` is "auto" or a backend's.

    Raises:
        TypeError: it is no string.
        ValueError: it is no backend.
    """
    if not isinstance(name, str):
        raise TypeError(f"backend must be a string, got {type(name).__name__}")
    if name != "auto" and name not in TABLE:
        raise ValueError(f"backend must be one of {', '.join(('auto', *TABLE))}, got {name!r}")


def reason_against(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Return why backend `name` cannot serve such tensors here, or None where it can."""
    support = TABLE[name]
    if (missing := support.missing(device)) is not None:
        return missing
    if support.devices is not None and device.type not in support.devices:
        return f"runs on {' or '.join(support.devices)} tensors, got {device.type}"
    if dtype not in support.dtypes:
        return f"takes {', '.join(_short(d) for d in support.dtypes)}, got {_short(dtype)}"
    if support.max_head_dim is not None and head_dim > support.max_head_dim:
        return f"takes head_dim up to {support.max_head_dim}, got {head_dim}"
    return None


def cpu_kernels_missing() -> str | None:
    """Return why there are no C++ kernels that beat PyTorch's on this CPU, or None where there are."""
    if _CPU_ISA == "portable":
        return "those of a CPU without AVX2 and AVX-512, which PyTorch's beat"
    return _EXTENSION_MISSING


def choose(name: str, device: torch.device, dtype: torch.dtype, head_dim: int, dropout: bool = False) -> str:
    """Return the backend to run: `name` itself, or for "auto" the first of PREFERENCE that can.

    Raises:
        TypeError, ValueError: `name` is no backend.
        NotImplementedError: no backend asked for can; the message holds a reason for each.
    """
    check_name(name)
    candidates = PREFERENCE.get((device.type, dropout), ("sdpa",)) if name == "auto" else (name,)
    reasons = {}
    for candidate in candidates:
        reason = reason_against(candidate, device, dtype, head_dim)
        if reason is None:
            return candidate
        reasons[candidate] = reason
    raise NotImplementedError(
        f"backend must support the tensors given, got {name!r}: " + "; ".join(f"{k}: {v}" for k, v in reasons.items())
    )


def load(name: str) -> ModuleType:
    """Import the module of a backend: functions `forward` and `backward`."""
    return importlib.import_module(TABLE[name].module)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
