"""The benchmarks measure what they say: fields, gate, order, FLOPs, ratios."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch

from benchmarks import attention, cases, contenders, measure, records, report, timing

CPU = torch.device("cpu")
MEASURED = ("median_ms", "p20_ms", "p80_ms", "repeats", "tflops", "fma_peak_tflops", "fraction_of_peak")


def run(name: str, **options) -> list[dict]:
    case = cases.parse(name, num_heads=2)
    return attention.run_case(case, torch.float32, CPU, cases.DIRECTIONS, 2, 0.1, records.describe_run(CPU), **options)


@pytest.fixture(scope="module")
def found() -> list[dict]:
    return run("2x9x3") + run("3x12x4-ragged")


def test_records_have_all_fields(found, tmp_path):
    path = tmp_path / "attention-cpu.jsonl"
    records.append(found[:2], path)
    records.append(found[2:], path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == len(found)
    for line in lines:
        assert set(line) == set(records.FIELDS)
        assert line["gate"] == ("none" if line["op"] == contenders.PLAIN else "pass"), line["message"]
        assert line["p20_ms"] <= line["median_ms"] <= line["p80_ms"]
        assert line["fraction_of_peak"] == line["tflops"] / line["fma_peak_tflops"]
    assert {"luke_kernels:sdpa", "eager", "doubled_head_dim", "sdpa_plain"} <= {line["contender"] for line in lines}
    assert sorted(records.load([tmp_path]), key=json.dumps) == sorted(lines, key=json.dumps)


def test_failed_write_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "records.jsonl"
    records.append([{"run": "a"}], path)
    with pytest.raises(ValueError):
        records.append([{"run": "b"}, {"run": float("nan")}], path)
    assert path.read_text() == '{"run": "a"}\n'
    assert os.listdir(tmp_path) == ["records.jsonl"]


@pytest.mark.parametrize(("slot", "wrong"), [(None, {"forward", "both"}), (2, {"both"})])
def test_wrong_contender_has_no_time(slot, wrong):
    def prepare(inputs):
        prepared = contenders.prepare_eager(inputs)
        if slot is None:
            return replace(prepared, forward=lambda *leaves: [out * 1.01 for out in prepared.forward(*leaves)])
        return replace(prepared, unpack=lambda *grads: prepared.unpack(*grads).index_fill(2, torch.tensor(slot), 0))

    def choose(inputs):
        return [contenders.Contender("bad", contenders.ENTITY_AWARE, "eager", prepare), *contenders.contenders(inputs)]

    rows = {(r["contender"], r["direction"]): r for r in run("2x9x3", choose=choose)}
    for direction in cases.DIRECTIONS:
        row = rows["bad", direction]
        assert (row["gate"] == "wrong") == (direction in wrong)
        assert all((row[name] is None) == (direction in wrong) for name in MEASURED)
        assert (" wrong " in measure.summary(row)) == (direction in wrong)
        assert rows["eager", direction]["gate"] == "pass"


def test_failing_contender_is_recorded_with_its_message():
    def prepare(inputs):
        raise RuntimeError("not on this\nmachine")

    (row, _) = run("1x4x2", choose=lambda _: [contenders.Contender("bad", contenders.ENTITY_AWARE, "bad", prepare)])
    assert (row["gate"], row["message"], row["median_ms"]) == ("failed", "RuntimeError: not on this machine", None)


def test_gate_of_large_cases_looks_at_fewer_heads(monkeypatch):
    monkeypatch.setitem(attention.GATE_SCORES, "cpu", 0)
    assert {r["gate_heads"] for r in run("2x9x3") if r["op"] == contenders.ENTITY_AWARE} == {1}


def test_order_rotates():
    order = []
    samples, failed = timing.interleave({name: partial(order.append, name) for name in "abc"}, 2, CPU)
    rounds = ["".join(order[i : i + 3]) for i in range(0, len(order), 3)]
    assert rounds == ["abc", "bca", "cab", "abc"]
    assert {name: len(times) for name, times in samples.items()} == {"a": 2, "b": 2, "c": 2}
    assert failed == {}


def test_flops_count_real_tokens():
    dense = cases.parse("2x10x4", num_heads=3)
    assert dense.flops("forward") == 4 * 3 * 64 * 2 * 14**2
    assert not dense.ragged
    ragged = cases.parse("16x512x128-ragged")
    assert ragged == cases.parse("16x512x128-ragged")
    assert ragged.ragged
    assert all(60 <= n <= 512 for n in ragged.word_lengths)
    assert all(0 <= n <= 128 for n in ragged.entity_lengths)
    squares = sum((w + e) ** 2 for w, e in zip(ragged.word_lengths, ragged.entity_lengths, strict=True))
    assert ragged.flops("both") == pytest.approx(3.5 * 4 * 12 * 64 * squares)
    with pytest.raises(ValueError, match="case must be BxWxE"):
        cases.parse("512x128")


def test_head_dim_of_a_case():
    narrow = cases.parse("2x9x3-d32-ragged")
    assert (narrow.head_dim, narrow.ragged) == (32, True)
    wide = cases.parse("2x9x3-d64")
    assert wide.flops("both") == 2 * cases.parse("2x9x3-d32").flops("both") == cases.parse("2x9x3").flops("both")
    assert contenders.draw_inputs(narrow, torch.float32, CPU).words.shape[-1] == 32


def test_peak_counts_every_thread_and_instruction():
    """Of each dtype; twice the rounds and twice the threads are twice the operations, and bfloat16 is never less."""
    counts = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        call, counts[dtype] = timing.multiply_adds(dtype)
        torch.set_num_threads(2)
        assert timing.multiply_adds(dtype).count == 2 * counts[dtype]
        torch.set_num_threads(1)
        assert call() == counts[dtype] > 2**20
    assert counts[torch.float32] == counts[torch.float16] <= counts[torch.bfloat16]


def test_one_thread_is_a_contender_where_there_are_more():
    """It leaves the number of threads as it was, and its results are those of all threads, to the bit."""
    torch.set_num_threads(2)
    try:
        inputs = contenders.draw_inputs(cases.parse("2x9x3", num_heads=2), torch.float32, CPU)
        found = {c.name: c.prepare(inputs) for c in contenders.contenders(inputs)}
        alone, together = (found[name].run("both") for name in ("luke_kernels:cpu, 1 thread", "luke_kernels:cpu"))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    for part, other in zip(alone, together, strict=True):
        assert all(map(torch.equal, part, other))


def test_report_ratio_is_the_quotient_of_the_medians(found, tmp_path):
    old = [r | {"median_ms": 1e9, "run": "old"} for r in found]
    unmeasured = {"gate": "wrong", "median_ms": None, "tflops": None, "fraction_of_peak": None}
    wrong = [r | unmeasured for r in found if r["contender"] == "sdpa_plain"]
    page, plot = report.render([*old, *found, *wrong], tmp_path)
    text = page.read_text()
    assert plot.read_bytes().startswith(b"\x89PNG")
    rows = {(r["case"], r["direction"], r["contender"]): r for r in found}
    ours, eager = (rows["2x9x3", "forward", name] for name in ("luke_kernels:sdpa", "eager"))
    assert report.speedup(ours, eager) == eager["median_ms"] / ours["median_ms"]
    assert report.speedup(ours, eager | {"run": "another"}) is None
    line = next(line for line in text.splitlines() if line.startswith("| 2x9x3 | float32"))
    assert f"{ours['median_ms']:.4g} ({eager['median_ms'] / ours['median_ms']:.2f}x)" in line
    assert "| wrong |" in line
    assert "1e+09" not in text
    cells = [f"{ours['fraction_of_peak']:.1%}", "wrong"]
    assert any(
        line.startswith("| 2x9x3 | float32") and all(f"| {c} |" in line for c in cells) for line in text.splitlines()
    )
    plain = rows["2x9x3", "forward", "sdpa_plain"]
    ratio = plain["median_ms"] / ours["median_ms"]
    assert report.share(ours, plain) == f"{ours['fraction_of_peak']:.1%} ({ratio:.2f}x)"
    assert report.share(ours | {"fma_peak_tflops": None}, plain) == ""


def test_compiled_core_has_no_breaks(monkeypatch):
    """Nor grows dynamic with a second case. Compiled by dynamo alone: what it hands on is not translated here."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    for name in ("2x9x3", "3x12x4-ragged"):
        inputs = contenders.draw_inputs(cases.parse(name, num_heads=2), torch.float32, CPU)
        gate = attention.Gate(inputs)
        compiled = contenders.prepare_compiled(inputs)
        assert gate.errors(compiled, "both") == gate.errors(contenders.prepare_eager(inputs), "both")


