"""Conversions of checkpoints: what is written, what is kept, what is refused."""

import json
import os
import shutil
import tarfile
import warnings

import pytest
import torch
from checkpoint_cases import (
    ENTITIES,
    QUERIES,
    SIZES,
    TITLES,
    WORDS,
    assert_holds,
    original,
    pack,
    weights_of,
    write,
)
from safetensors.torch import load_file
from typer.testing import CliRunner

from luke_kernels import checkpoint, cli, heads
from luke_kernels.convert import convert
from luke_kernels.model import LukeModel
from luke_kernels.tokenizer import BUNDLED, LukeTokenizer

NAMES = ("LukeModel", *(cls.__name__ for cls in heads.LukeHead.__subclasses__()))
LABELS = {"id2label": {0: "no", 1: "yes"}}
# RoBERTa's words, in a small size.
ROBERTA = {"vocab_size": 50265, "hidden_size": 4, "entity_emb_size": 2, "num_hidden_layers": 1}


def class_of(name):
    return LukeModel if name == "LukeModel" else getattr(heads, name)


def stored_in(directory):
    return load_file(directory / "model.safetensors")


def with_tokenizer(directory):
    """Put a tokenizer of 4,002 words beside a checkpoint."""
    shutil.copytree(BUNDLED, directory, dirs_exist_ok=True)
    return directory


def with_queries(state):
    """Extra queries as a checkpoint without them gets."""
    queries = [name for name in state if ".self.query." in name]
    return state | {name.replace("query", query): state[name] for name in queries for query in QUERIES}


def without_queries(state):
    return {name: tensor for name, tensor in state.items() if not any(query in name for query in QUERIES)}


def encoder(directory, kind="roberta", **changes):
    """Write an encoder's weights, named as RoBERTa's or BERT's, with a vocabulary; return them by our names."""
    sizes = {"vocab_size": 4000, "pad_token_id": 0 if kind == "bert" else 1, **changes}
    state = without_queries(weights_of(heads.LukeForMaskedLM, **sizes))
    state = {name: tensor for name, tensor in state.items() if not ("entity" in name or "pooler" in name)}
    write(directory, {name.replace("luke.", f"{kind}."): t for name, t in state.items()}, "pytorch_model.bin")
    values = {key: value for key, value in SIZES.items() if "entity" not in key}
    (directory / "config.json").write_text(json.dumps({**values, "type_vocab_size": 1, **sizes, "model_type": kind}))
    for file in ("vocab.json", "merges.txt"):
        shutil.copy(BUNDLED / file, directory)
    vocabulary = json.loads((BUNDLED / "vocab.json").read_text())
    vocabulary |= {"@": vocabulary.get("@", 5), "#": vocabulary.get("#", 6)}
    (directory / "vocab.json").write_text(json.dumps(vocabulary))
    return state


def titles(directory, names=TITLES[:3]):
    path = directory / "entities.tsv"
    path.write_text("".join(f"{title}\t1\n" for title in names))
    return path


# Of LUKE


@pytest.mark.parametrize("name", NAMES)
def test_a_luke_keeps_its_class_its_weights_and_its_tokenizer(tmp_path, name):
    cls = class_of(name)
    cls(heads.LukeConfig(**{**SIZES, "vocab_size": 4002})).save_pretrained(tmp_path / "m")
    model = cls.from_pretrained(tmp_path / "m")
    conversion = convert(with_tokenizer(tmp_path / "m"), tmp_path / "a/b")
    assert (conversion.kind, conversion.architecture) == ("luke", name)
    assert conversion.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    again = cls.from_pretrained(tmp_path / "a/b")
    assert_holds(again, dict(model.named_parameters()))
    assert again.config.extra["architectures"] == [name]
    text, spans = "Ada Lovelace was born in London.", [(0, 12), (25, 31)]
    first, second = (LukeTokenizer.from_pretrained(tmp_path / part) for part in ("m", "a/b"))
    assert first(text, entity_spans=spans, entities=["Ada Lovelace", "?"]) == second(
        text, entity_spans=spans, entities=["Ada Lovelace", "?"]
    )
    assert conversion.sizes_bytes == {path.name: path.stat().st_size for path in (tmp_path / "a/b").iterdir()}
    assert {path.name for path in tmp_path.iterdir()} == {"m", "a"}


