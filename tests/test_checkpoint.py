"""Checkpoints of every origin: what is made up, what is refused, and what saving leaves behind."""

import contextlib
import json
import os
import re
import resource
import stat
import subprocess
import sys

import pytest
import torch
from checkpoint_cases import (
    ENTITIES,
    FILES,
    INPUTS,
    QUERIES,
    SELF,
    SIZES,
    TITLES,
    WORDS,
    assert_holds,
    original,
    pack,
    weights_of,
    write,
)
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from luke_kernels.config import LukeConfig
from luke_kernels.heads import (
    LukeForEntityClassification,
    LukeForMaskedLM,
    LukeForSequenceClassification,
    LukeForTokenClassification,
)
from luke_kernels.model import LukeModel

# What tells one save's shards from another's.
SHARD_TAG = re.compile(r"-[0-9a-f]{8}-")


def tree(directory):
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


# Names and forms


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("left", [[], ["w2e_query"], ["e2w_query", "e2e_query"]], ids=str)
def test_missing_queries_are_copies_with_memory_of_their_own(tmp_path, masked_lm, file, left):
    lacking = [query for query in QUERIES if query not in left]
    state = {name: tensor for name, tensor in masked_lm.items() if not any(query in name for query in lacking)}
    model = LukeForMaskedLM.from_pretrained(write(tmp_path / "m", state, file))
    model.save_pretrained(tmp_path / "saved")
    assert set(load_file(tmp_path / "saved" / "model.safetensors")) >= set(masked_lm)
    for part in ("weight", "bias"):
        for query in QUERIES:
            source = "query" if query in lacking else query
            assert torch.equal(model.get_parameter(f"{SELF}{query}.{part}"), masked_lm[f"{SELF}{source}.{part}"])
        with torch.no_grad():
            model.get_parameter(f"{SELF}query.{part}").zero_()
        for query in QUERIES:
            assert model.get_parameter(f"{SELF}{query}.{part}").any(), "shares the memory of query"


def test_queries_that_shared_memory_when_saved_do_not_when_loaded(tmp_path, masked_lm):
    for query in QUERIES:
        masked_lm[f"{SELF}{query}.weight"] = masked_lm[f"{SELF}query.weight"]
    model = LukeForMaskedLM.from_pretrained(write(tmp_path / "m", masked_lm, "pytorch_model.bin"))
    with torch.no_grad():
        model.get_parameter(f"{SELF}query.weight").zero_()
    assert all(model.get_parameter(f"{SELF}{query}.weight").any() for query in QUERIES)


def old_norm(name):
    return name.replace("orm.weight", "orm.gamma").replace("orm.bias", "orm.beta")


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize(
    "naming",
    [str, lambda name: name.removeprefix("luke."), "module.{}".format, old_norm],
    ids=["luke", "bare", "module", "gamma"],
)
def test_names_of_other_checkpoints(tmp_path, masked_lm, naming, file):
    stored = {naming(name): tensor for name, tensor in masked_lm.items()}
    stored[naming("luke.embeddings.position_ids")] = torch.arange(514)[None]
    directory = write(tmp_path / "m", stored, file)
    assert_holds(LukeForMaskedLM.from_pretrained(directory), masked_lm)
    bare = {name.removeprefix("luke."): t for name, t in masked_lm.items() if name.startswith("luke.")}
    assert_holds(LukeModel.from_pretrained(directory), bare)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("wrapped", [True, False])
