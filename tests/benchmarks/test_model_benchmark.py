"""The model and layer benchmarks: same weights, truth, gate, FLOPs, texts, and README's table from the records."""

import json

import luke_cases
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("transformers", reason="transformers is not installed")

from benchmarks import batches, cases, console, encoders, layer, measure, model, records, report, texts

CPU = torch.device("cpu")
CONFIG = encoders.config_of("tiny")
# Its third sequence has no entity.
RAGGED = "4x9x2-ragged"


def run(name: str, **options) -> list[dict]:
    batch = batches.load(name, CONFIG, CPU)
    run = records.describe_run(CPU)
    return model.run_case(batch, "tiny", torch.float32, cases.DIRECTIONS, 2, 0.1, run, **options)


@pytest.fixture(scope="module")
def found() -> list[dict]:
    return run(RAGGED) + run("2x9x3")


def prepare(name: str = RAGGED, dtype: torch.dtype = torch.float32):
    batch = batches.load(name, CONFIG, CPU)
    theirs = encoders.draw_model(CONFIG, dtype, CPU)
    return theirs, batch, encoders.draw_douts(batch, theirs)


def test_records(found):
    assert 0 in batches.load(RAGGED, CONFIG, CPU).entity_lengths
    assert len(found) == 2 * (6 + 4)
    for record in found:
        assert set(json.loads(json.dumps(record, allow_nan=False))) == set(records.FIELDS)
        assert record["gate"] == ("none" if record["contender"] == encoders.INT8 else "pass"), record["message"]
        assert record["p20_ms"] <= record["median_ms"] <= record["p80_ms"]
        seconds = record["median_ms"] / 1e3
        assert record["tokens_per_s"] * seconds == pytest.approx(record["shape"]["real_tokens"])
        assert record["sequences_per_s"] * seconds == pytest.approx(record["shape"]["B"])
        assert len(record["error"]) == (2 if record["direction"] == "forward" else 3)
        assert record["versions"]["transformers"]
        if record["contender"] == encoders.TRANSFORMERS:
            assert record["error"] == record["eager_error"]
    names = ["transformers", "accelerated", "luke_kernels", "luke_kernels-packed"]
    inference = ["luke_kernels-optimized", "luke_kernels-int8"]
    assert [record["contender"] for record in found[:10]] == [*names, *inference, *names]
    errors = {r["contender"]: r["error"]["words"] for r in found if r["direction"] == "forward"}
    assert errors["luke_kernels-int8"] > 4 * errors["luke_kernels-optimized"]


def test_contenders_share_weights_and_nothing_else():
    theirs, *rest = encoders.contenders(*prepare())
    addresses = {name: parameter.data_ptr() for name, parameter in theirs.parameters.items()}
    for contender in rest:
        assert {name: parameter.data_ptr() for name, parameter in contender.parameters.items()} == addresses
        assert all(parameter.requires_grad for parameter in contender.parameters.values())
    assert len({type(contender.model.encoder) for contender in (theirs, *rest)}) == 3
    packed, optimized, _ = rest[-3:]
    assert optimized.model is not packed.model
    optimized.prepare("forward")
    assert optimized.model.is_optimized_for_inference > packed.model.is_optimized_for_inference
    assert type(theirs.model.encoder).__module__.startswith("transformers.")


class Scaled(encoders.Contender):
    def run(self, direction):
        (words, entities), gradients = super().run(direction)
        return (words, entities * 1.001), gradients


class Untrained(encoders.Contender):
    def run(self, direction):
        states, gradients = super().run(direction)
        names = [name for name in self.parameters if name.endswith("1.attention.self.w2e_query.bias")]
        lost = [list(self.parameters).index(name) for name in names]
        return states, [g * 0 if i in lost else g for i, g in enumerate(gradients)]


class Undefined(encoders.Contender):
    def run(self, direction):
        (words, entities), gradients = super().run(direction)
        return (words * float("nan"), entities), gradients


@pytest.mark.parametrize(
    ("broken", "directions", "told"),
    [
        (Scaled, {"forward", "both"}, "entities"),
        (Untrained, {"both"}, "encoder.layer.1.attention.self.w2e_query.bias"),
        (Undefined, {"forward", "both"}, "words"),
    ],
)
def test_wrong_contender_has_no_time(broken, directions, told):
    def choose(*arguments):
        first, *_, last = encoders.contenders(*arguments)
        return [first, broken("bad", last.model, last.inputs, last.douts)]

    for record in run(RAGGED, choose=choose):
        wrong = record["contender"] == "bad" and record["direction"] in directions
        assert record["gate"] == ("wrong" if wrong else "pass")
        assert (record["median_ms"] is None) == wrong
        if wrong:
            assert f" wrong beyond its bound: {told}" in measure.summary(record)
            assert told in record["error"]