@pytest.mark.parametrize(
    ("lacking", "name", "lost"),
    [
        ("nothing", "LukeForMaskedLM", ""),
        ("lm_head.dense.bias", "LukeModel", "entity_predictions.bias, .*lm_head.bias"),
        ("entity_predictions.", "LukeModel", "lm_head.bias"),
        ("luke.pooler.", "LukeForMaskedLM", ""),
    ],
)
@pytest.mark.parametrize("named", [None, ["LukeForEntityClassification"], ["GPT2Model", {}], 5], ids=str)
def test_no_head_is_made_up(tmp_path, masked_lm, lacking, name, lost, named):
    state = {key: tensor for key, tensor in masked_lm.items() if not key.startswith(lacking)}
    write(tmp_path / "m", state, config={"architectures": named})
    if lost:
        with pytest.warns(UserWarning, match=rf"^LukeModel from .*m: weights left out: {lost}"):
            conversion = convert(tmp_path / "m", tmp_path / "out")
    else:
        conversion = convert(tmp_path / "m", tmp_path / "out")
    assert conversion.architecture == name
    if name == "LukeModel":
        state = {key.removeprefix("luke."): t for key, t in state.items() if key.startswith("luke.")}
    stored = stored_in(tmp_path / "out")
    assert stored.keys() - {"lm_head.decoder.weight", "lm_head.decoder.bias"} == state.keys()
    assert all(torch.equal(stored[key], state[key]) for key in state)


def test_what_has_no_place_is_named(tmp_path, masked_lm):
    extra = {"classifier.weight": torch.ones(2, 16), "cls_entity_predictions.bias": torch.ones(2)}
    write(tmp_path / "m", {**masked_lm, **extra, "luke.embeddings.position_ids": torch.arange(3)})
    with pytest.warns(UserWarning, match=r"left out: .*") as caught:
        convert(tmp_path / "m", tmp_path / "out")
    assert len(caught) == 1
    assert set(str(caught[0].message).split("left out: ")[1].split(", ")) == extra.keys()


def test_queries_that_the_config_turns_off_are_kept(tmp_path, masked_lm):
    """As in mLUKE's checkpoints."""
    write(tmp_path / "m", masked_lm, config={"use_entity_aware_attention": False})
    for source, output in (("m", "luke"), ("luke", "luke2")):
        convert(tmp_path / source, tmp_path / output)
        assert stored_in(tmp_path / output).keys() >= masked_lm.keys()
        assert not json.loads((tmp_path / output / "config.json").read_text())["use_entity_aware_attention"]
    assert_holds(heads.LukeForMaskedLM.from_pretrained(tmp_path / "luke2", use_entity_aware_attention=True), masked_lm)


def test_dtype_and_shards(tmp_path, masked_lm):
    write(tmp_path / "m", masked_lm)
    conversion = convert(tmp_path / "m", tmp_path / "out", dtype=torch.bfloat16, max_shard_size=10_000)
    assert len(conversion.sizes_bytes) > 3
    expected = {name: tensor.bfloat16() for name, tensor in masked_lm.items()}
    assert_holds(heads.LukeForMaskedLM.from_pretrained(tmp_path / "out"), expected)


def test_a_tokenizer_that_cannot_be_made_is_told(tmp_path, masked_lm):
    write(tmp_path / "m", masked_lm)
    (tmp_path / "m/entity_vocab.json").write_text(json.dumps({"[MASK]": 0, "en:Vienna": 1}))
    told = convert(tmp_path / "m", tmp_path / "none").tokenizer
    assert told.startswith(f"none, {tmp_path}/m must hold vocab.json and merges.txt, or ")
    (tmp_path / "m/sentencepiece.bpe.model").write_bytes(b"")
    assert "sentencepiece, which is not supported" in convert(tmp_path / "m", tmp_path / "mluke").tokenizer
    for output in ("none", "mluke"):
        assert json.loads((tmp_path / output / "entity_vocab.json").read_text()) == {"[MASK]": 0, "en:Vienna": 1}


# Of and for the original repository