def test_pickles_of_old_and_of_deepspeed(tmp_path, masked_lm, zipped, wrapped):
    state = {name: nn.Parameter(tensor) for name, tensor in masked_lm.items()}
    stored = {"module": state, "global_steps": 3, "lr_scheduler": None} if wrapped else {**state, "epoch": 3}
    write(tmp_path / "m", stored, "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    assert_holds(LukeForMaskedLM.from_pretrained(tmp_path / "m"), masked_lm)


def test_shards_of_pickles_and_of_safetensors(tmp_path, masked_lm):
    for form, save in (("model-{}.safetensors", save_file), ("pytorch_model-{}.bin", torch.save)):
        directory = tmp_path / save.__module__
        write(directory, {}, "unused.bin")
        weight_map = {name: form.format(number % 3) for number, name in enumerate(sorted(masked_lm))}
        for file in set(weight_map.values()):
            save({name: masked_lm[name] for name in weight_map if weight_map[name] == file}, directory / file)
        index = FILES[save is torch.save] + ".index.json"
        (directory / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        assert_holds(LukeForMaskedLM.from_pretrained(directory), masked_lm)


@pytest.mark.parametrize("cls", [LukeModel, LukeForMaskedLM])
def test_mask_of_lite_models_is_trained(tmp_path, cls):
    """[MASK] is entity 0 there, which is no padding."""
    state = weights_of(cls, entity_vocab_size=4)
    model = cls.from_pretrained(write(tmp_path / "m", state, config={"entity_vocab_size": 4})).train()
    table = model.get_entity_embeddings().weight
    assert torch.equal(table, state[ENTITIES if cls is LukeForMaskedLM else ENTITIES.removeprefix("luke.")])
    output = model(**INPUTS)
    states = output.entity_last_hidden_state if cls is LukeModel else output.logits
    (states * torch.randn_like(states)).sum().backward()
    assert table.grad[0].abs().max() > 1e-6
    assert not table.grad[1].any()


# Heads, ties, dtypes


def test_a_new_head_is_announced_and_others_are_left_out_quietly(tmp_path, masked_lm):
    directory = write(tmp_path / "m", {name: tensor.bfloat16() for name, tensor in masked_lm.items()})
    with pytest.warns(UserWarning, match=r"new, to be trained: classifier.bias, classifier.weight$") as caught:
        model = LukeForTokenClassification.from_pretrained(directory, num_labels=5)
    assert [warning.filename for warning in caught] == [__file__]
    assert model.classifier.weight.shape == (5, 16)
    assert model.classifier.weight.dtype == torch.bfloat16
    assert 0.01 < model.classifier.weight.std() < 0.04
    assert not model.classifier.bias.any()
    assert (model.config.num_labels, model.num_labels) == (5, 5)


def test_a_new_pooler_is_announced(tmp_path):
    directory = write(tmp_path / "m", weights_of(LukeForTokenClassification))
    with pytest.warns(UserWarning, match=r"new, to be trained: pooler.dense.bias, pooler.dense.weight$"):
        LukeModel.from_pretrained(directory)


def test_unexpected_weights_are_named_once(tmp_path, masked_lm):
    directory = write(tmp_path / "m", {**masked_lm, "luke.encoder.adapter.weight": torch.ones(2)})
    with pytest.warns(UserWarning, match=r"unexpected, left out: luke.encoder.adapter.weight$") as caught:
        model = LukeForMaskedLM.from_pretrained(directory)
    assert len(caught) == 1
    assert_holds(model, masked_lm)


@pytest.mark.parametrize("file", FILES)
def test_a_word_decoder_that_differs_is_kept_apart(tmp_path, masked_lm, file):
    state = {**masked_lm, "lm_head.decoder.weight": torch.randn(40, 16)}
    directory = write(tmp_path / "m", state, file)
    with pytest.warns(UserWarning, match=r"^lm_head.decoder.weight differs from .* kept apart") as caught:
        model = LukeForMaskedLM.from_pretrained(directory)
    assert len(caught) == 1
    assert_holds(model, state)
    model.save_pretrained(tmp_path / "saved")
    stored = load_file(tmp_path / "saved" / "model.safetensors")
    assert torch.equal(stored["entity_predictions.decoder.weight"], masked_lm[ENTITIES])
    again = LukeForMaskedLM.from_pretrained(tmp_path / "saved")
    assert_holds(again, state)
    assert not again.config.tie_word_embeddings
    assert again.entity_predictions.decoder.weight is again.get_entity_embeddings().weight
    torch.testing.assert_close(again(**INPUTS).logits, model(**INPUTS).logits)


@pytest.mark.parametrize("tied", [True, False])
def test_a_word_decoder_that_is_missing_is_tied(tmp_path, masked_lm, tied):
    directory = write(tmp_path / "m", masked_lm, config={"tie_word_embeddings": tied})
    model = LukeForMaskedLM.from_pretrained(directory)
    assert_holds(model, masked_lm)
    assert model.lm_head.decoder.weight is model.get_input_embeddings().weight
    assert model.config.tie_word_embeddings


@pytest.mark.parametrize("file", FILES)
def test_an_equal_word_decoder_of_an_untied_config_has_its_own_memory(tmp_path, masked_lm, file):
    state = {**masked_lm, "lm_head.decoder.weight": masked_lm[WORDS].clone()}
    model = LukeForMaskedLM.from_pretrained(write(tmp_path / "m", state, file, {"tie_word_embeddings": False}))
    assert_holds(model, state)
    with torch.no_grad():
        model.get_input_embeddings().weight.zero_()
    assert model.lm_head.decoder.weight.any()


def test_the_bias_of_words_may_be_stored_with_the_decoder(tmp_path, masked_lm):
    stored = dict(masked_lm)
    stored["lm_head.decoder.bias"] = stored.pop("lm_head.bias")
    assert_holds(LukeForMaskedLM.from_pretrained(write(tmp_path / "m", stored)), masked_lm)


def test_an_entity_decoder_that_differs_is_refused(tmp_path, masked_lm):
    state = {**masked_lm, "entity_predictions.decoder.weight": torch.randn(9, 8)}
    with pytest.raises(ValueError, match=r"entity_predictions.decoder.weight must equal .* they differ"):
        LukeForMaskedLM.from_pretrained(write(tmp_path / "m", state))


@pytest.mark.parametrize("file", FILES)
def test_dtype_device_backend_and_mode(tmp_path, masked_lm, file):
    directory = write(tmp_path / "m", {name: tensor.half() for name, tensor in masked_lm.items()}, file)
    assert LukeForMaskedLM.from_pretrained(directory).dtype == torch.float16
    model = LukeForMaskedLM.from_pretrained(directory, dtype=torch.float32, backend="sdpa")
    assert_holds(model, {name: tensor.half().float() for name, tensor in masked_lm.items()})
    assert not any(module.training for module in model.modules())
    assert {layer.attention["self"].backend for layer in model.luke.encoder["layer"]} == {"sdpa"}
    elsewhere = LukeForMaskedLM.from_pretrained(directory, device="meta")
    assert {parameter.device.type for parameter in elsewhere.parameters()} == {"meta"}
    with pytest.raises(ValueError, match=r"^backend must .*, got 'fast'"):
        LukeForMaskedLM.from_pretrained(directory, backend="fast")
    with pytest.raises(TypeError, match=r"^dtype must .*, got 'bfloat16'"):
        LukeForMaskedLM.from_pretrained(directory, dtype="bfloat16")


# The original repository


@pytest.mark.parametrize("decoders", [True, False])
@pytest.mark.parametrize(
    ("archived", "kind", "place"),
    [
        *((None, kind, place) for kind in ("tsv", "jsonl") for place in ("in place", "appended")),
        *((compression, "tsv", "appended") for compression in ("gz", "bz2", "xz", "")),
    ],
)
def test_original_repository(tmp_path, temporary, archived, kind, place, decoders):
    sizes = {"vocab_size": 50265, "hidden_size": 4, "entity_emb_size": 2}
    state = weights_of(LukeForMaskedLM, **sizes)
    state = {name: tensor for name, tensor in state.items() if not any(query in name for query in QUERIES)}
    stored = {**state, "luke.embeddings.position_ids": torch.arange(20)[None]}
    if decoders:  # as the original repository's models name what they tie
        stored["lm_head.decoder.weight"] = stored[WORDS]
        stored["lm_head.decoder.bias"] = stored["lm_head.bias"]
        stored["entity_predictions.decoder.weight"] = stored[ENTITIES]
    vocabulary = [*TITLES[:7], "[MASK2]", "d"] if place == "in place" else TITLES
    path = original(tmp_path / "m", stored, vocabulary, kind, **sizes)
    if archived is not None:
        path = pack(path, tmp_path / f"luke.tar.{archived}".rstrip("."), f"w:{archived}")
    model = LukeForMaskedLM.from_pretrained(path)
    assert not list(temporary.iterdir())

    expected = dict(state)
    for name in (WORDS, "lm_head.bias"):
        expected[name] = torch.cat([state[name], state[name][1039:1040], state[name][10431:10432]])
    row = 7 if place == "in place" else 9
    for name in (ENTITIES, "entity_predictions.bias"):
        rows = [state[name][:row], state[name][2:3], state[name][row + 1 :]]
        expected[name] = torch.cat(rows)
    for name, tensor in state.items():
        if ".self.query." in name:
            expected |= {name.replace("query", query): tensor for query in QUERIES}
    assert_holds(model, expected)
    assert (model.config.vocab_size, model.config.entity_vocab_size) == (50267, max(9, row + 1))
    assert model.config.extra["bert_model_name"] == "roberta-base"
    output = model(**INPUTS)
    assert output.logits.isfinite().all()
    model.save_pretrained(tmp_path / "saved")
    assert_holds(LukeForMaskedLM.from_pretrained(tmp_path / "saved"), expected)


def test_another_vocabulary_of_the_original_repository_gets_no_markers(tmp_path):
    state = weights_of(LukeForMaskedLM)
    model = LukeForMaskedLM.from_pretrained(original(tmp_path / "m", state, ["[PAD]", "[UNK]"]))
    assert_holds(model, state)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "metadata.json must hold an object model_config, got None"),
        ({"model_config": [1]}, r"metadata.json must hold an object model_config, got \[1\]"),
        ({"model_config": {**SIZES, "entity_vocab_size": "9"}}, "entity_vocab_size must be a positive int, got '9'"),
        ({"model_config": {**SIZES, "vocab_size": "50265"}}, "vocab_size must be a positive int, got '50265'"),
    ],
    ids=["none", "list", "entities", "words"],
)
def test_refused_metadata(tmp_path, masked_lm, metadata, message):
    directory = original(tmp_path / "m", masked_lm, TITLES)
    (directory / "metadata.json").write_text(json.dumps(metadata))
    with pytest.raises(ValueError, match=message):
        LukeForMaskedLM.from_pretrained(directory)