def test_truth_is_the_same_in_parts(monkeypatch):
    """One sequence at a time, that without entities too, and all at once."""
    arguments = prepare()
    whole = model._truth(*arguments, "both")
    monkeypatch.setattr(model, "GATE_TOKENS", 1)
    assert len(list(arguments[1].parts(1))) == 4
    assert list(arguments[1].parts(1))[2][1].keys() == {"input_ids", "attention_mask"}
    parts = model._truth(*arguments, "both")
    assert parts.keys() == whole.keys()
    for name, value in whole.items():
        assert value.dtype == torch.float64
        torch.testing.assert_close(parts[name], value, rtol=1e-9, atol=1e-9)


def test_flops_are_those_that_eager_needs_for_a_dense_batch():
    theirs, batch, _ = prepare("3x20x5")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        theirs(**batch.padded)
    assert batch.flops(CONFIG, "forward") == counter.get_total_flops()


def test_flops_count_real_tokens():
    batch = batches.load(RAGGED, CONFIG, CPU)
    attention = 2 * 4 * 32 * sum((w + e) ** 2 for w, e in zip(batch.word_lengths, batch.entity_lengths, strict=True))
    products = (
        2 * batch.shape["real_tokens"] * 2 * (5 * 32 * 32 + 2 * 32 * 64) + 2 * batch.packed.num_entities * 16 * 32
    )
    assert batch.flops(CONFIG, "forward") == attention + products
    assert batch.flops(CONFIG, "both") == 3.5 * attention + 3 * products
    assert batch.shape["real_tokens"] < batch.shape["padded_tokens"] == 4 * 11


def test_batches_are_drawn_from_their_names():
    first, again, other = (batches.load(name, CONFIG, CPU) for name in (RAGGED, RAGGED, "4x9x2"))
    assert all(torch.equal(first.padded[name], again.padded[name]) for name in first.padded)
    assert not torch.equal(first.padded["input_ids"], other.padded["input_ids"])
    assert first.padded["attention_mask"].sum(1).tolist() == first.word_lengths
    assert first.padded["entity_position_ids"].shape == (4, 2, batches.MENTION)
    assert other.padded["attention_mask"].all()


def run_layer(name: str, **options) -> list[dict]:
    batch = batches.load(name, CONFIG, CPU)
    run = records.describe_run(CPU)
    return layer.run_case(batch, "tiny", torch.float32, cases.DIRECTIONS, 2, 0.1, run, **options)


@pytest.mark.parametrize("name", [RAGGED, "2x9x3"])
def test_layer(name):
    """On the same weights and states; gradients are also those of the states, which the gate sees without padding."""
    found = run_layer(name)
    assert [record["contender"] for record in found] == 2 * ["transformers", "luke_kernels", "luke_kernels-packed"]
    for record in found:
        assert set(json.loads(json.dumps(record, allow_nan=False))) == set(records.FIELDS)
        assert (record["op"], record["gate"]) == ("layer", "pass"), record["message"]
    batch = batches.load(name, CONFIG, CPU)
    theirs, *ours = layer.contenders(batch, CONFIG, torch.float32, CPU)
    assert {"word_hidden", "entity_hidden", "e2w_query.weight", "value.bias"} < theirs.parameters.keys()
    for contender in ours:
        assert contender.parameters.keys() == theirs.parameters.keys()
        assert contender.parameters["w2e_query.bias"].data_ptr() == theirs.parameters["w2e_query.bias"].data_ptr()


class WrongGradient(layer.Layer):
    def run(self, direction):
        states, gradients = super().run(direction)
        return states, [g * 1.001 if g.dim() == 3 and g.shape[1] == 2 else g for g in gradients]


def test_layer_with_a_wrong_gradient_of_its_states_has_no_time():
    def choose(*arguments):
        theirs, ours, _ = layer.contenders(*arguments)
        wrong = WrongGradient("bad", ours.model, ours.inputs, ours.douts, ours.word_hidden, ours.entity_hidden)
        return [theirs, wrong]

    assert {r["direction"]: (r["gate"], r["message"]) for r in run_layer(RAGGED, choose=choose)[1::2]} == {
        "forward": ("pass", None),
        "both": ("wrong", "beyond its bound: entity_hidden"),
    }


def test_flops_of_a_layer_are_those_that_eager_needs_for_a_dense_batch():
    batch = batches.load("3x20x5", CONFIG, CPU)
    theirs, *_ = layer.contenders(batch, CONFIG, torch.float32, CPU)
    with FlopCounterMode(display=False) as counter:
        theirs.run("forward")
    assert layer.flops(batch, CONFIG.hidden_size, "forward") == counter.get_total_flops()


def test_links_of_wikitext():
    text = texts._linked(
        "{{Box|a={{b}}}}'''Ada''' [[File:A.jpg|thumb|[[No]] link]]wrote<ref name=x/> for [[Charles Babbage|Babbage]]"
        "<ref>{{cite}}</ref>, in [[London]]&nbsp;&amp; elsewhere.<!-- [[x]] -->\n"
    )
    assert text.text == "Ada wrote for Babbage, in London & elsewhere."
    assert [text.text[start:end] for start, end in text.spans] == ["Babbage", "London"]
    assert text.titles == ["Charles Babbage", "London"]