@pytest.mark.parametrize("kind", ["tsv", "jsonl"])
def test_an_original_becomes_a_luke(tmp_path, kind):
    state = without_queries(weights_of(heads.LukeForMaskedLM))
    titles = ["[PAD]", "[UNK]", "[MASK]", "Vienna", *"abcde"]
    original(tmp_path / "m", state, titles, kind)
    source = pack(tmp_path / "m", tmp_path / "luke.tar.gz")
    conversion = convert(source, tmp_path / "out")
    assert (conversion.kind, conversion.architecture) == ("original", "LukeForMaskedLM")
    assert conversion.tokenizer == "none; --tokenizer names one, say roberta-base"
    assert_holds(
        heads.LukeForMaskedLM.from_pretrained(tmp_path / "out"),
        dict(heads.LukeForMaskedLM.from_pretrained(source).named_parameters()),
    )
    entities = json.loads((tmp_path / "out/entity_vocab.json").read_text())
    specials = {"[PAD]": 0, "[UNK]": 1, "[MASK]": 2, "[MASK2]": 9}
    if kind == "tsv":
        assert entities == {title: row for row, title in enumerate(titles)} | specials
    else:
        assert entities.items() >= {**specials, "en:Vienna": 3, "de:Viennax": 3}.items()
        assert "en:[MASK]" not in entities


def test_an_original_with_words_beside_it_gets_a_tokenizer(tmp_path):
    state = weights_of(heads.LukeForMaskedLM, vocab_size=4002)
    original(tmp_path / "m", state, ["[PAD]", "[UNK]", "[MASK]", *"abcdef"], vocab_size=4002)
    for file in ("vocab.json", "merges.txt"):
        shutil.copy(BUNDLED / file, tmp_path / "m")
    convert(tmp_path / "m", tmp_path / "out")
    tokenizer = LukeTokenizer.from_pretrained(tmp_path / "out")
    assert (len(tokenizer), tokenizer.entity_mask2_token_id, tokenizer.entity_vocab["f"]) == (4002, 9, 8)


@pytest.mark.parametrize("to", ["luke", "encoder"])
def test_an_original_gets_the_words_of_another_place_and_keeps_its_titles(tmp_path, to):
    state = weights_of(heads.LukeForMaskedLM, vocab_size=4002)
    original(tmp_path / "m", state, ["[PAD]", "[UNK]", "[MASK]", *"abcdef"], vocab_size=4002)
    source = pack(tmp_path / "m", tmp_path / "luke.tar.gz")
    conversion = convert(source, tmp_path / "out", to=to, tokenizer=BUNDLED)
    if to == "luke":
        assert conversion.tokenizer == "4,002 words, 10 titles"
        tokenizer = LukeTokenizer.from_pretrained(tmp_path / "out")
        assert (len(tokenizer), tokenizer.entity_mask2_token_id, tokenizer.entity_vocab["f"]) == (4002, 9, 8)
    else:
        assert conversion.tokenizer == "4,000 words"
        assert (tmp_path / "out/tokenizer.json").exists()


def test_a_luke_without_titles_gets_those_of_the_tokenizer(tmp_path):
    sizes = {"vocab_size": 4002, "entity_vocab_size": 500}
    write(tmp_path / "m", weights_of(LukeModel, **sizes), config=sizes)
    convert(tmp_path / "m", tmp_path / "out", tokenizer=BUNDLED)
    stored = LukeTokenizer.from_pretrained(tmp_path / "out").entity_vocab
    assert stored == LukeTokenizer.from_pretrained(BUNDLED).entity_vocab
    write(tmp_path / "few", weights_of(LukeModel, vocab_size=4002), config={"vocab_size": 4002})
    with pytest.raises(ValueError, match=r"tokenizer must have titles of 9 entities, got the id \d+$"):
        convert(tmp_path / "few", tmp_path / "out2", tokenizer=BUNDLED)