# Encoders


def encoder_checkpoint(directory, kind, head=None, **changes):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {key: value for key, value in SIZES.items() if not key.startswith("entity")}
    sizes |= {"type_vocab_size": 2} if kind == "Bert" else {"type_vocab_size": 1, "layer_norm_eps": 1e-5}
    config = getattr(transformers, f"{kind}Config")(**{**sizes, **changes})
    model = getattr(transformers, f"{kind}{head or 'Model'}")(config).eval()
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, std=0.2)
        if "position_embeddings" in name and kind != "Bert":
            parameter.data[1] = 0
    model.save_pretrained(directory)
    return model


ENCODERS = [
    ("Roberta", None),
    ("Roberta", "ForMaskedLM"),
    ("XLMRoberta", None),
    ("Bert", None),
    ("Bert", "ForMaskedLM"),
    ("Bert", "ForPreTraining"),
]


@pytest.mark.parametrize(("kind", "head"), ENCODERS)
@pytest.mark.filterwarnings("ignore:.*weights new, to be trained. (luke.)?pooler:UserWarning")
def test_words_of_an_encoder_keep_their_states(tmp_path, kind, head):
    theirs = encoder_checkpoint(tmp_path / "m", kind, head)
    base = getattr(theirs, theirs.base_model_prefix) if head else theirs
    ours = LukeModel.from_encoder(tmp_path / "m", entity_vocab_size=7, marker_token_ids=(11, 12))
    pad = theirs.config.pad_token_id
    ids = torch.tensor([[3, 5, 6, 7, 9], [4, 8, 9, pad, pad]])
    mask = (ids != pad).long()
    with torch.no_grad():
        expected, result = base(ids, mask), ours(ids, mask)
    real = mask.bool()
    torch.testing.assert_close(result.last_hidden_state[real], expected[0][real], rtol=1e-5, atol=1e-5)
    if expected.pooler_output is not None:
        torch.testing.assert_close(result.pooler_output, expected.pooler_output, rtol=1e-5, atol=1e-5)
    assert not ours.training


