"""The suites around the model benchmark: peers, training, memory, the tokenizer; all of a tiny model, end to end."""

import importlib.util
import json
from functools import partial

import luke_cases
import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

from benchmarks import (
    __main__,
    base,
    batches,
    console,
    encode,
    encoders,
    measure,
    model,
    peers,
    records,
    report,
    texts,
    timing,
    tokenizer,
    train,
)

CPU = torch.device("cpu")
CONFIG = encoders.config_of("tiny")
# Its third sequence has no entity.
RAGGED = "4x9x2-ragged"
ENTITIES = 50


@pytest.fixture
def graphs_only(monkeypatch):
    """Dynamo traces, and inductor, which would compile for half a minute, is left out."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))


def run_model(choose, name: str = RAGGED, directions=("forward", "both"), dtype=torch.float32) -> list[dict]:
    batch = batches.load(name, CONFIG, CPU)
    run = records.describe_run(CPU)
    return model.run_case(batch, "tiny", dtype, directions, 2, 0.1, run, choose)


def check_records(found: list[dict]) -> None:
    for record in found:
        assert set(json.loads(json.dumps(record, allow_nan=False))) == set(records.FIELDS)
        assert record["gate"] == "pass", record["message"]
        assert record["p20_ms"] <= record["median_ms"] <= record["p80_ms"]
        assert record["tokens_per_s"] * record["median_ms"] == pytest.approx(1e3 * record["shape"]["real_tokens"])


def with_peers(*wanted: str):
    """Return who chooses transformers' model and these."""
    return lambda *arguments: [c for c in peers.contenders(*arguments) if c.name in (encoders.TRANSFORMERS, *wanted)]


@pytest.mark.parametrize("name", [peers.COMPILED, peers.ONNXRUNTIME, peers.OPENVINO])
def test_peers_compute_the_same(name, graphs_only):
    if absent := peers.missing(name):
        pytest.skip(f"{', '.join(absent)} not installed")
    found = run_model(with_peers(name))
    names = [(record["contender"], record["direction"]) for record in found]
    assert names == [("transformers", "forward"), (name, "forward"), ("transformers", "both")]
    check_records(found)


@pytest.mark.slow
def test_openvino_narrows_weights_itself():
    if absent := peers.missing(peers.OPENVINO):
        pytest.skip(f"{', '.join(absent)} not installed")
    found = run_model(with_peers(peers.OPENVINO), directions=("forward",), dtype=torch.bfloat16)
    assert [record["gate"] for record in found] == ["pass", "pass"]


def export_eager(scale: float, wrapped, inputs, dtype):
    """As an export: what is left are the inputs and a graph, here the model itself."""
    states = wrapped(*inputs.values())
    return lambda: [states[0], states[1] * scale]


def export_nothing(wrapped, inputs, dtype):
    raise RuntimeError("no such operator\nhere")


@pytest.mark.parametrize(
    ("export", "gate", "message"),
    [
        (partial(export_eager, 1.0), "pass", None),
        (partial(export_eager, 1.001), "wrong", "beyond its bound: entities"),
        (partial(export_eager, float("nan")), "wrong", "beyond its bound: entities"),
        (export_nothing, "failed", "RuntimeError: no such operator here"),
    ],
)
def test_exports_are_judged_before_they_are_timed(export, gate, message):
    def choose(theirs, batch, douts):
        first, *_ = encoders.contenders(theirs, batch, douts)
        return [first, peers.Exported("exported", theirs, batch.padded, export)]

    theirs, exported = run_model(choose, directions=("forward",))
    assert theirs["gate"] == "pass"
    assert (exported["gate"], exported["message"]) == (gate, message)
    assert all((exported[name] is not None) == (gate == "pass") for name in ("median_ms", "tflops", "tokens_per_s"))


