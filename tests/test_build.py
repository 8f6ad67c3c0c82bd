"""The build's errors: one clear sentence each. The build itself is what `make test` installs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1]
pytest.importorskip("setuptools", minversion="77", reason="setup.py needs setuptools 77")


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"PATH": "", "CXX": ""},
            "luke_kernels needs a C++17 compiler to build, found none of $CXX, c++, g++, clang++",
        ),
        ({"LUKE_KERNELS_CUDA": "yes"}, "LUKE_KERNELS_CUDA must be auto, 0 or 1, got 'yes'"),
        ({"LUKE_KERNELS_CUDA": "1"}, "LUKE_KERNELS_CUDA=1 must find nvcc and CUDA sources, got"),
    ],
)
def test_a_build_that_cannot_be_says_why(environment, message, tmp_path):
    result = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", tmp_path, "--build-temp", tmp_path],
        cwd=SOURCE,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode != 0
    assert f"error: {message}" in result.stderr
    assert "Traceback" not in result.stderr