@pytest.mark.parametrize(("kind", "head"), ENCODERS)
@pytest.mark.filterwarnings("ignore:.*weights new, to be trained. (luke.)?pooler:UserWarning")
def test_what_an_encoder_gives_to_a_luke(tmp_path, kind, head):
    theirs = encoder_checkpoint(tmp_path / "m", kind, head)
    base = getattr(theirs, theirs.base_model_prefix) if head else theirs
    ours = LukeModel.from_encoder(tmp_path / "m", entity_vocab_size=7, marker_token_ids=(11, 12))
    words = base.embeddings.word_embeddings.weight
    table = ours.get_input_embeddings().weight
    assert ours.config.vocab_size == 42
    assert torch.equal(table, torch.cat([words, words[[11]], words[[12]]]))
    for theirs_layer, layer in zip(base.encoder.layer, ours.encoder["layer"], strict=True):
        source, attention = theirs_layer.attention.self.query, layer.attention["self"]
        for query in ("query", *QUERIES):
            assert torch.equal(getattr(attention, query).weight, source.weight)
            assert torch.equal(getattr(attention, query).bias, source.bias)
    # A mention's position is the rank of its words, from 0 on.
    first = 0 if kind == "Bert" else theirs.config.pad_token_id + 1
    positions = base.embeddings.position_embeddings.weight[first:]
    entity_positions = ours.entity_embeddings.position_embeddings.weight
    assert torch.equal(entity_positions[: len(positions)], positions)
    assert len(entity_positions) == ours.config.max_position_embeddings
    assert ours.config.max_words == len(positions)
    entities = ours.get_entity_embeddings().weight
    assert entities.shape == (7, 256)
    assert 0.015 < entities.std() < 0.025
    assert entities.any(dim=1).all()
    assert torch.equal(ours.entity_embeddings.LayerNorm.weight, torch.ones(16))
    with torch.no_grad():
        ours.encoder["layer"][0].attention["self"].query.weight.zero_()
    assert ours.encoder["layer"][0].attention["self"].w2e_query.weight.any()


