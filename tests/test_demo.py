"""The demo: the rows it prints, what it does where states are wrong, and without transformers."""

import json
import sys

import pytest
import torch
from luke_cases import ENCODERS, redraw
from rich.console import Console
from typer.testing import CliRunner

from luke_kernels import LukeConfig, LukeModel, LukeTokenizer, cli, demo
from luke_kernels.encode import choose_device
from luke_kernels.ops import backends
from luke_kernels.tokenizer import BUNDLED

CHOSEN = backends.choose("auto", torch.device("cpu"), torch.float32, 16)
NEEDS_TRANSFORMERS = "transformers is not installed"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small model in bfloat16, its tokenizer beside it."""
    directory = tmp_path_factory.mktemp("luke")
    tokenizer = LukeTokenizer.from_pretrained(BUNDLED)
    sizes = {"vocab_size": len(tokenizer), "entity_vocab_size": len(tokenizer.entity_vocab), "entity_emb_size": 16}
    model = LukeModel(LukeConfig(**ENCODERS["tiny"], **sizes))
    redraw(model)
    model.bfloat16().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


def run(*arguments):
    return CliRunner().invoke(cli.app, ["demo", *arguments], env={"COLUMNS": "200"})


def rows(output):
    """Return the cells of the tables' rows."""
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.splitlines() if "│" in line]