@pytest.mark.parametrize("form", ["folder", "archive"])
@pytest.mark.parametrize("kind", ["tsv", "jsonl"])
def test_from_an_original_and_back(tmp_path, temporary, kind, form):
    state = without_queries(weights_of(heads.LukeForMaskedLM, **ROBERTA))
    first = original(tmp_path / "m", state, TITLES[:3] + list("abcdef"), kind, **ROBERTA)
    metadata = json.loads((first / "metadata.json").read_text())
    (first / "metadata.json").write_text(json.dumps({**metadata, "max_mention_length": 16, "arguments": {}}))
    convert(first, tmp_path / "luke")
    path = tmp_path / ("back.tar.gz" if form == "archive" else "back")
    conversion = convert(tmp_path / "luke", path, to="original")
    convert(path, tmp_path / "luke2")
    assert not list(temporary.iterdir())
    assert stored_in(tmp_path / "luke2").keys() == stored_in(tmp_path / "luke").keys()
    for name, tensor in stored_in(tmp_path / "luke").items():
        assert torch.equal(stored_in(tmp_path / "luke2")[name], tensor), name
    for file in ("config.json", "entity_vocab.json"):
        first, second = (json.loads((tmp_path / folder / file).read_text()) for folder in ("luke", "luke2"))
        assert first == second
    if form == "archive":
        assert list(conversion.sizes_bytes) == ["back.tar.gz"]
        with tarfile.open(path) as archive:
            assert sorted(archive.getnames()) == ["entity_vocab.jsonl", "metadata.json", "pytorch_model.bin"]
            archive.extractall(tmp_path / "unpacked", filter="data")
        path = tmp_path / "unpacked"
    # As the original repository reads them.
    back = torch.load(path / "pytorch_model.bin", weights_only=True)
    entity_rows = ("entity_embeddings.entity_embeddings.weight", "entity_predictions.bias")
    for name, tensor in state.items():
        rows = len(tensor)  # before [MASK2]
        assert torch.equal(back[name.removeprefix("luke.")][:rows], tensor)
        assert len(back[name.removeprefix("luke.")]) == rows + (name.removeprefix("luke.") in entity_rows)
    tied = {"lm_head.decoder.weight", "lm_head.decoder.bias", "entity_predictions.decoder.weight"}
    assert back.keys() == {name.removeprefix("luke.") for name in state} | tied
    assert conversion.num_parameters == sum(t.numel() for n, t in back.items() if n not in tied)
    stated = json.loads((path / "metadata.json").read_text())
    assert stated["model_config"].items() >= {"vocab_size": 50265, "bert_model_name": "roberta-base"}.items()
    assert (stated["max_seq_length"], stated["max_entity_length"], stated["max_mention_length"]) == (18, 128, 30)


def test_an_original_keeps_its_lengths(tmp_path, masked_lm):
    original(tmp_path / "m", masked_lm, TITLES)
    convert(tmp_path / "m", tmp_path / "out", to="original")
    stated = json.loads((tmp_path / "out/metadata.json").read_text())
    assert (stated["max_seq_length"], stated["max_entity_length"], stated["max_mention_length"]) == (512, 128, 30)


def test_what_was_trained_stays_in_an_original(tmp_path):
    """Rows of markers, queries and a head of one's own, which the original repository does not have."""
    name = "LukeForEntityClassification"
    sizes = {**ROBERTA, "vocab_size": 50267}
    state = weights_of(class_of(name), **sizes)
    (tmp_path / "m").mkdir()
    (tmp_path / "m/entity_vocab.json").write_text(json.dumps({"[MASK]": 2, "[MASK2]": 3, "a": 4}))
    write(tmp_path / "m", state, config={**sizes, "architectures": [name], "bert_model_name": "roberta-base"})
    with pytest.warns(UserWarning, match=r"^\[MASK2\] has a row of its own, .* by that of \[MASK\]$"):
        convert(tmp_path / "m", tmp_path / "back", to="original")
    conversion = convert(tmp_path / "back", tmp_path / "out")
    assert conversion.architecture == name
    state[ENTITIES][3] = state[ENTITIES][2]
    assert_holds(class_of(name).from_pretrained(tmp_path / "out"), state)


