"""The build's errors: one clear sentence each. The build itself is what `make test` installs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1]
pytest.importorskip("setuptools", minversion="77", reason="setup.py needs setuptools 77")


FAILING = """case "$*" in
*--version*) echo Cuda compilation tools, release 13.0 ;;
*--list-gpu-arch*) echo compute_80 ;;
*--dryrun*) echo '#$ TOP=/nowhere' >&2 ;;
*) echo unsupported GNU version >&2; exit 1 ;;
esac"""


def _program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"PATH": "", "CXX": ""},
            "luke_kernels needs a C++17 compiler to build, found none of $CXX, c++, g++, clang++",
        ),
        ({"LUKE_KERNELS_CUDA": "yes"}, "LUKE_KERNELS_CUDA must be auto, 0 or 1, got 'yes'"),
        (
            {"LUKE_KERNELS_CUDA": "1", "CUDA_HOME": "", "CUDA_PATH": "", "PATH": "COMPILERS"},
            "LUKE_KERNELS_CUDA=1 must find nvcc, got none in $CUDA_HOME/bin, $CUDA_PATH/bin or PATH",
        ),
        ({"CUDA_HOME": "OLD"}, "nvcc must be of CUDA 12.0 or later, got release 11.2 from "),
        (
            {"CUDA_HOME": "FAILING"},
            "FAILING/bin/nvcc must compile with g++ for 80+PTX, got: unsupported GNU version; CXX names another",
        ),
        (
            {"CUDA_HOME": "FAILING", "LUKE_KERNELS_CUDA_ARCHS": "80 90 90a"},
            "LUKE_KERNELS_CUDA_ARCHS must list 90 or 90a, not both, got '80 90 90a'",
        ),
        (
            {"CUDA_HOME": "FAILING", "LUKE_KERNELS_CUDA_ARCHS": "75;80"},
            "LUKE_KERNELS_CUDA_ARCHS must list architectures from 80 on, as in '80 86 89 90a 100 120+PTX', got '75'",
        ),
    ],
)
def test_a_build_that_cannot_be_says_why(environment, message, tmp_path):
    defaults = {"CXX": "g++", "NVCC_CCBIN": "", "LUKE_KERNELS_CUDA": "auto", "LUKE_KERNELS_CUDA_ARCHS": ""}
    environment = defaults | environment
    places = {
        "COMPILERS": _program(tmp_path / "bin" / "g++", "exit 0").parent,
        "OLD": _program(tmp_path / "OLD" / "bin" / "nvcc", "echo Cuda compilation tools, release 11.2").parents[1],
        "FAILING": _program(tmp_path / "FAILING" / "bin" / "nvcc", FAILING).parents[1],
    }
    environment = {name: str(places.get(value, value)) for name, value in environment.items()}
    result = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", tmp_path, "--build-temp", tmp_path],
        cwd=SOURCE,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode != 0
    *_, error = result.stderr.split("error: ")
    assert message in error
    assert "Traceback" not in result.stderr