@pytest.mark.parametrize(("kind", "head"), [("Roberta", "ForMaskedLM"), ("Bert", "ForMaskedLM")])
@pytest.mark.filterwarnings("ignore:.*weights new, to be trained. (luke.)?pooler:UserWarning")
def test_word_prediction_of_an_encoder_is_kept(tmp_path, kind, head):
    theirs = encoder_checkpoint(tmp_path / "m", kind, head)
    ours = LukeForMaskedLM.from_encoder(tmp_path / "m", entity_vocab_size=7, marker_token_ids=(11, 12))
    ids = torch.tensor([[3, 5, 6, 7, 9]])
    with torch.no_grad():
        expected, result = theirs(ids).logits, ours(ids).logits
    torch.testing.assert_close(result[..., :40], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(result[..., 40:], expected[..., [11, 12]], rtol=1e-5, atol=1e-5)
    assert ours.lm_head.decoder.weight is ours.get_input_embeddings().weight


@pytest.mark.parametrize("head", [None, "ForSequenceClassification"])
@pytest.mark.parametrize("kind", ["Roberta", "Bert"])
def test_heads_on_an_encoder_are_new(tmp_path, kind, head):
    encoder_checkpoint(tmp_path / "m", kind, head)
    with pytest.warns(UserWarning, match=r"weights new, to be trained: classifier.bias, classifier.weight"):
        ours = LukeForEntityClassification.from_encoder(
            tmp_path / "m", entity_vocab_size=7, entity_emb_size=8, marker_token_ids=(11, 12), num_labels=5
        )
    assert ours.config.num_labels == 5
    assert ours.get_entity_embeddings().weight.shape == (7, 8)
    assert ours.classifier.weight.shape == (5, 16)
    assert 0.01 < ours.classifier.weight.std() < 0.03
    assert not ours.classifier.bias.any()
    assert ours(**INPUTS).logits.isfinite().all()
    ours.save_pretrained(tmp_path / "saved")
    state = {name: parameter.detach() for name, parameter in ours.named_parameters()}
    assert_holds(LukeForEntityClassification.from_pretrained(tmp_path / "saved"), state)


def write_vocabulary(directory, file, tokens):
    if file == "vocab.txt":
        (directory / file).write_text("\n".join(tokens) + "\n", encoding="utf-8")
    elif file == "vocab.json":
        (directory / file).write_text(json.dumps({token: row for row, token in enumerate(tokens)}))
    else:
        from tokenizers import Tokenizer, models

        vocabulary = {token: row for row, token in enumerate(tokens)}
        Tokenizer(models.WordLevel(vocabulary, unk_token=tokens[0])).save(str(directory / file))


@pytest.mark.parametrize("file", ["vocab.txt", "vocab.json", "tokenizer.json"])
@pytest.mark.parametrize("before", ["a", "\u2028", "\x85", "\x0c"], ids=repr)
def test_markers_are_looked_up(tmp_path, file, before):
    encoder_checkpoint(tmp_path / "m", "Bert")
    write_vocabulary(tmp_path / "m", file, ["[UNK]", before, "#", "b", "@"])
    table = LukeModel.from_encoder(tmp_path / "m", entity_vocab_size=7).get_input_embeddings().weight
    assert torch.equal(table[40:], table[[4, 2]])


def test_markers_that_cannot_be_found(tmp_path):
    encoder_checkpoint(tmp_path / "m", "Bert")
    with pytest.raises(ValueError, match=r"marker_token_ids must be given where .* no vocab.json, vocab.txt"):
        LukeModel.from_encoder(tmp_path / "m", entity_vocab_size=7)
    write_vocabulary(tmp_path / "m", "vocab.txt", ["[UNK]", "@"])
    with pytest.raises(ValueError, match=r'marker_token_ids must be given where the vocabulary lacks "@" or "#"'):
        LukeModel.from_encoder(tmp_path / "m", entity_vocab_size=7)
    for marker in (-1, 40):
        with pytest.raises(ValueError, match=rf"marker_token_ids must lie in \[0, 39\], got {marker}"):
            LukeModel.from_encoder(tmp_path / "m", entity_vocab_size=7, marker_token_ids=(1, marker))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "luke"}, "must be a roberta, xlm-roberta or bert encoder, got model_type 'luke'"),
        ({"model_type": None}, "must be a roberta, xlm-roberta or bert encoder, got model_type None"),
        ({"position_embedding_type": "relative_key"}, "must have absolute positions, .* 'relative_key'"),
        ({"vocab_size": "40"}, "vocab_size must .*, got '40'"),
        ({"max_position_embeddings": "20"}, "max_position_embeddings must .*, got '20'"),
        ({"vocab_size": None}, "vocab_size must .*, got None"),
    ],
    ids=str,
)
def test_refused_encoders(tmp_path, masked_lm, changes, message):
    directory = write(tmp_path / "m", masked_lm, config={"model_type": "bert", "pad_token_id": 0, **changes})
    with pytest.raises((TypeError, ValueError), match=message):
        LukeModel.from_encoder(directory, entity_vocab_size=7, marker_token_ids=(1, 2))


# Memory, measured in processes of their own

HUGE = """
import json, resource, signal, sys
from luke_kernels.heads import LukeForMaskedLM

def stop(*_):
    raise TimeoutError("no answer within 5 s")

# What is imported late must not count.
LukeForMaskedLM.from_pretrained(json.loads(sys.argv[1])["none"])
used = int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, resource.RLIM_INFINITY))
signal.signal(signal.SIGALRM, stop)
answers = {}
for setting, directory in json.loads(sys.argv[1]).items():
    signal.alarm(5)
    try:
        LukeForMaskedLM.from_pretrained(directory)
        answers[setting] = "loaded"
    except BaseException as error:
        answers[setting] = f"{type(error).__name__}: {error}"[:500]
    signal.alarm(0)
print(json.dumps(answers))
"""
HUGE_SETTINGS = (
    "vocab_size",
    "entity_vocab_size",
    "hidden_size",
    "entity_emb_size",
    "intermediate_size",
    "max_position_embeddings",
    "type_vocab_size",
    "num_hidden_layers",
    "num_labels",
)


