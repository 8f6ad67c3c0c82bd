"""The CUDA kernels emulated on the CPU (tests/cpp): built once, put in the place of luke_kernels._C."""

import dataclasses
import fcntl
import functools
import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType

import pytest

from luke_kernels.ops import backends

REPOSITORY = Path(__file__).parents[1]
SOURCES = ("tests/cpp/emulated.cpp", "csrc/cuda/attention.cpp", "csrc/bindings.cpp")


@functools.cache
def core() -> ModuleType:
    """Build the emulator, unless it was from the same sources, and import it."""
    pybind11 = pytest.importorskip("pybind11", reason="pybind11 is not installed")
    compiler = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"{compiler[0]} is not installed")
    return load(build(REPOSITORY, [*compiler, f"-I{pybind11.get_include()}"]))


def build(root: Path, compiler: list[str]) -> Path:
    """Compile the emulator from the sources under `root`."""
    include = sysconfig.get_paths()["include"]
    options = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-DLUKE_EMULATOR", "-DLUKE_CUDA", f"-I{include}"]
    # Fibers jump from stack to stack, which fortified longjmp refuses.
    command = [*compiler, *options, f"-I{root / 'tests/cpp'}", "-U_FORTIFY_SOURCE"]
    texts = [path.read_bytes() for folder in ("csrc", "tests/cpp") for path in sorted((root / folder).rglob("*.*"))]
    digest = hashlib.sha256(b"\0".join([*texts, repr(command).encode()])).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / "luke-kernels-tests" / f"emulator-{digest}"
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / "_C.so"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            objects = [folder / f"{Path(source).stem}.o" for source in SOURCES]
            started = [
                subprocess.Popen([*command, "-c", root / source, "-o", each])
                for source, each in zip(SOURCES, objects, strict=True)
            ]
            for process in started:
                if process.wait():
                    raise subprocess.CalledProcessError(process.returncode, process.args)
            draft = target.with_suffix(".draft")
            subprocess.run([*command, "-shared", *objects, "-o", draft], check=True)
            draft.rename(target)
    return target


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("_C", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def emulate(monkeypatch: pytest.MonkeyPatch, module: ModuleType | None = None) -> None:
    """Let the backend `cuda` run in the emulator, on tensors of the CPU."""
    pytest.importorskip("luke_kernels._C", reason="luke_kernels._C is not built")
    support = dataclasses.replace(backends.TABLE["cuda"], devices=("cpu",), missing=lambda device: None)
    monkeypatch.setitem(backends.TABLE, "cuda", support)
    monkeypatch.setattr("luke_kernels.ops.backends.cuda._C", module or core())