@luke_cases.NEEDS_DATA
def test_real_sentences():
    known = dict(luke_cases.conll_sentences())
    assert all(known[sentence.text] == sentence.spans for sentence in texts.conll(2000))
    sentences = texts.conll(32)
    assert len({sentence.text for sentence in sentences}) == 32
    batch = batches.load("conll-32", CONFIG, CPU)
    assert batch.entity_lengths == [len(sentence.spans) for sentence in sentences]
    assert set(batch.packed.entity_ids.tolist()) == {texts.SPECIAL_ENTITIES.index(texts.MASK)}
    with pytest.raises(ValueError, match="case must have at most"):
        texts.conll(10**6)
    gates = {record["contender"]: record["gate"] for record in run("conll-1")}
    assert gates.pop(encoders.INT8) == "none"
    assert set(gates.values()) == {"pass"}


@luke_cases.NEEDS_DATA
def test_real_articles():
    batch = batches.load("wikipedia-2", CONFIG, CPU)
    assert max(batch.word_lengths) <= texts.MAX_WORDS
    assert min(batch.word_lengths) > 100
    assert min(batch.entity_lengths) > 5
    assert batch.packed.entity_ids.min() >= len(texts.SPECIAL_ENTITIES)
    for article in texts.wikipedia(2):
        assert all(article.text[start:end].strip() for start, end in article.spans)
        assert not {*"[]{}<>|"} & {*article.text}


def test_real_texts_are_skipped_without_data(monkeypatch, capsys, tmp_path):
    from benchmarks import __main__

    monkeypatch.delenv("LUKE_KERNELS_DATA", raising=False)
    monkeypatch.setattr(__main__, "MAIN_DTYPES", ())
    monkeypatch.setattr("benchmarks.model.DEVICE_BATCHES", {"cpu": ("conll-1",)})
    __main__.model(size="tiny", out=tmp_path / "none.jsonl")
    assert "conll-1: skipped, LUKE_KERNELS_DATA must name the folder of data sets, got ''" in capsys.readouterr().out
    with pytest.raises(console.CommandError, match="case conll-1 must have its data"):
        __main__.model(size="tiny", case=["conll-1"], out=tmp_path / "none.jsonl")
    assert not list(tmp_path.iterdir())


def test_report(found, tmp_path):
    page, *plots = report.render(found, tmp_path)
    assert (page.name, [plot.suffix for plot in plots]) == ("model.md", [".png", ".png"])
    assert all(f"]({plot.name})" in page.read_text() for plot in plots)
    rows = {(r["case"], r["direction"], r["contender"]): r for r in found}
    ours, theirs = (rows["2x9x3", "forward", name] for name in ("luke_kernels", "transformers"))
    line = next(line for line in page.read_text().splitlines() if line.startswith("| 2x9x3 | float32"))
    assert f" {ours['median_ms']:.4g} ({theirs['median_ms'] / ours['median_ms']:.2f}x) " in line


def record(contender: str, median_ms: float | None, **changes) -> dict:
    values = {"op": "model", "size": "base", "direction": "forward", "case": "1x2x1", "dtype": "float32", "run": "r"}
    values |= {"device": "cpu: x", "versions": {"torch": "9"}, "commit": "c" * 40, "gate": "pass"}
    values |= {
        "shape": {"real_tokens": 1200, "padded_tokens": 3000},
        "contender": contender,
        "median_ms": median_ms,
        "peak_memory_bytes": 3 * 2**20,
    }
    return records.blank() | values | changes


def test_readme_block():
    found = [
        record("transformers", 30.0),
        record("accelerated", 20.0),
        record("luke_kernels", None, gate="wrong"),
        record("transformers", 30.0, dtype="bfloat16"),
        record("luke_kernels", 60.0, dtype="bfloat16"),
        record("transformers", 30.0, dtype="bfloat16", case="3x2x1"),
        record("luke_kernels", None, dtype="bfloat16", case="3x2x1", gate="wrong"),
        record("transformers", 1.0, size="tiny", case="9x9x9"),
    ]
    block = report.readme_block(found)
    assert "| 1x2x1 | 1,200 (3,000) | 30 ms, 3 MiB | 1.50x, 3 MiB | wrong |  |" in block
    assert "LUKE base, float32, cpu: x; torch 9, commit cccccccccccc." in block
    assert "In bfloat16, `luke_kernels` is 0.50x to 0.50x as fast, 1 of 2 cases without a time." in block
    assert "9x9x9" not in block


def test_readme_is_rewritten_between_its_markers(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("a\n<!-- benchmarks: model -->\nold\n<!-- end -->\nb\n")
    report.render_readme([record("transformers", 30.0)], path)
    block = report.readme_block([record("transformers", 30.0)])
    assert path.read_text() == f"a\n<!-- benchmarks: model -->\n{block}<!-- end -->\nb\n"
    path.write_text("nothing\n")
    with pytest.raises(ValueError, match="must hold the markers"):
        report.render_readme([], path)
    assert path.read_text() == "nothing\n"


def test_readme_holds_what_the_records_give():
    text = report.README.read_text(encoding="utf-8")
    assert report.README_BLOCK.findall(text) == [report.readme_block(records.load([records.RESULTS]))]