def in_process(script, *arguments):
    result = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


START = """
import json, sys
import torch
from luke_kernels import LukeForMaskedLM, PackedBatch
model = LukeForMaskedLM.from_pretrained(sys.argv[1])
encoding = {"input_ids": [5, 6], "entity_ids": [3], "entity_position_ids": [[0]]}
with torch.no_grad():
    model(PackedBatch.from_encodings([encoding], pad_token_id=1))
print(json.dumps([name for name in ("torch._dynamo", "transformers", "sympy") if name in sys.modules]))
"""


def test_to_the_first_output_nothing_slow_is_imported(tmp_path):
    """The compiler of torch takes as long to import as torch itself."""
    LukeForMaskedLM(LukeConfig(**SIZES)).save_pretrained(tmp_path)
    assert in_process(START, str(tmp_path)) == []


@pytest.fixture(scope="module")
def answers_to_huge(tmp_path_factory):
    directory = tmp_path_factory.mktemp("huge")
    state = weights_of(LukeForMaskedLM)
    directories = {name: str(write(directory / name, state, config={name: 10**12})) for name in HUGE_SETTINGS}
    directories["none"] = str(write(directory / "none", state))
    answers = in_process(HUGE, json.dumps(directories))
    assert answers["none"] == "loaded"
    return answers


@pytest.mark.parametrize("setting", HUGE_SETTINGS)
def test_a_huge_config_with_small_weights_is_refused_at_once(answers_to_huge, setting):
    assert answers_to_huge[setting].startswith("ValueError: ")
    assert " must " in answers_to_huge[setting]


PEAK = """
import json, resource, sys
from luke_kernels.heads import LukeForMaskedLM
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = LukeForMaskedLM.from_pretrained(sys.argv[1])
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
parameters = sum(parameter.numel() for parameter in model.parameters())
print(json.dumps({"growth": (after - before) * 1024, "parameters": parameters}))
"""


