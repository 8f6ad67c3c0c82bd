"""Configs: what is read, derived, kept and refused."""

import json

import pytest

from luke_kernels.config import LukeConfig


def test_defaults_are_those_of_luke_base():
    config = LukeConfig()
    assert (config.vocab_size, config.entity_vocab_size, config.entity_emb_size) == (50267, 500_000, 256)
    assert (config.max_position_embeddings, config.type_vocab_size, config.layer_norm_eps) == (514, 1, 1e-5)
    assert (config.num_labels, config.id2label) == (2, {0: "LABEL_0", 1: "LABEL_1"})
    assert config.max_words == 512


def test_round_trip_through_json():
    config = LukeConfig(
        entity_emb_size=None,
        id2label={0: "PER", 1: "LOC", 2: "ORG"},
        classifier_dropout=0.3,
        problem_type="regression",
        use_entity_aware_attention=False,
        tie_word_embeddings=False,
        extra={"bert_model_name": "roberta-base", "cls_entity_prediction": False},
    )
    stored = json.loads(json.dumps(config.to_dict()))
    assert LukeConfig.from_dict(stored) == config
    assert stored["bert_model_name"] == "roberta-base"
    assert stored["label2id"] == {"PER": 0, "LOC": 1, "ORG": 2}
    assert stored["model_type"] == "luke"
    assert config.entity_emb_size == config.hidden_size


def test_a_stray_key_named_extra_is_kept():
    config = LukeConfig.from_dict({"extra": 3, "use_cache": True})
    assert config.extra == {"extra": 3, "use_cache": True}
    assert config.to_dict()["extra"] == 3


@pytest.mark.parametrize(
    ("changes", "labels"),
    [
        ({}, ["A", "B", "C"]),
        ({"num_labels": 2}, ["LABEL_0", "LABEL_1"]),
        ({"id2label": {0: "X"}}, ["X"]),
        ({"id2label": {"0": "X", "1": "Y"}, "num_labels": 2}, ["X", "Y"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("stored", [{}, {"num_labels": 3}])
def test_changed_labels_replace_the_stored(stored, changes, labels):
    stored = {"id2label": {"0": "A", "1": "B", "2": "C"}, "label2id": {"A": 0, "B": 1, "C": 2}, **stored}
    config = LukeConfig.from_dict(stored, **changes)
    assert config.num_labels == len(labels)
    assert config.id2label == dict(enumerate(labels))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 0}, "hidden_size must be a positive int, got 0"),
        ({"vocab_size": True}, "vocab_size must be a positive int, got True"),
        ({"intermediate_size": 12.0}, "intermediate_size must be a positive int, got 12.0"),
        ({"hidden_size": 770}, "hidden_size must be a multiple of num_attention_heads, 12, got 770"),
        ({"hidden_act": "softmax"}, "hidden_act must be one of gelu, .*, got 'softmax'"),
        ({"pad_token_id": -1}, "pad_token_id must be a word id .*, got -1"),
        ({"pad_token_id": 513}, "pad_token_id must be a word id .*, got 513"),
        ({"problem_type": "ranking"}, "problem_type must be None or one of .*, got 'ranking'"),
        ({"id2label": {0: "A"}, "num_labels": 2}, "id2label must name num_labels, 2, labels, got 1"),
    ],
    ids=str,
)
def test_refused_values(changes, message):
    with pytest.raises(ValueError, match=message):
        LukeConfig(**changes)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden_size", "768"),
        ("entity_emb_size", "256"),
        ("num_labels", "3"),
        ("pad_token_id", "1"),
        ("pad_token_id", None),
        ("id2label", ["A", "B"]),
        ("id2label", {"A": 0}),
        ("hidden_act", ["gelu"]),
        ("hidden_dropout_prob", "0.1"),
        ("attention_probs_dropout_prob", 1.5),
        ("classifier_dropout", "none"),
        ("layer_norm_eps", "1e-5"),
        ("initializer_range", "0.02"),
        ("use_entity_aware_attention", "false"),
        ("tie_word_embeddings", "no"),
    ],
)
def test_values_of_wrong_types_are_named(name, value):
    with pytest.raises((TypeError, ValueError), match=rf"^{name} must .*, got "):
        LukeConfig.from_dict({name: value})


@pytest.mark.parametrize("name", ["hiden_size", "extra", "label2id"])
def test_unknown_changes_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be a setting of LukeConfig, got 3"):
        LukeConfig.from_dict({}, **{name: 3})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "must hold JSON, got an error"),
        (b"", "must hold JSON, got an error"),
        (b'{"a": "\xff"}', "must hold JSON, got an error"),
        (b"[" * 200_000, "must hold JSON, got an error"),
        (b"[1, 2]", "must hold a JSON object, got list"),
        (b"null", "must hold a JSON object, got NoneType"),
        (b'{"model_type": "roberta"}', "must be of a LUKE model, got model_type 'roberta'"),
        (b'{"model_type": ["luke"]}', "must be of a LUKE model, got model_type"),
    ],
    ids=lambda value: value[:20].decode("latin1") if isinstance(value, bytes) else "",
)
def test_refused_files(tmp_path, content, message):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"config.json {message}"):
        LukeConfig.from_pretrained(tmp_path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config.json must exist"):
        LukeConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("model_type", ["luke", "mluke", None])
def test_from_pretrained(tmp_path, model_type):
    values = {"vocab_size": 30, "hidden_size": 24} | ({"model_type": model_type} if model_type else {})
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = LukeConfig.from_pretrained(tmp_path, hidden_size=36)
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (30, 36, 12)
    assert config.extra == {}


def test_labels_changed_later():
    config = LukeConfig()
    config.num_labels = 3
    assert config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    config.id2label = {0: "PER", 1: "LOC"}
    assert config.num_labels == 2
    config.num_labels = 2
    assert config.id2label == {0: "PER", 1: "LOC"}
    assert LukeConfig.from_dict(config.to_dict()) == config