def test_compile_that_fails_is_a_record(monkeypatch):
    def refuse(graph, inputs):
        raise OSError("no compiler")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=refuse))
    theirs, compiled = run_model(with_peers(peers.COMPILED), directions=("forward",))
    assert theirs["gate"] == "pass"
    assert (compiled["gate"], compiled["median_ms"]) == ("failed", None)
    assert "no compiler" in compiled["message"]


def test_missing_packages_are_told(monkeypatch, capsys, tmp_path, graphs_only):
    real = importlib.util.find_spec
    absent = {"onnxscript", "openvino"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in absent else real(name))
    out = tmp_path / "model.jsonl"
    options = {"size": "tiny", "dtype": ["float32"], "direction": ["forward"], "case": ["1x4x1"], "repeats": 1}
    __main__.model(**options, out=out)
    printed = capsys.readouterr().out
    assert "onnxruntime: left out, onnxscript not installed" in printed
    assert "openvino: left out, openvino not installed" in printed
    ours = [encoders.ACCELERATED, encoders.OURS, encoders.PACKED, encoders.OPTIMIZED, encoders.INT8]
    assert [r["contender"] for r in records.load([out])] == [encoders.TRANSFORMERS, peers.COMPILED, *ours]
    with pytest.raises(console.CommandError, match="openvino must have its packages, openvino are not installed"):
        __main__.model(**options, contender=["openvino"], out=out)
    __main__.model(**options, contender=["accelerated"], out=tmp_path / "two.jsonl")
    assert [r["contender"] for r in records.load([tmp_path / "two.jsonl"])] == ["transformers", "accelerated"]
    with pytest.raises(ValueError, match=r"contender must be transformers or transformers-compiled or .*'tensorflow'"):
        __main__.model(**options, contender=["tensorflow"], out=out)


def test_long_calls_have_fewer_rounds():
    assert timing.plan_rounds(0.0, 8) == (timing.WARM_UP, 8)
    assert timing.plan_rounds(timing.ROUNDS_S / 5, 8) == (timing.WARM_UP, 5)
    assert timing.plan_rounds(timing.ROUNDS_S, 8) == (0, timing.FEWEST)
    assert timing.plan_rounds(timing.ROUNDS_S, 2) == (0, 2)


class Local:
    """A worker in this process."""

    def __init__(self, job):
        self.job, self.training = job, None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def wait(self):
        self.training = train.Training(self.job)
        return {}

    def ask(self, name):
        return getattr(self.training, name)()


def run_train(name: str = "3x9x3") -> list[dict]:
    return train.run_case(name, "tiny", ENTITIES, torch.float32, CPU, 2, 0.1, records.describe_run(CPU))


def test_train_in_processes(tmp_path):
    out = tmp_path / "train.jsonl"
    __main__.train(size="tiny", entities=ENTITIES, case=["2x9x3"], repeats=2, out=out)
    found = records.load([out])
    assert [(r["op"], r["contender"], r["direction"]) for r in found] == [
        ("train", "transformers", "step"),
        ("train", "luke_kernels-packed", "step"),
    ]
    check_records(found)
    for record in found:
        assert record["shape"]["N"] == ENTITIES
        assert record["bound"]["loss"] == 1e-5
        assert record["error"].keys() == record["bound"].keys()
        assert record["message"] is None
    assert found[0]["error"]["loss"] == 0
    page = report.render(found, tmp_path)[0]
    assert page.name == "train.md"
    assert "### Forward, backward and AdamW" in page.read_text()


class Perturbed(Local):
    """One whose model is ours with some change that the gate must see."""

    change = ""

    def ask(self, name):
        answer = super().ask(name)
        if name == "judge" and self.job.contender == encoders.PACKED:
            if self.change == "loss":
                answer["loss"] *= 1 + 1e-4
            elif self.change == "lost":
                answer["norms"].popitem()
            elif self.change:
                answer["norms"][self.change] *= 1.01
        return answer


