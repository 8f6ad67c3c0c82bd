"""What this machine has, which backends run on it, and whether they are right."""

import importlib.metadata
import os
import platform
import shutil
import subprocess

import torch
from rich.console import Console
from rich.table import Table

from luke_kernels.ops.backends import TABLE
from luke_kernels.selfcheck import check_backend
from luke_kernels.version import __version__


def facts() -> dict[str, str]:
    """Return versions and hardware, a line each."""
    found = {
        "luke_kernels": __version__,
        "Python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
        "triton": _version("triton"),
        "transformers": _of_accelerate(_version("transformers")),
        "compiler": _first_line(os.environ.get("CXX", "c++"), "--version"),
        "nvcc": _last_line("nvcc", "--version"),
        "CPU": f"{os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
        "GPU": "none that torch can see",
    }
    if TABLE["cpu"].missing(None) is None:
        from luke_kernels.ops.backends import cpu

        threads = "with OpenMP" if cpu._C.has_openmp() else "without OpenMP: one thread"
        cuda = f"CUDA for {cpu._C.cuda_architectures()}" if hasattr(cpu._C, "cuda_architectures") else "no CUDA"
        found["csrc"] = f"built {threads}; {cpu._C.cpu_isa()} kernels; {cuda}"
    if torch.cuda.is_available():
        capability = ".".join(map(str, torch.cuda.get_device_capability()))
        found["GPU"] = f"{torch.cuda.get_device_name()}, sm_{capability}, CUDA {torch.version.cuda}"
        found["driver"] = _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return found


def examine(console: Console) -> bool:
    """Print the facts, each backend with its reason, and the check of each that runs. Return whether all are right."""
    for name, fact in facts().items():
        console.print(f"[bold]{name:13}[/bold] {fact}", highlight=False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    table = Table(title="Backends, checked forward and backward against the reference in float64")
    for column in ("backend", "dtype", "largest error", "reference's own", "time", "verdict"):
        table.add_column(column, justify="left" if column in ("backend", "verdict") else "right")
    healthy, off = True, {}
    for name, support in TABLE.items():
        where = device if support.devices is None or device in support.devices else support.devices[0]
        if (reason := support.missing(torch.device(where))) is not None:
            off[name] = reason
            continue
        for check in check_backend(name, where):
            healthy &= check.passed
            table.add_row(
                name,
                f"{where} {str(check.dtype).removeprefix('torch.')}",
                f"{check.error:.1e}",
                f"{check.reference_error:.1e}",
                f"{check.seconds * 1000:.0f} ms",
                "[green]right[/green]" if check.passed else "[red]WRONG[/red]",
            )
    console.print(table)
    for name, reason in off.items():
        console.print(f"{name}: off, {reason}", highlight=False)
    return healthy


def _of_accelerate(version: str) -> str:
    if version[0].isdigit() and tuple(map(int, version.split(".")[:2])) >= (4, 57):
        return version
    return f"{version}; accelerate needs 4.57 or later (pip install 'transformers>=4.57')"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _output(*command: str) -> list[str]:
    if shutil.which(command[0]) is None:
        return ["not found"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip().splitlines() or ["no answer"]


def _first_line(*command: str) -> str:
    return _output(*command)[0]


def _last_line(*command: str) -> str:
    return _output(*command)[-1]
