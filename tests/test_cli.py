"""The command line: what doctor prints, and how errors look."""

import inspect
import math
import os
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from luke_kernels import __version__, cli, demo, selfcheck, vector_files
from luke_kernels.vector_files import Counts, encode_file

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
    right = [torch.zeros(2, dtype=torch.float64)] * 3
    for place in range(3):
        results = [*right[:place], torch.tensor([0, torch.nan]), *right[place + 1 :]]
        assert math.isnan(selfcheck._distance(results, right))


@pytest.fixture
def run(monkeypatch, capsys):
    """Run `main`: exit code and what stands on stderr; a command given fails with an error given."""

    def call(*arguments, error=None):
        def fail(*_):
            raise error

        monkeypatch.setattr(demo, "run", fail)
        monkeypatch.setattr(sys, "argv", ["luke-kernels", *arguments])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        return exit.value.code, capsys.readouterr().err

    return call


@pytest.mark.parametrize("kind", [ValueError, TypeError, NotImplementedError, RuntimeError, OSError])
def test_errors_have_no_traceback_and_code_2(run, kind):
    assert run("demo", error=kind("batch must be positive, got 0")) == (2, "error: batch must be positive, got 0\n")
    assert run("demo", error=kind("one\ntwo")) == (2, "error: one\ntwo\n")


@pytest.mark.parametrize("arguments", [["--debug", "demo"], ["demo", "--debug"]])
def test_debug_shows_the_traceback(run, arguments):
    with pytest.raises(ValueError, match="batch"):
        run(*arguments, error=ValueError("batch"))


def test_a_bug_shows_its_traceback(run):
    with pytest.raises(KeyError):
        run("demo", error=KeyError("batch"))


def test_ctrl_c(run, monkeypatch):
    assert run("demo", error=KeyboardInterrupt()) == (130, "")

    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "app", interrupted)  # outside of a command
    assert run("demo") == (130, "")


@pytest.mark.parametrize("arguments", [["nothing"], ["demo", "--nothing"], ["encode", "texts.jsonl"]])
def test_usage_errors(run, arguments):
    code, message = run(*arguments)
    assert code == 2
    assert "Usage:" in message
    assert "Traceback" not in message


@pytest.mark.parametrize("command", ["--version", "doctor"])
def test_a_broken_pipe_is_quiet(command):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as pipe:
        command = [sys.executable, "-m", "luke_kernels.cli", command]
        result = subprocess.run(
            command, stdout=pipe, stderr=subprocess.PIPE, env={**os.environ, "TRITON_INTERPRET": ""}
        )
    assert result.stderr == b""


def test_encode(run, monkeypatch):
    calls = []

    def spy(*texts, **options):
        calls.append((texts, options))
        return counts

    monkeypatch.setattr(vector_files, "encode_file", spy)
    counts = Counts(texts=3, words=20, entities=4, seconds=0.5)
    printed = "encoded 3 texts: 20 words, 4 entities; 0.5 s, 6.0 texts/s\n"
    assert run("encode", "texts.jsonl", "vectors", "--model", "luke") == (0, printed)
    counts = Counts(cut=1, dropped=2, found=5, seconds=0.5)
    printed = "encoded 0 texts: 0 words, 0 entities; 1 texts cut, 2 entities dropped; 5 texts were there; 0.5 s\n"
    assert run(
        *["encode", "-", "vectors.jsonl", "--model", "luke", "--tokenizer", "roberta", "--layer", "-2"],
        *[
            "--max-tokens",
            "9",
            "--device",
            "cpu",
            "--dtype",
            "bfloat16",
            "--truncation",
            "--shard-size",
            "7",
            "--resume",
        ],
    ) == (0, printed)
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(encode_file).parameters.items()
        if parameter.kind == parameter.KEYWORD_ONLY
    }
    assert calls == [
        (("texts.jsonl", "vectors", "luke", None), defaults),
        (
            ("-", "vectors.jsonl", "luke", "roberta"),
            {
                "layer": -2,
                "max_tokens": 9,
                "device": "cpu",
                "dtype": torch.bfloat16,
                "truncation": True,
                "shard_size": 7,
                "resume": True,
            },
        ),
    ]


def test_encode_interrupted(run, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(vector_files, "encode_file", interrupted)
    message = "interrupted; run the same command with --resume to continue\n"
    assert run("encode", "texts.jsonl", "vectors", "--model", "luke") == (130, message)


@pytest.mark.parametrize("command", [["convert", "luke", "out"], ["encode", "texts.jsonl", "out", "--model", "luke"]])
@pytest.mark.parametrize("name", ["load", "float8_e4m3fn", "int64", "nothing"])
def test_dtypes_are_known_by_name(run, command, name):
    message = f"error: dtype must be one of float16, bfloat16, float32, got '{name}'\n"
    assert run(*command, "--dtype", name) == (2, message)