@pytest.mark.parametrize("change", ["loss", "lost", "luke.encoder.layer.1.attention.self.e2w_query.weight"])
def test_wrong_training_has_no_time(monkeypatch, change):
    monkeypatch.setattr(train, "Worker", type("Changed", (Perturbed,), {"change": change}))
    theirs, ours = run_train()
    assert theirs["gate"] == "pass"
    assert ours["gate"] == "wrong"
    assert ours["message"].startswith("other gradients: " if change == "lost" else f"beyond its bound: {change}")
    assert {ours[name] for name in ("median_ms", "tflops", "tokens_per_s", "peak_memory_bytes")} == {None}
    assert " wrong " in measure.summary(ours)


@pytest.mark.parametrize("estimated", [False, True])
def test_batch_is_cut_until_eager_fits(monkeypatch, estimated):
    class Scarce(Local):
        def wait(self):
            if self.job.contender == encoders.TRANSFORMERS and self.job.sequences > 1:
                raise train.WorkerError("RuntimeError: DefaultCPUAllocator: can't allocate memory")
            return super().wait()

    monkeypatch.setattr(train, "Worker", Scarce)
    if estimated:
        monkeypatch.setattr(train, "limit_of", lambda *_: 0)
    found = run_train()
    for record in found:
        assert (record["gate"], record["case"], record["shape"]["B"]) == ("pass", "3x9x3[:1]", 1)
        assert record["message"].startswith("cut: 3 sequences")
        assert ("can't allocate" in record["message"]) != estimated


def test_eager_that_fails_leaves_nothing_to_judge_by(monkeypatch):
    class Broken(Local):
        def wait(self):
            raise train.WorkerError("RuntimeError: broken")

    monkeypatch.setattr(train, "Worker", Broken)
    theirs, ours = run_train()
    assert (theirs["gate"], theirs["message"]) == ("failed", "RuntimeError: broken")
    assert (ours["gate"], ours["message"]) == ("failed", "eager, which it is judged by, failed")


@pytest.mark.slow
def test_process_with_too_little_memory_says_so():
    job = train.Job("transformers", "tiny", ENTITIES, torch.float32, "2x9x3", 2, "cpu", 1, limit_bytes=2**20)
    with train.Worker(job) as worker, pytest.raises(train.WorkerError) as raised:
        worker.wait()
    assert train.is_of_memory(str(raised.value))


def test_masks():
    batch = batches.load("4x20x10", CONFIG, CPU)
    examples = train.mask(batch)
    assert examples.masked == (12, 6)
    hidden = examples.labels != train.IGNORED
    assert (examples.batch.packed.input_ids[hidden] == train.MASK_WORD).all()
    assert torch.equal(examples.batch.packed.input_ids.where(~hidden, examples.labels), batch.packed.input_ids)
    padded, packed = examples.inputs(encoders.TRANSFORMERS), examples.inputs(encoders.PACKED)
    assert torch.equal(padded["entity_labels"].flatten(), packed["entity_labels"])
    assert (padded["entity_ids"].flatten() == train.MASK_ENTITY).sum() == 6


def test_first_sequences():
    whole = batches.load("5x30x8-ragged", CONFIG, CPU)
    part = whole.first(2)
    assert part.name == "5x30x8-ragged[:2]"
    assert (part.word_lengths, part.entity_lengths) == (whole.word_lengths[:2], whole.entity_lengths[:2])
    assert torch.equal(part.packed.input_ids, whole.packed.input_ids[: sum(part.word_lengths)])
    assert whole.first(5) is whole


def test_memory(tmp_path):
    out = tmp_path / "memory.jsonl"
    __main__.memory(size="tiny", case=["2x9x3", "2x20x5"], direction=["both"], out=out)
    found = records.load([out])
    assert [(record["op"], record["contender"]) for record in found] == [
        ("memory", name) for name in ("transformers", "luke_kernels-packed") * 2
    ]
    check_records(found)
    # Calls so small take pages that were there: the plot draws those that show.
    found = [record | {"peak_memory_bytes": place * 2**20} for place, record in enumerate(found)]
    page, plot = report.render(found, tmp_path)
    assert (page.name, plot.read_bytes()[:4]) == ("memory.md", b"\x89PNG")
    assert "| 2x20x5 | float32 | 2 | 3 |" in page.read_text()