@pytest.mark.parametrize(
    ("vocabulary", "lines"),
    [
        (
            {"[MASK]": 1, "en:Vienna": 0, "de:Wien": 0, "en:A: B": 2},
            [
                [["Vienna", "en"], ["Wien", "de"]],
                [["[MASK]", "de"], ["[MASK]", "en"]],
                [["A: B", "en"]],
            ],
        ),
        ({"[MASK]": 1, "a:b": 0, "Vienna": 2}, [[["a:b", None]], [["[MASK]", None]], [["Vienna", None]]]),
        ({"[MASK]": 0}, [[["[MASK]", None]]]),
    ],
)
def test_titles_of_languages_in_an_original(tmp_path, masked_lm, vocabulary, lines):
    write(tmp_path / "m", masked_lm, config={"bert_model_name": "roberta-base"})
    (tmp_path / "m/entity_vocab.json").write_text(json.dumps(vocabulary))
    convert(tmp_path / "m", tmp_path / "out", to="original")
    written = [json.loads(line) for line in (tmp_path / "out/entity_vocab.jsonl").read_text().splitlines()]
    assert written == [{"id": row, "entities": names, "count": 0} for row, names in enumerate(lines)]


@pytest.mark.parametrize(
    ("stored", "known", "named"),
    [
        ("roberta", True, "roberta-base"),
        ("xlm-roberta", True, "roberta-base"),
        (None, True, "roberta-base"),
        ("roberta", False, "roberta"),
        ("my/roberta", True, "my/roberta"),
    ],
)
def test_an_original_names_its_encoder_as_the_hub_does(monkeypatch, stored, known, named):
    """What comes from a folder has only a kind, by which no tokenizer is found."""
    model = LukeModel(heads.LukeConfig(**SIZES))
    if stored is not None:
        model.config.extra["bert_model_name"] = stored
    if known:
        monkeypatch.setitem(checkpoint.HUB_ENCODERS, (38, 16), "roberta-base")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, values = checkpoint.as_original(model)
    assert values["bert_model_name"] == named
    told = [str(warning.message).partition(",")[0] for warning in caught]
    assert told == ([] if named == "my/roberta" else [f"bert_model_name in metadata.json is {named!r}"])


# Of encoders, and for them


@pytest.mark.parametrize("kind", ["roberta", "xlm-roberta"])
def test_an_encoder_becomes_a_luke(tmp_path, kind):
    state = encoder(tmp_path / "m", "roberta")
    values = json.loads((tmp_path / "m/config.json").read_text())
    (tmp_path / "m/config.json").write_text(json.dumps({**values, "model_type": kind}))
    conversion = convert(tmp_path / "m", tmp_path / "out", entity_vocab=titles(tmp_path))
    assert (conversion.kind, conversion.architecture) == ("encoder", "LukeForMaskedLM")
    stored = stored_in(tmp_path / "out")
    assert not any("pooler" in name for name in stored)
    for name, tensor in with_queries(state).items():
        assert torch.equal(stored[name][: len(tensor)], tensor), name
    tokenizer = LukeTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.entity_vocab == {"[PAD]": 0, "[UNK]": 1, "[MASK]": 2, "[MASK2]": 3}
    assert len(tokenizer) == len(stored[WORDS]) == 4002
    assert stored[ENTITIES].shape == (4, 256)
    assert stored[ENTITIES].any(dim=1).all()
    assert json.loads((tmp_path / "out/config.json").read_text())["bert_model_name"] == kind


def test_the_size_of_entities_on_an_encoder(tmp_path):
    encoder(tmp_path / "m")
    convert(tmp_path / "m", tmp_path / "out", entity_vocab=titles(tmp_path), entity_emb_size=8)
    assert stored_in(tmp_path / "out")[ENTITIES].shape == (4, 8)
    assert json.loads((tmp_path / "out/config.json").read_text())["entity_emb_size"] == 8


@pytest.mark.parametrize("kind", ["roberta", "bert"])
def test_from_an_encoder_and_back(tmp_path, kind):
    state = encoder(tmp_path / "m", kind)
    convert(tmp_path / "m", tmp_path / "luke", entity_vocab=titles(tmp_path))
    conversion = convert(tmp_path / "luke", tmp_path / "back", to="encoder")
    assert conversion.architecture == "RobertaForMaskedLM"
    assert conversion.tokenizer == "4,000 words"
    back = {name.replace("roberta.", "luke."): tensor for name, tensor in stored_in(tmp_path / "back").items()}
    assert back.keys() == state.keys()
    if kind == "bert":  # whose positions have no row for the pad
        name = "luke.embeddings.position_embeddings.weight"
        state[name] = torch.cat([torch.zeros(1, 16), state[name]])
    for name, tensor in state.items():
        assert torch.equal(back[name], tensor), name
    values = json.loads((tmp_path / "back/config.json").read_text())
    assert (values["model_type"], values["vocab_size"]) == ("roberta", 4000)
    assert not any("entity" in key or "bert" in key for key in values)
    assert (tmp_path / "back/tokenizer.json").exists()