def test_loading_the_base_size_takes_little_memory(tmp_path):
    """The file is a hole of zeros: it takes no disk, and the pages that are read count as any others."""
    with torch.device("meta"):
        model = LukeForMaskedLM(LukeConfig())
    header, end = {}, 0
    for name, parameter in [*model.named_parameters(), ("lm_head.decoder.weight", model.lm_head.decoder.weight)]:
        begin, end = end, end + 4 * parameter.numel()
        header[name] = {"dtype": "F32", "shape": list(parameter.shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + end)
    (tmp_path / "config.json").write_text(json.dumps(LukeConfig().to_dict()))
    answer = in_process(PEAK, str(tmp_path))
    assert answer["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert answer["growth"] < 1.3 * end


# Saving


def load_saved(directory, cls=LukeForMaskedLM):
    return {name: p.detach().clone() for name, p in cls.from_pretrained(directory).named_parameters()}


def model_holding(state, cls=LukeForMaskedLM, **changes):
    model = cls(LukeConfig(**{**SIZES, **changes}))
    for name, parameter in model.named_parameters():
        parameter.data = state[name].clone()
    return model


@pytest.mark.parametrize("max_shard_size", [10_000, "10000", "10KB", "5GB"])
def test_max_shard_size(tmp_path, masked_lm, max_shard_size):
    model_holding(masked_lm).save_pretrained(tmp_path / "new" / "m", max_shard_size=max_shard_size)
    files = sorted(path.name for path in (tmp_path / "new" / "m").iterdir())
    shards = [file for file in files if file.endswith(".safetensors")]
    if max_shard_size == "5GB":
        assert files == ["config.json", "model.safetensors"]
    else:
        assert len(shards) > 1
        assert set(files) == {"config.json", "model.safetensors.index.json", *shards}
        assert all((tmp_path / "new" / "m" / shard).stat().st_size < 15_000 for shard in shards)
    assert_holds(LukeForMaskedLM.from_pretrained(tmp_path / "new" / "m"), masked_lm)


@pytest.mark.parametrize("max_shard_size", ["ten", "10XB", "0", -1, 2.5])
def test_refused_shard_sizes(tmp_path, masked_lm, max_shard_size):
    with pytest.raises((TypeError, ValueError), match=r"^max_shard_size must .*, got "):
        model_holding(masked_lm).save_pretrained(tmp_path / "m", max_shard_size=max_shard_size)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("second", ["10KB", "20KB", "5GB"])
@pytest.mark.parametrize("first", ["10KB", "20KB", "5GB"])
def test_saving_over_a_checkpoint_replaces_its_files(tmp_path, masked_lm, first, second):
    other = {name: tensor + 1 for name, tensor in masked_lm.items()}
    model_holding(other).save_pretrained(tmp_path / "m", max_shard_size=first)
    model_holding(masked_lm).save_pretrained(tmp_path / "once", max_shard_size=second)
    model_holding(masked_lm).save_pretrained(tmp_path / "m", max_shard_size=second)
    once, again = (
        {SHARD_TAG.sub("-", str(path)): SHARD_TAG.sub("-", content.decode("latin1")) for path, content in files.items()}
        for files in (tree(tmp_path / "once"), tree(tmp_path / "m"))
    )
    assert once == again
    assert_holds(LukeForMaskedLM.from_pretrained(tmp_path / "m"), masked_lm)


def test_saving_over_a_checkpoint_leaves_the_files_of_others(tmp_path, masked_lm):
    foreign = ["vocab.json", "model_best.safetensors", "model-before-tuning.safetensors", "models/model.safetensors"]
    (tmp_path / "models").mkdir()
    for file in foreign:
        (tmp_path / file).write_text("mine")
    model_holding(masked_lm).save_pretrained(tmp_path)
    assert [file for file in foreign if not (tmp_path / file).exists()] == []


@pytest.mark.parametrize("max_shard_size", ["10KB", "5GB"])
@pytest.mark.parametrize("file", FILES)
def test_saving_where_it_was_loaded_from(tmp_path, masked_lm, file, max_shard_size):
    """Loaded weights are mapped from the very files that are replaced."""
    directory = write(tmp_path / "m", masked_lm, file)
    model = LukeForMaskedLM.from_pretrained(directory)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    expected = {name: tensor + 1 for name, tensor in masked_lm.items()}
    assert_holds(model, expected)
    assert_holds(LukeForMaskedLM.from_pretrained(directory), expected)


@pytest.mark.parametrize("second", ["10KB", "5GB"])
@pytest.mark.parametrize("first", ["10KB", "5GB"])
@pytest.mark.parametrize("stop", range(5))
def test_a_save_that_is_cut_off_mixes_nothing(tmp_path, masked_lm, monkeypatch, first, second, stop):
    model_holding(masked_lm).save_pretrained(tmp_path, max_shard_size=first)
    changed = {name: tensor + 1 for name, tensor in masked_lm.items()}
    replace, done = os.replace, []

    def cut_off(source, target):
        if len(done) == stop:
            raise KeyboardInterrupt
        done.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", cut_off)
    with contextlib.suppress(KeyboardInterrupt):
        model_holding(changed).save_pretrained(tmp_path, max_shard_size=second)
    monkeypatch.undo()
    weights = dict(LukeForMaskedLM.from_pretrained(tmp_path).named_parameters())
    assert any(all(torch.equal(p, state[name]) for name, p in weights.items()) for state in (masked_lm, changed))


@pytest.fixture
def disk_full():
    """Files may grow to a few kB and no more, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(size=5000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))

    yield fill
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("max_shard_size", ["10KB", "5GB"])
def test_a_failing_save_leaves_the_old_checkpoint(tmp_path, masked_lm, disk_full, max_shard_size):
    directory = write(tmp_path / "m", masked_lm)
    before = tree(tmp_path)
    model = model_holding({name: tensor + 1 for name, tensor in masked_lm.items()})
    disk_full()
    with pytest.raises((OSError, SafetensorError)):
        model.save_pretrained(directory, max_shard_size=max_shard_size)
    disk_full(resource.RLIM_INFINITY)
    assert tree(tmp_path) == before
    assert [path.name for path in tmp_path.rglob("*") if path.is_dir()] == ["m"]
    assert_holds(LukeForMaskedLM.from_pretrained(directory), masked_lm)


def test_a_failing_save_leaves_no_new_folder(tmp_path, masked_lm, disk_full):
    model = model_holding(masked_lm)
    disk_full()
    with pytest.raises((OSError, SafetensorError)):
        model.save_pretrained(tmp_path / "new" / "m")
    disk_full(resource.RLIM_INFINITY)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_target(tmp_path, masked_lm):
    directory = write(tmp_path / "m", masked_lm)
    directory.chmod(0o555)
    before = tree(tmp_path)
    with pytest.raises(PermissionError):
        model_holding(masked_lm).save_pretrained(directory)
    directory.chmod(0o755)
    assert tree(tmp_path) == before


def test_saving_into_a_file(tmp_path, masked_lm):
    (tmp_path / "m").write_text("mine")
    with pytest.raises(ValueError, match="directory must be a directory, got the file"):
        model_holding(masked_lm).save_pretrained(tmp_path / "m")
    assert (tmp_path / "m").read_text() == "mine"


@pytest.mark.parametrize("max_shard_size", ["10KB", "5GB"])
def test_saved_files_may_be_read_by_whom_the_umask_lets(tmp_path, masked_lm, max_shard_size):
    umask = os.umask(0o022)
    try:
        model_holding(masked_lm).save_pretrained(tmp_path / "m", max_shard_size=max_shard_size)
    finally:
        os.umask(umask)
    assert {oct(stat.S_IMODE(path.stat().st_mode)) for path in (tmp_path / "m").iterdir()} == {"0o644"}


def test_saved_config(tmp_path, masked_lm):
    config = {"torch_dtype": "float32", "dtype": "float32", "architectures": ["LukeModel"], "bert_model_name": "x"}
    directory = write(tmp_path / "m", masked_lm, config=config)
    model = LukeForMaskedLM.from_pretrained(directory, dtype=torch.bfloat16, id2label={0: "A", 1: "B", 2: "C"})
    model.save_pretrained(tmp_path / "saved")
    values = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert values["architectures"] == ["LukeForMaskedLM"]
    assert values["dtype"] == "bfloat16"
    assert values.get("torch_dtype", "bfloat16") == "bfloat16"
    assert values["bert_model_name"] == "x"
    assert values["id2label"] == {"0": "A", "1": "B", "2": "C"}
    again = LukeForMaskedLM.from_pretrained(tmp_path / "saved")
    assert again.config.num_labels == 3
    assert_holds(again, {name: tensor.bfloat16() for name, tensor in masked_lm.items()})


# Bad input


def test_all_problems_come_in_one_message(tmp_path, masked_lm):
    del masked_lm[f"{SELF}key.weight"], masked_lm[f"{SELF}query.weight"], masked_lm[f"{SELF}w2e_query.weight"]
    masked_lm[WORDS] = torch.zeros(39, 16)
    masked_lm["entity_predictions.bias"] = torch.zeros(8)
    masked_lm["luke.encoder.adapter"] = torch.zeros(8)
    del masked_lm["lm_head.bias"]
    with pytest.raises(ValueError) as caught:
        LukeForMaskedLM.from_pretrained(write(tmp_path / "m", masked_lm))
    message = str(caught.value)
    assert f"missing: {SELF}key.weight, {SELF}query.weight, {SELF}w2e_query.weight;" in message
    assert f"{WORDS} (39, 16) where the config says (40, 16)" in message
    assert "entity_predictions.bias (8,) where the config says (9,)" in message
    assert "unexpected, left out: luke.encoder.adapter" in message
    assert "new, to be trained: lm_head.bias" in message


def test_a_missing_table_is_not_told_as_a_decoder_that_differs(tmp_path, masked_lm):
    for table, decoder in ((WORDS, "lm_head.decoder.weight"), (ENTITIES, "entity_predictions.decoder.weight")):
        masked_lm[decoder] = masked_lm.pop(table)
    with pytest.raises(ValueError, match=f"missing: {WORDS}, {ENTITIES}"):
        LukeForMaskedLM.from_pretrained(write(tmp_path / "m", masked_lm))


def test_weights_that_are_no_floats_are_refused(tmp_path, masked_lm):
    masked_lm[f"{SELF}key.weight"] = torch.zeros(16, 16, dtype=torch.int8)
    with pytest.raises(ValueError, match=rf"{SELF}key.weight .*int8"):
        LukeForMaskedLM.from_pretrained(write(tmp_path / "m", masked_lm))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hiden_size": 16}, "hiden_size must be a setting of LukeConfig, got 16"),
        ({"hidden_size": "16"}, "hidden_size must be a positive int, got '16'"),
        ({"vocab_size": 41}, r"word_embeddings.weight \(40, 16\) where the config says \(41, 16\)"),
        ({"num_labels": 0}, "num_labels must be a positive int, got 0"),
    ],
    ids=str,
)
def test_refused_changes(tmp_path, masked_lm, changes, message):
    with pytest.raises(ValueError, match=message):
        LukeForMaskedLM.from_pretrained(write(tmp_path / "m", masked_lm), **changes)


def test_num_labels_that_do_not_fit_the_stored_head(tmp_path):
    state = weights_of(LukeForSequenceClassification, num_labels=3)
    directory = write(tmp_path / "m", state, config={"id2label": {"0": "A", "1": "B", "2": "C"}})
    model = LukeForSequenceClassification.from_pretrained(directory)
    assert_holds(model, state)
    assert model.config.id2label == {0: "A", 1: "B", 2: "C"}
    with pytest.warns(UserWarning, match="weights new, to be trained: classifier.bias, classifier.weight"):
        other = LukeForSequenceClassification.from_pretrained(directory, num_labels=4)
    assert other.classifier.weight.shape == (4, 16)
    assert torch.equal(other.luke.pooler["dense"].weight, state["luke.pooler.dense.weight"])
    values = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**values, "id2label": {"0": "A"}}))
    with pytest.raises(ValueError, match=r"classifier.weight \(3, 16\) where the config says \(1, 16\)"):
        LukeForSequenceClassification.from_pretrained(directory)
