"""What every test rests on: Triton's interpreter where there is no GPU, NaN in fresh memory, budgets a room."""

import os
import sys
import tempfile
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # Read when the kernels are first imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Tiles that tune() kept on this machine stay out of the tests.
os.environ["LUKE_KERNELS_CACHE"] = str(Path(tempfile.gettempdir()) / "luke-kernels-tests" / "no-tuned-tiles")

# Without it cuBLAS warns where deterministic algorithms are asked for.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import luke_kernels

REPOSITORY = Path(__file__).parents[1]
# At the end: tests must see the installed package, not the source tree.
sys.path.append(str(REPOSITORY))

# Seconds a room may take on 2 cores.
BUDGETS_S = {"model": 250, "tools": 200, "benchmarks": 150, "triton": 400, "cpu": 180, "cuda": 300, "op": 400}
TOOL_FILES = ("accelerate", "cli", "convert", "demo", "encode", "readme")
MODEL_FILES = ("model", "heads", "config", "checkpoint", "sources", "tokenizer", "packing", "train_bpe", "parity/")
MODEL_FILES += ("inference", "losses", "export")


def _room(test: str) -> str:
    """Return the room of a test by its id: the first whose word it holds."""
    if test.startswith("tests/ops/"):
        rooms = {"triton": "triton", "cuda-emulated": "cuda", "test_cuda": "cuda", "cpu": "cpu"}
        return next((room for word, room in rooms.items() if word in test), "op")
    path = test.split("::")[0]
    rooms = {"benchmarks": ("benchmarks/",), "tools": TOOL_FILES, "model": MODEL_FILES}
    return next((room for room, files in rooms.items() if any(name in path for name in files)), "op")


def pytest_configure(config: pytest.Config) -> None:
    installed = Path(luke_kernels.__file__).parent != REPOSITORY / "luke_kernels"
    if os.environ.get("LUKE_KERNELS_TEST_INSTALLED") == "1" and not installed:
        raise pytest.UsageError(f"tests must run on the installed package, got {luke_kernels.__file__}")
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a GPU that torch can see"))


@pytest.fixture(autouse=True)
def _device(request):
    """Tests marked gpu make their tensors there."""
    if "gpu" in request.keywords:
        torch.set_default_device("cuda")
        yield
        torch.set_default_device(None)
    else:
        yield


@pytest.fixture(autouse=True)
def _deterministic():
    """Seed, and fill what torch.empty returns with NaN, so that a row no kernel wrote shows."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def _seconds_by_room(config: pytest.Config) -> dict[str, float]:
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    reports = [r for rs in reporter.stats.values() for r in rs if isinstance(r, pytest.TestReport)] if reporter else []
    spent = dict.fromkeys(BUDGETS_S, 0.0)
    for report in reports:
        spent[_room(report.nodeid)] += report.duration / (config.getoption("numprocesses", None) or 1)
    return spent


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    over = any(seconds > BUDGETS_S[room] for room, seconds in _seconds_by_room(session.config).items())
    # A room is too slow: mend it. Runs that ask for the slow tests may take their time, and machines that are shared.
    if (
        over
        and os.environ.get("CI")
        and "not slow" in session.config.getoption("markexpr")
        and session.exitstatus == pytest.ExitCode.OK
    ):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    for room, seconds in _seconds_by_room(config).items():
        over = ", OVER ITS BUDGET" if seconds > BUDGETS_S[room] else ""
        terminalreporter.write_line(f"room {room}: {seconds:.0f} s of {BUDGETS_S[room]} s{over}")


@pytest.fixture
def masked_lm():
    """The weights of a small LukeForMaskedLM, by the names of checkpoints."""
    from checkpoint_cases import weights_of

    return weights_of(luke_kernels.LukeForMaskedLM)


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The only place where temporary files may lie."""
    directory = tmp_path / "temporary"
    directory.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(directory))
    return directory