@luke_cases.NEEDS_DATA
def test_tokenizer(tmp_path):
    out = tmp_path / "tokenizer.jsonl"
    __main__.tokenizer(case=["conll-4", "conll-spans-2"], repeats=2, out=out)
    found = records.load([out])
    assert [record["contender"] for record in found] == ["transformers", "luke_kernels"] * 2
    check_records(found)
    page = report.render(found, tmp_path)[0]
    assert "### Texts and spans to inputs" in page.read_text()


@luke_cases.NEEDS_DATA
def test_encode(tmp_path, monkeypatch):
    """Windows of a few texts, so that there are several."""
    monkeypatch.setattr(encode, "MAX_TOKENS", 40)
    out = tmp_path / "encode.jsonl"
    __main__.encode(size="tiny", dtype=["float32"], case=["conll-20"], repeats=2, out=out)
    found = records.load([out])
    assert [record["contender"] for record in found] == ["transformers", "luke_kernels", "luke_kernels-optimized"]
    check_records(found)
    assert found[0]["waiting"] is None
    assert all(0 < record["waiting"] < 1 for record in found[1:])
    page = report.render(found, tmp_path)[0].read_text()
    assert "### Texts and spans to vectors" in page
    assert "Share of the time in which the model waits for texts" in page


@luke_cases.NEEDS_DATA
def test_wrong_vectors_have_no_time(tmp_path, monkeypatch):
    real = encode.encode_texts

    def wrong(*arguments, **options):
        for vectors in real(*arguments, **options):
            vectors.entities[-1] *= 1.01
            yield vectors

    monkeypatch.setattr(encode, "encode_texts", wrong)
    run = records.describe_run(CPU)
    theirs, *ours = encode.run_case("conll-3", "tiny", torch.float32, CPU, 1, run)
    assert theirs["median_ms"]
    assert {(record["gate"], record["median_ms"]) for record in ours} == {("wrong", None)}
    assert all("differs from transformers' by" in record["message"] for record in ours)


@luke_cases.NEEDS_DATA
def test_wrong_tokenizer_has_no_time():
    def choose(drawn, max_entities):
        found = tokenizer.prepare(drawn, max_entities)
        ours = found[encoders.OURS]

        def shift(*arguments, **options):
            encoding = dict(ours(*arguments, **options))
            return encoding | {"entity_ids": [[i + 1 for i in row] for row in encoding["entity_ids"]]}

        return found | {encoders.OURS: shift}

    theirs, ours = tokenizer.run_case("conll-3", 2, records.describe_run(CPU), choose)
    assert theirs["gate"] == "pass"
    assert (ours["gate"], ours["message"]) == ("wrong", "other than transformers': entity_ids")
    assert (ours["median_ms"], ours["tokens_per_s"]) == (None, None)


@luke_cases.NEEDS_DATA
def test_texts_are_cut_where_tokenizers_would():
    (article,) = texts.wikipedia(1)
    pieces = luke_cases.tokenizer()
    for limit in (50, 51):
        part = tokenizer.cut(article, pieces, limit)
        assert article.text.startswith(part.text)
        assert len(pieces(part.text)["input_ids"]) == limit
        assert part.titles == article.titles[: len(part.titles)]
        assert part.spans == [span for span in article.spans if span[1] <= len(part.text)]
    assert tokenizer.cut(part, pieces, 51) == part