def test_a_word_decoder_of_its_own_goes_along(tmp_path, masked_lm):
    masked_lm["lm_head.decoder.weight"] = torch.randn_like(masked_lm[WORDS])
    write(tmp_path / "m", masked_lm, config={"tie_word_embeddings": False})
    conversion = convert(tmp_path / "m", tmp_path / "out", to="encoder")
    stored = stored_in(tmp_path / "out")
    assert torch.equal(stored["lm_head.decoder.weight"], masked_lm["lm_head.decoder.weight"])
    assert torch.equal(stored["lm_head.decoder.bias"], stored["lm_head.bias"])  # written, and counted once
    assert conversion.num_parameters == sum(t.numel() for t in stored.values()) - stored["lm_head.bias"].numel()
    assert not json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"]


def test_the_encoder_of_a_classifier(tmp_path):
    state = weights_of(heads.LukeForTokenClassification, vocab_size=4002)
    write(tmp_path / "m", state, config={"vocab_size": 4002, "architectures": ["LukeForTokenClassification"]})
    with pytest.warns(UserWarning, match=r"^RobertaModel: weights left out: classifier.weight, classifier.bias$"):
        conversion = convert(with_tokenizer(tmp_path / "m"), tmp_path / "out", to="encoder")
    stored = stored_in(tmp_path / "out")
    assert conversion.architecture == "RobertaModel"
    assert conversion.num_parameters == sum(tensor.numel() for tensor in stored.values())
    words = {
        name.removeprefix("luke."): tensor
        for name, tensor in without_queries(state).items()
        if not name.startswith(("luke.entity", "classifier"))
    }
    words["embeddings.word_embeddings.weight"] = words["embeddings.word_embeddings.weight"][:4000]
    assert stored.keys() == words.keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in words.items())


@pytest.mark.parametrize(("size", "left"), [(50267, 50265), (40, 40)])
def test_markers_without_a_tokenizer_are_known_by_the_size(tmp_path, size, left):
    sizes = {**ROBERTA, "vocab_size": size}
    write(tmp_path / "m", weights_of(LukeModel, **sizes), config=sizes)
    conversion = convert(tmp_path / "m", tmp_path / "out", to="encoder")
    assert conversion.tokenizer.startswith("none, ")
    assert len(stored_in(tmp_path / "out")["embeddings.word_embeddings.weight"]) == left


def test_words_that_are_not_the_model_s_make_no_tokenizer(tmp_path):
    encoder(tmp_path / "m", vocab_size=4008)
    conversion = convert(tmp_path / "m", tmp_path / "out", entity_vocab=titles(tmp_path))
    assert conversion.tokenizer == "none, it must have the model's 4010 words with <ent> and <ent2>, got 4002"
    assert "[MASK2]" in json.loads((tmp_path / "out/entity_vocab.json").read_text())


# What is refused, and what is left then