@pytest.mark.parametrize(("broken", "code"), [(False, 0), (True, 1)])
def test_what_the_sanitizer_runs(broken, code):
    """In Triton's interpreter; a check that fails fails the command."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    from benchmarks import gpu

    script = gpu.SANITIZED.replace('"cuda"', '"cpu"')
    assert script != gpu.SANITIZED
    if broken:
        script = f"import luke_kernels.selfcheck as s\ns._distance = lambda *_: float('nan')\n{script}"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert ("AssertionError" in done.stderr) == broken


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_command_without_a_gpu(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=records.ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: no GPU .*\n", done.stderr)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["attention", "--device", "tpu"], "device must be cpu or cuda, got 'tpu'"),
        (["attention", "--case", "4x5"], "case must be BxWxE[-dD][-ragged], got '4x5'"),
        (["report", "--records", "none.jsonl"], "none.jsonl"),
        (["attention", "--repeat", "0"], "--repeat"),
        (["model", "--size", "huge"], "size must be tiny or base or large, got 'huge'"),
        (
            ["model", "--case", "4x5"],
            "case must be BxWxE, BxWxE-ragged or one of conll-N, conll-spans-N, wikipedia-N, questions-N, got '4x5'",
        ),
        (["model", "--case", "1x513x2"], "case must have at most 512 words and some entities, got '1x513x2'"),
    ],
)
def test_command_errors(arguments, message, monkeypatch, capsys):
    from benchmarks import __main__, console

    monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments])
    with pytest.raises(SystemExit) as exit_info:
        console.run(__main__.app)
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