@luke_cases.NEEDS_DATA
def test_all_spans():
    for sentence in texts.conll_spans(8):
        words = sentence.text.split()
        spans = {sentence.text[start:end] for start, end in sentence.spans}
        assert {" ".join(words[:16]), words[-1], *words} <= spans
        assert max(len(span.split()) for span in spans) == min(16, len(words))
        assert len(sentence.spans) == sum(min(16, len(words) - place) for place in range(len(words)))
    batch = batches.load("conll-spans-4", CONFIG, CPU)
    assert batch.entity_lengths == [len(sentence.spans) for sentence in texts.conll_spans(4)]
    assert max(texts.conll_spans(3000), key=lambda sentence: len(sentence.spans)).text.count(" ") == 108


@luke_cases.NEEDS_DATA
def test_questions():
    for pair in texts.questions(8):
        assert pair.spans
        assert all(pair.text[start:end].strip() for start, end in pair.spans)
    batch = batches.load("questions-8", CONFIG, CPU)
    assert min(batch.entity_lengths) > 0
    assert max(batch.word_lengths) <= texts.MAX_QUESTION_WORDS


def test_readme_tells_of_peers():
    shape = {"real_tokens": 12, "padded_tokens": 30}
    blank = records.blank() | {"op": "model", "size": "base", "direction": "forward", "case": "conll-spans-2"}
    blank |= {"dtype": "float32", "run": "r", "device": "cpu: x", "versions": {}, "gate": "pass", "shape": shape}
    found = [blank | {"contender": encoders.TRANSFORMERS, "median_ms": 6.0}]
    without = report.readme_block(found)
    assert "openvino" not in without
    found += [blank | {"contender": peers.OPENVINO, "median_ms": 3.0}]
    found += [blank | {"contender": encoders.OPTIMIZED, "median_ms": 1.5}]
    lines = report.readme_block(found).splitlines()
    names = [encoders.TRANSFORMERS, peers.OPENVINO, encoders.ACCELERATED, encoders.OURS, encoders.PACKED]
    assert lines[0] == f"| case | tokens (padded) | {' | '.join([*names, encoders.OPTIMIZED])} |"
    assert lines[2] == "| conll-spans-2 | 12 (30) | 6 ms | 2.00x |  |  |  | 4.00x |"
    assert "its weights packed for this CPU before. `BxWxE`" in lines[-1]
    assert "all spans of up to 16 words" in lines[-1]


@pytest.mark.parametrize(
    ("error", "told"),
    [({"words": 1e-3, "entities": 2e-2}, "2.0e-02"), ({"words": None, "entities": 1.0}, "NaN"), ({"loss": 1.0}, "")],
)
def test_errors_are_told(error, told):
    assert report.errors(records.blank() | {"error": error}, None) == told


def test_page_tells_why_there_is_no_time(tmp_path):
    row = records.blank() | {"op": "train", "size": "base", "direction": "step", "case": "1x2x1", "dtype": "float32"}
    row |= {"run": "r", "device": "cpu: x", "versions": {}, "shape": {"real_tokens": 3}, "date": "d", "command": "c"}
    row |= {"contender": encoders.TRANSFORMERS, "gate": "failed", "message": "no memory"}
    page = report.render([row, replaced(row, encoders.PACKED)], tmp_path)[0].read_text()
    assert "| 1x2x1 | float32 | failed | failed |" in page
    assert "- 1x2x1, float32, `luke_kernels-packed`: no memory" in page


def replaced(row: dict, contender: str) -> dict:
    return row | {"contender": contender}


def test_ratios_to_a_revision():
    blank = {"case": "c", "dtype": "float32", "direction": "forward", "contender": "x", "gate": "pass"}
    then = [blank | {"median_ms": ms} for ms in (4.0, 8.0)]
    now = [blank | {"median_ms": 2.0}, blank | {"contender": "y", "median_ms": None, "gate": "wrong"}]
    *_, first, second = base.table(then, now, "old").splitlines()
    assert first == "| c | float32 | forward | x | 6 | 2 | 3.00x |"
    assert second == "| c | float32 | forward | y |  | wrong |  |"
    with pytest.raises(console.CommandError, match=r"worktree add .* must succeed"):
        base.compare("no-such-revision", "model", [])