@pytest.mark.parametrize(
    ("output", "arguments", "message"),
    [
        ("full", {}, r"^output must be new or an empty directory, got .*/full, which exists$"),
        ("file", {}, r"^output must be new or an empty directory, got .*/file, which exists$"),
        ("there.tar.gz", {"to": "original"}, r"^output must be new or .*/there.tar.gz, which exists$"),
        ("new.tar.gz", {}, r"^output must be a directory, or for original a .tar.gz, got .*/new.tar.gz$"),
        ("new.tar.xz", {"to": "original"}, r"^output must be a directory, or for original a .tar.gz"),
        ("new.zip", {"to": "original"}, r"^output must be a directory, or for original a .tar.gz, got .*/new.zip$"),
        ("new.safetensors", {}, r"^output must be a directory, .*, got .*/new.safetensors$"),
        ("new.BIN", {"to": "encoder"}, r"^output must be a directory, .*, got .*/new.BIN$"),
        (
            "new",
            {"to": "original", "tokenizer": "a"},
            r"^tokenizer \(--tokenizer\) must be None for original, .*, got a$",
        ),
        ("new", {"to": "bert"}, r"^to must be one of luke, original, encoder, onnx, got 'bert'$"),
        ("new", {"dtype": torch.int8}, r"^dtype must be one of torch.float16, .*, got torch.int8$"),
        ("new", {"dtype": "half"}, r"^dtype must be one of torch.float16, .*, got half$"),
        ("new", {"max_shard_size": "5 apples"}, r"^max_shard_size must be .*, got '5 apples'$"),
        ("new.tar.gz", {"to": "original", "max_shard_size": 0}, r"^max_shard_size must be .*, got 0$"),
    ],
)
def test_refused_before_anything_is_read(tmp_path, output, arguments, message):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").touch()
    for name in ("file", "there.tar.gz"):
        (tmp_path / name).touch()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=message):
        convert("/nowhere", tmp_path / output, **arguments)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("source", "arguments", "message"),
    [
        (
            "luke",
            {"entity_vocab": "a.tsv"},
            r"^entity_vocab \(--entity-vocab\) must be None for .* a LUKE, .*, got a.tsv$",
        ),
        ("original", {"entity_vocab": "a.tsv"}, r"^entity_vocab \(--entity-vocab\) must be None for .* a LUKE"),
        ("roberta", {}, r"^entity_vocab \(--entity-vocab\) must be given for .* an encoder"),
        ("roberta", {"entity_vocab": "TITLES", "to": "encoder"}, r"^to must be luke, original or onnx for .* encoder"),
        ("roberta", {"entity_vocab": "/nowhere.tsv"}, r"^entity_vocab \(--entity-vocab\) must be a file, got /nowhere"),
        (
            "luke",
            {"entity_emb_size": 8},
            r"^entity_emb_size \(--entity-emb-size\) must be None for .* LUKE, .*, got 8$",
        ),
        (
            "roberta",
            {"entity_vocab": "TITLES", "entity_emb_size": 0},
            r"^entity_emb_size must be a positive int, got 0$",
        ),
        ("luke", {"tokenizer": "/nowhere"}, r"^/nowhere must be .*, got no such directory or file$"),
        (
            "original",
            {"tokenizer": BUNDLED},
            r"^tokenizer \(--tokenizer\) must have the model's 40 words .*, got 4002 of ",
        ),
        ("bert", {"entity_vocab": "TITLES", "to": "original"}, r"^to must be luke or encoder .* no RoBERTa's"),
        ("luke", {"to": "original"}, r"must hold an entity vocabulary, .*, got none$"),
        ("roberta", {"entity_vocab": "PLAIN"}, r"/entities.tsv must hold .*, got no \[PAD\], \[UNK\], \[MASK\]$"),
        ("roberta", {"entity_vocab": "UNMASKED"}, r"must hold the titles .*, got no \[MASK\]$"),
        ("distilbert", {"entity_vocab": "TITLES"}, r"m must be a LUKE or a roberta, .*, got model_type 'distilbert'$"),
        ("nothing", {}, r"config.json must exist"),
        ("damaged", {}, r"must be a whole safetensors file"),
    ],
)
def test_what_fails_leaves_nothing(tmp_path, temporary, masked_lm, source, arguments, message):
    path = tmp_path / "m"
    if source == "original":
        original(path, masked_lm, TITLES)
    elif source in ("roberta", "bert", "distilbert"):
        encoder(path, source)
    elif source == "nothing":
        path.mkdir()
    else:
        write(path, masked_lm)
        if source == "damaged":
            (path / "model.safetensors").write_bytes(b"\xff" * 20)
    vocabularies = {"TITLES": TITLES[:3], "PLAIN": ["Vienna", "London"], "UNMASKED": TITLES[:2]}
    if (names := vocabularies.get(arguments.get("entity_vocab"))) is not None:
        arguments = {**arguments, "entity_vocab": titles(tmp_path, names)}
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.rglob("*"))
    for output in ("new/out", "empty"):
        with pytest.raises((ValueError, OSError), match=message):
            convert(path, tmp_path / output, **arguments)
        assert sorted(tmp_path.rglob("*")) == before


