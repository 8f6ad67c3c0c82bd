"""Checkpoints exchanged with transformers, both ways: the same tensors, the same outputs, the same labels."""

import json
import warnings

import checkpoint_cases
import pytest
import torch
from torch import nn

from luke_kernels import heads
from luke_kernels.model import LukeModel

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

# Where transformers' defaults are those of no released model.
SIZES = {**checkpoint_cases.SIZES, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
LABELS = {0: "PER", 1: "LOC", 2: "ORG"}
NAMES = (
    "LukeModel",
    "LukeForMaskedLM",
    "LukeForEntityClassification",
    "LukeForEntityPairClassification",
    "LukeForEntitySpanClassification",
    "LukeForSequenceClassification",
    "LukeForTokenClassification",
    "LukeForQuestionAnswering",
    "LukeForMultipleChoice",
)
FORMATS = ("safetensors", "sharded", "bin", "bin sharded")
TIED = ("lm_head.decoder.weight", "lm_head.decoder.bias", "entity_predictions.decoder.weight")


def ours_of(name):
    return LukeModel if name == "LukeModel" else getattr(heads, name)


def theirs_of(name):
    return getattr(transformers, name)


def their_model(name, *, tied=True, **changes):
    """One with random weights; `tied`: words are predicted by their table, which transformers 5 does not tie."""
    labels = {} if name == "LukeForQuestionAnswering" else {"id2label": LABELS}
    model = theirs_of(name)(transformers.LukeConfig(**{**SIZES, **labels, **changes})).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    if name == "LukeForMaskedLM":
        words, decoder = model.luke.embeddings.word_embeddings.weight, model.lm_head.decoder
        if not tied:
            decoder.weight = nn.Parameter(torch.randn_like(words))
        elif decoder.weight is not words:  # and saves under one name what is one
            decoder.weight = nn.Parameter(words.detach().clone())
    return model


def our_model(name, **changes):
    config = heads.LukeConfig(**{**SIZES, **changes})
    model = ours_of(name)(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def inputs_of(name):
    positions = torch.tensor([[[1, 2, -1], [3, -1, -1]], [[2, -1, -1], [1, 2, 3]]])
    inputs = {
        "input_ids": torch.tensor([[0, 5, 6, 7, 2], [0, 8, 9, 10, 2]]),
        "entity_ids": torch.tensor([[3, 8], [4, 5]]),
        "entity_position_ids": positions,
    }
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["entity_attention_mask"] = torch.ones_like(inputs["entity_ids"])
    if name == "LukeForMultipleChoice":
        return {key: value[None] for key, value in inputs.items()}
    if name == "LukeForEntitySpanClassification":
        inputs["entity_start_positions"] = torch.tensor([[1, 3], [2, 1]])
        inputs["entity_end_positions"] = torch.tensor([[2, 3], [2, 3]])
    return inputs


def assert_equal_outputs(ours, theirs, name, tolerance=1e-5):
    with torch.no_grad():
        results, expected = ours(**inputs_of(name)), theirs(**inputs_of(name))
    assert results.keys() == list(expected.keys())
    for key in expected:
        torch.testing.assert_close(results[key], expected[key], rtol=tolerance, atol=tolerance)


def assert_same_tensors(ours, theirs):
    """All of ours under the same names in theirs, bit for bit, and none of theirs left."""
    named = dict(ours.named_parameters(remove_duplicate=False))
    expected = dict(theirs.named_parameters(remove_duplicate=False))
    assert set(named) == set(expected)
    for key, tensor in named.items():
        assert tensor.dtype == expected[key].dtype
        assert torch.equal(tensor, expected[key]), key


def write(model, directory, form):
    """Save a model of transformers; pickles as its old versions did."""
    directory.mkdir(exist_ok=True)
    if not form.startswith("bin"):
        model.save_pretrained(directory, max_shard_size="10KB" if form == "sharded" else "5GB")
        assert (directory / "model.safetensors.index.json").exists() == (form == "sharded")
        return
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(directory)
    state = model.state_dict()
    if form == "bin":
        torch.save(state, directory / "pytorch_model.bin")
        return
    keys = sorted(state)
    weight_map = {}
    for number, part in enumerate((keys[::2], keys[1::2]), start=1):
        file = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save({key: state[key] for key in part}, directory / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def load_theirs(name, directory):
    model, info = theirs_of(name).from_pretrained(directory, output_loading_info=True)
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        assert not info.get(problem), (problem, info[problem])
    return model.eval()


def labels_of(name):
    return {} if name == "LukeForQuestionAnswering" else {"id2label": LABELS}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", NAMES)
def test_ours_loads_theirs(tmp_path, name, form):
    theirs = their_model(name)
    write(theirs, tmp_path, form)
    ours = ours_of(name).from_pretrained(tmp_path)
    assert_same_tensors(ours, theirs)
    assert_equal_outputs(ours, theirs, name)
    assert ours.config.id2label == theirs.config.id2label
    assert ours.config.num_labels == theirs.config.num_labels


@pytest.mark.parametrize("max_shard_size", ["5GB", 10_000])
@pytest.mark.parametrize("name", NAMES)
def test_theirs_loads_ours(tmp_path, name, max_shard_size):
    ours = our_model(name, **labels_of(name))
    ours.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (max_shard_size == 10_000)
    theirs = load_theirs(name, tmp_path)
    assert_same_tensors(ours, theirs)
    assert_equal_outputs(ours, theirs, name)
    assert theirs.config.id2label == ours.config.id2label
    assert theirs.config.num_labels == ours.config.num_labels


@pytest.mark.parametrize("name", NAMES)
def test_round_trip(tmp_path, name):
    first = our_model(name, **labels_of(name), problem_type="multi_label_classification", hidden_dropout_prob=0.3)
    first.save_pretrained(tmp_path / "ours")
    load_theirs(name, tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    last = ours_of(name).from_pretrained(tmp_path / "theirs")
    assert_same_tensors(last, first)
    first.config.extra = last.config.extra
    assert last.config == first.config


@pytest.mark.parametrize("name", ["LukeModel", "LukeForMaskedLM", "LukeForEntityPairClassification"])
@pytest.mark.parametrize(
    "changes",
    [{"entity_emb_size": 16}, {"use_entity_aware_attention": False}, {"hidden_act": "relu"}, {"pad_token_id": 4}],
    ids=str,
)
def test_other_configs_both_ways(tmp_path, name, changes):
    theirs = their_model(name, **changes)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = ours_of(name).from_pretrained(tmp_path / "theirs")
    assert_same_tensors(ours, theirs)
    assert_equal_outputs(ours, theirs, name)
    ours.save_pretrained(tmp_path / "ours")
    again = load_theirs(name, tmp_path / "ours")
    assert_same_tensors(ours, again)
    assert_equal_outputs(ours, again, name)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_masked_lm_of_4x_without_decoders_is_tied(tmp_path, file):
    from safetensors.torch import save_file

    theirs = their_model("LukeForMaskedLM")
    theirs.config.save_pretrained(tmp_path)
    state = {key: tensor for key, tensor in theirs.state_dict().items() if key not in TIED}
    if file.endswith("bin"):
        torch.save(state, tmp_path / file)
    else:
        save_file(state, tmp_path / file, metadata={"format": "pt"})
    ours = heads.LukeForMaskedLM.from_pretrained(tmp_path)
    assert ours.lm_head.decoder.weight is ours.luke.embeddings.word_embeddings.weight
    assert ours.entity_predictions.decoder.weight is ours.luke.entity_embeddings.entity_embeddings.weight
    assert ours.lm_head.decoder.bias is ours.lm_head.bias
    assert_same_tensors(ours, theirs)
    assert_equal_outputs(ours, theirs, "LukeForMaskedLM")


def test_masked_lm_with_a_decoder_of_its_own_both_ways(tmp_path):
    """What transformers 5 makes of a model trained there; 4.x where the config unties it."""
    tie = {} if transformers.__version__.startswith("5") else {"tie_word_embeddings": False}
    theirs = their_model("LukeForMaskedLM", tied=False, **tie)
    if tie:  # and then 4.x does not tie the entities either
        theirs.entity_predictions.decoder.weight = theirs.luke.entity_embeddings.entity_embeddings.weight
        theirs.lm_head.decoder.bias = theirs.lm_head.bias
    theirs.save_pretrained(tmp_path / "theirs")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours = heads.LukeForMaskedLM.from_pretrained(tmp_path / "theirs")
    assert ["kept apart" in str(warning.message) for warning in caught] == ([] if tie else [True])
    assert_same_tensors(ours, theirs)
    assert_equal_outputs(ours, theirs, "LukeForMaskedLM")
    ours.save_pretrained(tmp_path / "ours")
    again = load_theirs("LukeForMaskedLM", tmp_path / "ours")
    assert_same_tensors(ours, again)
    assert_equal_outputs(ours, again, "LukeForMaskedLM")


def test_queries_in_a_checkpoint_that_does_not_use_them(tmp_path):
    """mLUKE: the files hold the extra queries, the config turns them off."""
    theirs = their_model("LukeForMaskedLM", use_entity_aware_attention=True)
    theirs.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "use_entity_aware_attention": False}))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        off = heads.LukeForMaskedLM.from_pretrained(tmp_path)
    assert len(caught) <= 1
    assert not any("w2e" in name for name, _ in off.named_parameters())
    assert_equal_outputs(off, theirs_of("LukeForMaskedLM").from_pretrained(tmp_path).eval(), "LukeForMaskedLM")
    on = heads.LukeForMaskedLM.from_pretrained(tmp_path, use_entity_aware_attention=True)
    assert_same_tensors(on, theirs)
    assert_equal_outputs(on, theirs, "LukeForMaskedLM")


@pytest.mark.parametrize("form", FORMATS)
def test_bfloat16_is_kept_or_converted(tmp_path, form):
    name = "LukeForMaskedLM"
    theirs = their_model(name).to(torch.bfloat16)
    write(theirs, tmp_path / "theirs", form)
    ours = ours_of(name).from_pretrained(tmp_path / "theirs")
    assert_same_tensors(ours, theirs)
    converted = ours_of(name).from_pretrained(tmp_path / "theirs", dtype=torch.float32)
    assert_same_tensors(converted, theirs.float())
    ours.save_pretrained(tmp_path / "ours")
    again = theirs_of(name).from_pretrained(tmp_path / "ours", torch_dtype="auto")
    assert again.dtype == torch.bfloat16
    assert_same_tensors(ours, again)