def test_rows_of_all_contenders(checkpoint, monkeypatch):
    transformers = pytest.importorskip("transformers", reason=NEEDS_TRANSFORMERS)
    monkeypatch.setattr(backends, "INTERPRETING", False)
    result = run("--model", checkpoint, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "LUKE of 2 layers, hidden size 32" in result.output
    assert f"parameters in float32: {checkpoint}" in result.output.replace("\n", "")
    assert "20 sentences, 541 words + 64 entities = 605 tokens, 800 when padded" in result.output
    assert f"transformers {transformers.__version__}" in result.output
    theirs, accelerated, ours, nearest, *_ = rows(result.output)
    assert theirs[:3] == ["transformers", "eager", "0"]
    for row in (accelerated, ours):
        assert 0 < float(row[2]) < 1e-5
        assert float(row[3]) > 0
    assert [row[:2] for row in (accelerated, ours)] == [["accelerated", CHOSEN], ["luke_kernels", CHOSEN]]
    assert theirs[4] == "1.00 x"
    assert nearest[0] == "[Marie Curie] won the"
    assert -1 <= float(nearest[2]) <= 1
    assert "triton: off, " in result.output


def test_without_transformers_the_reference_comes_first(checkpoint, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    result = run("--model", checkpoint, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "transformers: absent, " in result.output
    assert "(pip install transformers)" in result.output
    reference, ours = rows(result.output)[:2]
    assert reference[:3] == ["luke_kernels", "reference", "0"]
    assert ours[:2] == ["luke_kernels", CHOSEN]
    assert 0 < float(ours[2]) < 1e-5


@pytest.mark.parametrize("fault", [lambda out: out * 1.01, lambda out: out * float("nan")])
def test_what_is_wrong_has_no_time(checkpoint, monkeypatch, fault):
    backend = backends.load(CHOSEN)
    right = backend.forward

    def wrong(*arguments):
        out, lse = right(*arguments)
        return fault(out), lse

    monkeypatch.setattr(backend, "forward", wrong)
    monkeypatch.setitem(sys.modules, "transformers", None)
    result = run("--model", checkpoint, "--device", "cpu")
    assert result.exit_code == 1, result.output
    reference, ours = rows(result.output)
    assert float(reference[3]) > 0
    assert ours[2].startswith("WRONG ")
    assert ours[3:] == ["", "", ""]
    assert "accelerate" not in result.output


def test_weights_are_shared(checkpoint):
    pytest.importorskip("transformers", reason=NEEDS_TRANSFORMERS)
    model, _ = demo._load(checkpoint, torch.device("cpu"))
    contenders, _ = demo._contenders(model, None, {})
    for contender in contenders:
        for name, parameter in contender.model.named_parameters():
            assert parameter.data_ptr() == model.get_parameter(name).data_ptr()


def test_nearest_has_another_owner():
    vectors = torch.tensor([[1.0, 0.0], [2.0, 0.1], [5.0, 5.0], [0.0, 3.0], [-4.0, 0.0]])
    cosines, indices = demo.nearest(vectors, torch.tensor([0, 0, 1, 2, 2]))
    assert indices.tolist() == [2, 2, 1, 2, 2]
    assert cosines[[0, 3]].tolist() == pytest.approx([0.5**0.5] * 2)


def test_vectors_are_those_of_the_mentions(checkpoint, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    compared = []
    nearest = demo.nearest

    def spy(*arguments):
        compared.append(arguments)
        return nearest(*arguments)

    monkeypatch.setattr(demo, "nearest", spy)
    assert run("--model", checkpoint, "--device", "cpu").exit_code == 0
    ((vectors, owners),) = compared
    model, tokenizer = demo._load(checkpoint, torch.device("cpu"))
    for number, sentence in enumerate(demo.sentences()):
        if spans := [(entity["start"], entity["end"]) for entity in sentence["entities"]]:
            titles = [entity["title"] for entity in sentence["entities"]]
            inputs = tokenizer([sentence["text"]], entity_spans=[spans], entities=[titles], return_tensors="pt")
            with torch.no_grad():
                alone = model(**inputs).entity_last_hidden_state[0]
            assert torch.allclose(vectors[owners == number], alone, atol=1e-5)


def test_the_nearest_is_shown_in_its_sentence():
    mentions = [(number, e["title"]) for number, s in enumerate(demo.sentences()) for e in s["entities"]]
    vectors = torch.eye(len(mentions))
    first, other = 0, mentions.index((5, "Abbey Road Studios"))
    vectors[first, other] = vectors[other, first] = 0.5
    console = Console(width=200)
    with console.capture() as capture:
        console.print(demo._neighbours(demo.sentences(), vectors))
    assert rows(capture.get())[0] == ["[Marie Curie] won the", "songs at [Abbey Road Studios] in north-west", "0.800"]


def test_unknown_devices_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("cuda", "tpu"):
        with pytest.raises(ValueError, match=f"device must be auto, cpu, or cuda where torch sees a GPU, got '{name}'"):
            choose_device(name)
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")


def test_no_download_without_a_model(monkeypatch):
    """Drawn weights and the bundled tokenizer, the same each time."""
    import huggingface_hub

    def refuse(*arguments, **options):
        raise AssertionError(f"asked the hub for {arguments}")

    for name in ("hf_hub_download", "snapshot_download"):
        monkeypatch.setattr(huggingface_hub, name, refuse)
    monkeypatch.setattr(demo, "LukeConfig", lambda **sizes: LukeConfig(**ENCODERS["tiny"], **sizes))
    first, tokenizer = demo._load(None, torch.device("cpu"))
    second, _ = demo._load(None, torch.device("cpu"))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert (first.config.vocab_size, first.config.entity_vocab_size) == (len(tokenizer), len(tokenizer.entity_vocab))


def test_spans_of_the_sentences_are_mentions():
    for sentence in demo.sentences():
        for entity in sentence["entities"]:
            mention = sentence["text"][entity["start"] : entity["end"]]
            assert mention == mention.strip() != ""
            assert sentence["text"][: entity["start"]] == "" or not sentence["text"][entity["start"] - 1].isalnum()


def test_titles_of_the_sentences_are_known():
    known = json.loads((BUNDLED / "entity_vocab.json").read_text(encoding="utf-8"))
    assert {entity["title"] for sentence in demo.sentences() for entity in sentence["entities"]} <= known.keys()


@pytest.mark.slow
def test_base_size():
    result = run("--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "LUKE of 12 layers, hidden size 768, 111.0 M parameters" in result.output
    assert "weights drawn at random (seed 0), vectors mean nothing yet" in result.output