def test_titles_beyond_the_table_make_no_original(tmp_path, masked_lm):
    write(tmp_path / "m", masked_lm)
    (tmp_path / "m/entity_vocab.json").write_text(json.dumps({"[MASK]": 0, "a": 9}))
    with pytest.raises(ValueError, match=r"m must have titles of 9 entities, got the id 9$"):
        convert(tmp_path / "m", tmp_path / "out", to="original")


@pytest.mark.parametrize("to", ["luke", "encoder", "original"])
def test_an_empty_directory_is_filled_and_stays_the_same(tmp_path, monkeypatch, masked_lm, to):
    """It may be a mount point, of another mode, or where the shell is."""
    write(tmp_path / "m", masked_lm, config={"bert_model_name": "roberta-base"})
    (tmp_path / "m/entity_vocab.json").write_text(json.dumps({"[MASK]": 0}))
    (tmp_path / "out").mkdir(mode=0o750)
    before, beside = (tmp_path / "out").stat(), set(tmp_path.iterdir())
    monkeypatch.chdir(tmp_path / "out")
    conversion = convert("../m", ".", to=to)
    after = (tmp_path / "out").stat()
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)
    assert set(os.listdir(".")) == conversion.sizes_bytes.keys()
    assert ("metadata.json" if to == "original" else "config.json") in conversion.sizes_bytes
    assert set(tmp_path.iterdir()) == beside


def test_a_move_that_fails_leaves_an_empty_directory(tmp_path, monkeypatch, masked_lm):
    write(tmp_path / "m", masked_lm)
    (tmp_path / "out").mkdir()
    replace = os.replace

    def fail(source, target):
        if target == tmp_path / "out/config.json":
            raise OSError("no space left")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        convert(tmp_path / "m", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


# The command


def test_the_command_tells_what_it_did(tmp_path, masked_lm):
    write(tmp_path / "m", masked_lm)
    arguments = [
        "convert",
        str(tmp_path / "m"),
        str(tmp_path / "out"),
        "--dtype",
        "bfloat16",
        "--max-shard-size",
        "1MB",
    ]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    first, model, tokenizer, written = result.output.splitlines()
    assert first == f"{tmp_path}/m: LUKE, as ours and transformers'"
    number = sum(tensor.numel() for tensor in masked_lm.values())
    assert model == f"model: LukeForMaskedLM, {number:,} parameters, torch.bfloat16"
    assert tokenizer.startswith(f"tokenizer: none, {tmp_path}/m must hold vocab.json")
    assert written == f"{tmp_path}/out: config.json (0.0 MB), model.safetensors (0.0 MB)"


@pytest.mark.filterwarnings("default")
@pytest.mark.filterwarnings("default")
def test_the_command_warns_in_a_sentence(tmp_path, masked_lm, monkeypatch, capsys):
    write(tmp_path / "m", {**masked_lm, "classifier.weight": torch.ones(2, 16)})
    monkeypatch.setattr("sys.argv", ["luke-kernels", "convert", str(tmp_path / "m"), str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    expected = f"warning: LukeForMaskedLM from {tmp_path}/m: weights left out: classifier.weight\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--to", "bert"], "to must be one of luke, original, encoder, onnx, got 'bert'"),
        (["--dtype", "half8"], "dtype must be one of"),
        (["--entity-vocab", "a.tsv"], "entity_vocab (--entity-vocab) must be None"),
        (["--entity-emb-size", "8"], "entity_emb_size (--entity-emb-size) must be None"),
        (["--tokenizer", "/nowhere"], "/nowhere must be a directory"),
        (["--max-shard-size", "0"], "max_shard_size must be"),
    ],
    ids=str,
)
def test_the_command_refuses(tmp_path, masked_lm, options, message):
    write(tmp_path / "m", masked_lm)
    result = CliRunner().invoke(cli.app, ["convert", str(tmp_path / "m"), str(tmp_path / "out"), *options])
    assert str(result.exception).startswith(message)
    assert not (tmp_path / "out").exists()
