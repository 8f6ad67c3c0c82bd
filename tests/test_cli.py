"""The command line: what doctor and demo print, and how errors look."""

import sys

import pytest
import torch
from typer.testing import CliRunner

from luke_kernels import __version__, cli, demo, selfcheck

RUNNER = CliRunner()


@pytest.fixture(autouse=True)
def _without_the_interpreter(monkeypatch):
    """Users do not run it, and it is slow."""
    from luke_kernels.ops import backends

    for name in [name for name in backends.TABLE if name == "triton" and backends.INTERPRETING]:
        monkeypatch.delitem(backends.TABLE, name)


def test_doctor():
    result = RUNNER.invoke(cli.app, ["doctor"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert f"luke_kernels  {__version__}" in result.output
    for backend in ("reference", "sdpa", "cpu"):
        assert f"{backend} " in result.output
    assert "right" in result.output
    assert "WRONG" not in result.output


def test_doctor_finds_a_wrong_backend(monkeypatch):
    from luke_kernels.ops.backends import sdpa

    right = sdpa.forward

    def wrong(*arguments):
        out, lse = right(*arguments)
        return out * 1.01, lse

    monkeypatch.setattr(sdpa, "forward", wrong)
    assert not all(check.passed for check in selfcheck.check_backend("sdpa"))
    result = RUNNER.invoke(cli.app, ["doctor"], env={"COLUMNS": "200"})
    assert result.exit_code == 1
    assert "WRONG" in result.output


def test_version():
    result = RUNNER.invoke(cli.app, ["--version"])
    assert (result.exit_code, result.output) == (0, f"{__version__}\n")


def test_a_nan_does_not_pass():
    assert not selfcheck.Check("cpu", torch.float32, float("nan"), 1e-6, 0.1).passed


def test_demo():
    result = RUNNER.invoke(cli.app, ["demo"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "20 sentences, 287 words, 64 entities" in result.output
    for backend in ("reference", "sdpa", "cpu"):
        assert f"{backend} " in result.output


def test_spans_of_the_sentences_are_mentions():
    for sentence in demo.sentences():
        for entity in sentence["entities"]:
            mention = sentence["text"][entity["start"] : entity["end"]]
            assert mention == mention.strip() != ""
            assert sentence["text"][: entity["start"]] == "" or not sentence["text"][entity["start"] - 1].isalnum()


def test_errors_are_one_line_and_code_2(monkeypatch, capsys):
    def fail(console):
        raise ValueError("batch must be positive, got 0")

    monkeypatch.setattr(demo, "run", fail)
    monkeypatch.setattr(sys, "argv", ["luke-kernels", "demo"])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    assert exit.value.code == 2
    assert capsys.readouterr().err == "error: batch must be positive, got 0\n"
    monkeypatch.setattr(sys, "argv", ["luke-kernels", "--debug", "demo"])
    with pytest.raises(ValueError):
        cli.main()
