"""The encoder and its inputs: equal to transformers' encoder, packed or padded, every bad input named."""

import copy
import dataclasses
import pickle
from typing import Any, TypeVar

import luke_cases
import pytest
import torch
from torch import Tensor, nn

from luke_kernels import LukeConfig, LukeModel, LukePreTrainedModel, PackedBatch, PackedLengths

Model = TypeVar("Model", bound=LukePreTrainedModel)

BATCH, WORDS, ENTITIES, MENTION = 3, 7, 4, 3
WORD_LENGTHS, ENTITY_LENGTHS = [7, 4, 5], [4, 2, 3]
PADDINGS = ["right", "left", "holes", "none"]
# 38 words at most.
SIZES = {
    "vocab_size": 99,
    "entity_vocab_size": 10,
    "hidden_size": 32,
    "entity_emb_size": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "max_position_embeddings": 40,
    "type_vocab_size": 3,
}


def build(cls: type[Model], *, backend: str = "auto", dtype: torch.dtype = torch.float64, **changes: Any) -> Model:
    """Make a small model in evaluation mode, every parameter drawn anew, in float64: what differs shows."""
    model = cls(LukeConfig(**{**SIZES, **changes}), backend=backend)
    luke_cases.redraw(model)
    return model.to(dtype).eval()


def exists(lengths: list[int], size: int, padding: str) -> Tensor:
    ranks = torch.arange(size)
    mask = (ranks < torch.tensor(lengths)[:, None]) | (padding == "none")
    if padding == "left":
        mask = mask.flip(1)
    elif padding == "holes":
        mask = mask[:, (3 * ranks + 1) % size]
    return mask.to(torch.int64)


def padded_inputs(padding: str = "right") -> dict[str, Tensor]:
    """Draw a batch with all inputs that LukeModel takes but positions; what the masks exclude is not neutral."""
    positions = torch.randint(0, WORDS, (BATCH, ENTITIES, MENTION))
    positions[..., 1:][torch.rand(BATCH, ENTITIES, MENTION - 1) < 0.5] = -1
    mask = exists(WORD_LENGTHS, WORDS, padding)
    return {
        "input_ids": torch.randint(3, 99, (BATCH, WORDS)).masked_fill(mask == 0, 1),
        "attention_mask": mask,
        "token_type_ids": torch.randint(0, 3, (BATCH, WORDS)),
        "entity_ids": torch.randint(0, 10, (BATCH, ENTITIES)),
        "entity_attention_mask": exists(ENTITY_LENGTHS, ENTITIES, padding),
        "entity_token_type_ids": torch.randint(0, 3, (BATCH, ENTITIES)),
        "entity_position_ids": positions,
    }


def words_of(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in inputs.items() if not name.startswith("entity")}


def of_transformers(ours: LukePreTrainedModel) -> Any:
    """Make transformers' model of the same name, with the same weights; names must be the same."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.LukeConfig(**ours.config.to_dict(), attn_implementation="eager")
    theirs = getattr(transformers, type(ours).__name__)(config).to(ours.dtype)
    theirs.load_state_dict(ours.state_dict())
    return theirs.train(ours.training)


# What comes out


@pytest.mark.parametrize("changes", [{}, {"entity_emb_size": None}, {"use_entity_aware_attention": False}])
@pytest.mark.parametrize("padding", PADDINGS)
def test_equals_transformers(padding, changes):
    model = build(LukeModel, **changes)
    inputs = padded_inputs(padding)
    ours = model(**inputs, output_hidden_states=True, output_attentions=True)
    theirs = of_transformers(model)(**inputs, output_hidden_states=True, output_attentions=True)
    words, entities = inputs["attention_mask"].bool(), inputs["entity_attention_mask"].bool()
    for kind, mask in (("", words), ("entity_", entities)):
        result, expected = ours[f"{kind}last_hidden_state"], theirs[f"{kind}last_hidden_state"]
        torch.testing.assert_close(result[mask], expected[mask])
        assert not result[~mask].any()
        for result, expected in zip(ours[f"{kind}hidden_states"], theirs[f"{kind}hidden_states"], strict=True):
            torch.testing.assert_close(result[mask], expected[mask])
            assert not result[~mask].any()
    # transformers pools the first column, we the first word.
    first = words[:, 0]
    torch.testing.assert_close(ours.pooler_output[first], theirs.pooler_output[first])
    every = torch.cat([words, entities], dim=1)
    pairs = every[:, None, :, None] & every[:, None, None, :]
    for result, expected in zip(ours.attentions, theirs.attentions, strict=True):
        torch.testing.assert_close(result, expected * pairs)


@pytest.mark.parametrize("entities", [True, False])
@pytest.mark.parametrize("pools", [True, False])
def test_shapes(entities, pools):
    model = LukeModel(LukeConfig(**SIZES), add_pooling_layer=pools).eval()
    inputs = padded_inputs() if entities else words_of(padded_inputs())
    output = model(**inputs, output_hidden_states=True, output_attentions=True)
    assert output.last_hidden_state.shape == (BATCH, WORDS, 32)
    assert len(output.hidden_states) == 3
    assert all(state.shape == (BATCH, WORDS, 32) for state in output.hidden_states)
    tokens = WORDS + ENTITIES if entities else WORDS
    assert [a.shape for a in output.attentions] == [(BATCH, 4, tokens, tokens)] * 2
    if entities:
        assert output.entity_last_hidden_state.shape == (BATCH, ENTITIES, 32)
        assert [state.shape for state in output.entity_hidden_states] == [(BATCH, ENTITIES, 32)] * 3
    else:
        assert output.entity_last_hidden_state is output.entity_hidden_states is None
    if pools:
        assert output.pooler_output.shape == (BATCH, 32)
    else:
        assert output.pooler_output is model.pooler is None


def test_pooler():
    model = build(LukeModel)
    output = model(**padded_inputs("left"))
    firsts = output.last_hidden_state[torch.arange(BATCH), WORDS - torch.tensor(WORD_LENGTHS)]
    torch.testing.assert_close(output.pooler_output, torch.tanh(model.pooler["dense"](firsts)))


@pytest.mark.parametrize(
    ("name", "neutral"),
    [("attention_mask", 1), ("token_type_ids", 0), ("entity_attention_mask", 1), ("entity_token_type_ids", 0)],
)
def test_what_is_not_given_is_neutral(name, neutral):
    model, inputs = build(LukeModel), padded_inputs()
    given = model(**inputs).to_tuple()
    neutral = model(**{**inputs, name: torch.full_like(inputs[name], neutral)}).to_tuple()
    without = model(**{**inputs, name: None}).to_tuple()
    assert all(torch.equal(a, b) for a, b in zip(without, neutral, strict=True))
    assert not any(torch.allclose(a, b) for a, b in zip(without, given, strict=True))


def test_position_ids():
    model, inputs = build(LukeModel), padded_inputs()
    default = model(**inputs)
    positions = 2 + torch.arange(WORDS).expand(BATCH, WORDS)
    assert torch.equal(model(**inputs, position_ids=positions)[0], default[0])
    assert not torch.allclose(model(**inputs, position_ids=positions + 1)[0], default[0])


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
def test_masks_of_any_dtype(dtype):
    model, inputs = build(LukeModel), padded_inputs("holes")
    expected = model(**inputs)
    masks = {name: value.to(dtype) for name, value in inputs.items() if name.endswith("mask")}
    assert torch.equal(model(**{**inputs, **masks}).entity_last_hidden_state, expected.entity_last_hidden_state)


def test_outputs_by_name_and_place():
    model, inputs = LukeModel(LukeConfig(**SIZES)).eval(), padded_inputs()
    output = model(**inputs)
    assert output.keys() == ["last_hidden_state", "pooler_output", "entity_last_hidden_state"]
    assert output["pooler_output"] is output[1] is output.pooler_output
    assert output[:2] == (output.last_hidden_state, output.pooler_output)
    assert output[-1] is output.entity_last_hidden_state
    tuple_ = model(**inputs, return_dict=False)
    assert type(tuple_) is tuple
    assert all(torch.equal(a, b) for a, b in zip(tuple_, output.to_tuple(), strict=True))


def test_outputs_say_what_they_hold():
    """As in transformers, whose users ask `"pooler_output" in output`."""
    output = LukeModel(LukeConfig(**SIZES)).eval()(**padded_inputs())
    assert len(output) == 3
    assert "pooler_output" in output
    assert "hidden_states" not in output
    assert "keys" not in output


@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions"])
def test_config_asks_for_outputs(name):
    model, inputs = LukeModel(LukeConfig(**SIZES, **{name: True})).eval(), padded_inputs()
    key = name.removeprefix("output_")
    assert len(model(**inputs)[key]) == {"hidden_states": 3, "attentions": 2}[key]
    assert model(**inputs, **{name: False})[key] is None


@pytest.mark.parametrize("padding", PADDINGS)
def test_hidden_states_end_with_the_last(padding):
    inputs = padded_inputs(padding)
    output = build(LukeModel)(**inputs, output_hidden_states=True)
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)
    assert torch.equal(output.entity_hidden_states[-1], output.entity_last_hidden_state)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("padding", PADDINGS)
def test_attentions_explain_the_contexts(padding, training):
    """Rows sum to 1, and with the values they give the next layer's input; with dropout too, those after it."""
    model = build(LukeModel, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.4).train(training)
    inputs = padded_inputs(padding)
    output = model(**inputs, output_hidden_states=True, output_attentions=True)
    every = torch.cat([inputs["attention_mask"], inputs["entity_attention_mask"]], dim=1).bool()
    states = [torch.cat(pair, dim=1) for pair in zip(output.hidden_states, output.entity_hidden_states, strict=True)]
    for layer, probs, before, after in zip(model.encoder["layer"], output.attentions, states, states[1:], strict=False):
        sums = probs.sum(dim=-1)
        if training:
            assert (probs == 0)[every[:, None, :, None].expand_as(probs)].any()
        else:
            torch.testing.assert_close(sums, every[:, None].expand_as(sums).to(sums.dtype))
        values = layer.attention["self"].value(before).unflatten(-1, (4, 8))
        context = torch.einsum("bhst,bthd->bshd", probs, values).flatten(-2)
        hidden = layer.attention["output"](context, before)
        hidden = layer.output(layer.activation(layer.intermediate["dense"](hidden)), hidden)
        torch.testing.assert_close(hidden[every], after[every])


@pytest.mark.parametrize("packed", [False, True])
def test_hidden_states_and_attentions_keep_gradients(packed):
    """What is returned lies on the way to the output."""
    model, inputs = build(LukeModel), padded_inputs()
    batch = {"input_ids": PackedBatch.from_padded(**inputs)} if packed else inputs
    output = model(**batch, output_hidden_states=True, output_attentions=True)
    kept = {name: output[name][0] for name in ("hidden_states", "entity_hidden_states", "attentions")}
    for tensor in kept.values():
        tensor.retain_grad()
    output.last_hidden_state.sin().sum().backward()
    assert [name for name, tensor in kept.items() if tensor.grad is None or not tensor.grad.any()] == []


# In training


def test_evaluation_is_deterministic_and_training_is_not():
    model, inputs = build(LukeModel), padded_inputs()
    assert torch.equal(model(**inputs)[0], model(**inputs)[0])
    model.train()
    assert not torch.allclose(model(**inputs)[0], model(**inputs)[0])
    torch.manual_seed(1)
    first = model(**inputs)[0]
    torch.manual_seed(1)
    assert torch.equal(model(**inputs)[0], first)


@pytest.mark.parametrize("name", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_each_dropout_is_in_effect(name):
    others = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    inputs = padded_inputs()
    model = build(LukeModel, **others).train()
    assert torch.equal(model(**inputs)[0], model(**inputs)[0])
    model = build(LukeModel, **{**others, name: 0.3}).train()
    assert not torch.allclose(model(**inputs)[0], model(**inputs)[0])


def test_gradients_reach_every_parameter():
    model = build(LukeModel).train()
    output = model(**padded_inputs())
    sum(value.sin().sum() for value in output.to_tuple()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_gradients_equal_those_of_transformers():
    model, inputs = build(LukeModel), padded_inputs()
    theirs = of_transformers(model)
    for m in (model, theirs):
        output = m(**inputs)
        words, entities = output.last_hidden_state.sin(), output.entity_last_hidden_state.sin()
        mask, entity_mask = inputs["attention_mask"][..., None], inputs["entity_attention_mask"][..., None]
        ((words * mask).sum() + (entities * entity_mask).sum() + output.pooler_output.sin().sum()).backward()
    for name, parameter in model.named_parameters():
        expected = theirs.get_parameter(name).grad
        if name == "entity_embeddings.entity_embeddings.weight":
            # transformers takes id 0 for a pad; in some vocabularies it is [MASK].
            assert parameter.grad[0].any()
            parameter.grad[0] = expected[0]
        torch.testing.assert_close(parameter.grad, expected, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kwargs", [None, {"use_reentrant": True}])
def test_gradient_checkpointing(dropout, packed, kwargs):
    model = build(LukeModel, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout).train()
    inputs = padded_inputs()
    batch = {"input_ids": PackedBatch.from_padded(**inputs)} if packed else inputs
    calls = []
    for layer in model.encoder["layer"]:
        layer.register_forward_pre_hook(lambda *_: calls.append(1))
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(kwargs)
        assert model.is_gradient_checkpointing is checkpointing
        model.zero_grad()
        torch.manual_seed(3)
        output = model(**batch)
        sum(value.sin().sum() for value in output.to_tuple()).backward()
        results.append([output[0].detach(), *(p.grad.clone() for p in model.parameters())])
    assert len(calls) == 6  # two layers, and two layers twice
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing


def test_without_gradients_gives_the_same():
    model, inputs = build(LukeModel), padded_inputs()
    with torch.inference_mode():
        without = model(**inputs)[0]
    torch.testing.assert_close(model(**inputs)[0], without)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("packed", [False, True])
def test_half_precision(dtype, packed):
    model, inputs = build(LukeModel, dtype=torch.float32), padded_inputs()
    batch = {"input_ids": PackedBatch.from_padded(**inputs)} if packed else inputs
    expected = model(**batch).to_tuple()
    half = model.to(dtype).train()
    for m in half.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
    for layer in half.encoder["layer"]:
        layer.attention["self"].dropout = 0.0
    results = half(**batch).to_tuple()
    for result, value in zip(results, expected, strict=True):
        assert result.dtype == dtype
        torch.testing.assert_close(result.float(), value, rtol=0.1, atol=0.1)
    sum(result.float().sum() for result in results).backward()
    assert all(p.grad.isfinite().all() for p in half.parameters())


def test_autocast():
    model, inputs = build(LukeModel, dtype=torch.float32), padded_inputs()
    expected = model(**inputs)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = model(**inputs)[0]
    assert not torch.equal(result.float(), expected)
    torch.testing.assert_close(result.float(), expected, rtol=0.1, atol=0.1)


# Embeddings and weights


@pytest.mark.parametrize("packed", [False, True])
def test_inputs_embeds_equal_input_ids(packed):
    model, inputs = build(LukeModel), padded_inputs()
    expected = model(**inputs)
    embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    inputs["inputs_embeds"] = embeds
    result = model(PackedBatch.from_padded(**inputs)) if packed else model(**inputs)
    words = result.last_hidden_state
    mask = inputs["attention_mask"].bool()
    assert torch.equal(words if packed else words[mask], expected.last_hidden_state[mask])
    assert torch.equal(result.pooler_output, expected.pooler_output)


@pytest.mark.parametrize("kind", ["token", "entity"])
@pytest.mark.parametrize("change", [5, -3])
def test_resizing(kind, change):
    model, inputs = build(LukeModel, initializer_range=0.5), padded_inputs()
    setting = {"token": "vocab_size", "entity": "entity_vocab_size"}[kind]
    key = {"token": "input_ids", "entity": "entity_ids"}[kind]
    get = {"token": model.get_input_embeddings, "entity": model.get_entity_embeddings}[kind]
    before, size = get().weight.detach().clone(), getattr(model.config, setting) + change
    inputs[key] = inputs[key].clamp(max=size - 1)
    expected = model(**inputs)[0]
    table = getattr(model, f"resize_{kind}_embeddings")(size)
    assert table is get()
    assert (table.num_embeddings, table.weight.shape[0], getattr(model.config, setting)) == (size, size, size)
    assert table.weight.dtype == model.dtype
    assert table.weight.requires_grad
    kept = min(size, len(before))
    assert torch.equal(table.weight[:kept], before[:kept])
    if change > 0:
        assert 0.3 < table.weight[kept:].std() < 0.7
    assert torch.equal(model(**inputs)[0], expected)
    inputs[key][0, 0] = size - 1
    model(**inputs)[0].sum().backward()
    assert table.weight.grad[size - 1].any()
    inputs[key][0, 0] = size
    with pytest.raises(ValueError, match=rf"{key} must lie in \[0, {size - 1}\], got {size}"):
        model(**inputs)


@pytest.mark.parametrize("kind", ["token", "entity"])
@pytest.mark.parametrize("size", [0, -1, 2.0, True, None])
def test_resizing_to_bad_sizes(kind, size):
    model = LukeModel(LukeConfig(**SIZES))
    with pytest.raises((ValueError, TypeError), match="vocab_size must be a positive int, got"):
        getattr(model, f"resize_{kind}_embeddings")(size)
    assert (model.config.vocab_size, model.config.entity_vocab_size) == (99, 10)


def test_resizing_keeps_the_pad():
    """A table without the pad's row could be saved but not loaded."""
    model = LukeModel(LukeConfig(**SIZES))
    with pytest.raises(ValueError, match="vocab_size must be more than pad_token_id, 1, got 1"):
        model.resize_token_embeddings(1)


def test_initialisation():
    model = LukeModel(LukeConfig(**{**SIZES, "initializer_range": 0.3}))
    for name, parameter in model.named_parameters():
        module = model.get_submodule(name.rpartition(".")[0])
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif isinstance(module, nn.LayerNorm):
            assert (parameter == 1).all(), name
        else:
            assert abs(parameter.mean()) < 5 * 0.3 / parameter.numel() ** 0.5, name
            assert 0.2 < parameter.std() < 0.4, name
    words, positions = model.embeddings.word_embeddings, model.embeddings.position_embeddings
    for table in (words, positions):
        assert not table.weight[1].any()
        assert table.weight[0].any()
    # Pads never come to the entity table, and id 0 may be [MASK].
    assert model.get_entity_embeddings().weight.any(dim=1).all()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(copied):
    model, inputs = build(LukeModel), padded_inputs()
    other = copied(model)
    assert torch.equal(other(**inputs)[0], model(**inputs)[0])
    with torch.no_grad():
        other.get_input_embeddings().weight.zero_()
    assert model.get_input_embeddings().weight.any()


def test_dtype_and_device():
    model = LukeModel(LukeConfig(**SIZES)).to(torch.bfloat16)
    assert (model.dtype, model.device.type) == (torch.bfloat16, "cpu")
    assert model.to("meta").device.type == "meta"


# Packed batches


def one_by_one(inputs: dict[str, Tensor]) -> list[dict[str, list]]:
    """What a tokenizer gives without padding: the tokens that exist."""
    encodings = []
    for b in range(BATCH):
        words, entities = (inputs[name][b].bool() for name in ("attention_mask", "entity_attention_mask"))
        encodings.append(
            {
                name: value[b][entities if name.startswith("entity") else words].tolist()
                for name, value in inputs.items()
                if not name.endswith("mask")
            }
        )
    return encodings


@pytest.mark.parametrize("padding", PADDINGS)
def test_from_padded(padding):
    inputs = padded_inputs(padding)
    columns = {
        f"entity_{end}_positions": torch.stack(
            [torch.multinomial(m.float(), ENTITIES) for m in inputs["attention_mask"]]
        )
        for end in ("start", "end")
    }
    given = {k: v for k, v in inputs.items() if not (padding == "none" and k.endswith("mask"))}
    batch = PackedBatch.from_padded(**given, **columns)
    words, entities = inputs["attention_mask"].bool(), inputs["entity_attention_mask"].bool()
    assert batch.lengths.cu_words.tolist() == [0, *words.sum(dim=1).cumsum(0).tolist()]
    assert batch.lengths.cu_entities.tolist() == [0, *entities.sum(dim=1).cumsum(0).tolist()]
    assert (batch.lengths.max_words, batch.lengths.max_entities) == (7, 4)
    assert (batch.batch_size, batch.num_words, batch.num_entities) == (BATCH, words.sum(), entities.sum())
    assert (batch.padded_words, batch.padded_entities) == (WORDS, ENTITIES)
    for name in ("input_ids", "token_type_ids"):
        assert torch.equal(getattr(batch, name), inputs[name][words])
    for name in ("entity_ids", "entity_token_type_ids", "entity_position_ids"):
        assert torch.equal(getattr(batch, name), inputs[name][entities])
    assert batch.sequence_of_entity().tolist() == entities.nonzero()[:, 0].tolist()
    # Columns become ranks: the same words.
    firsts = batch.lengths.cu_words[batch.sequence_of_entity()]
    for name, column in columns.items():
        chosen = batch.word_rows[firsts + getattr(batch, name)] % WORDS
        assert torch.equal(chosen, column[entities])


@pytest.mark.parametrize("padding", PADDINGS)
def test_position_ids_as_roberta_counts(padding):
    """Words that are no pads count from pad_token_id + 1, whatever the mask says."""
    modeling = pytest.importorskip("transformers.models.luke.modeling_luke", reason="transformers is not installed")
    inputs = padded_inputs(padding)
    inputs["input_ids"][0, 2] = 1  # a pad that the mask includes
    for pad in (1, 5):
        expected = modeling.create_position_ids_from_input_ids(inputs["input_ids"], pad)
        batch = PackedBatch.from_padded(**inputs, pad_token_id=pad)
        assert torch.equal(batch.position_ids, expected[inputs["attention_mask"].bool()])


def equal_batches(a: PackedBatch, b: PackedBatch) -> bool:
    def values(batch: PackedBatch) -> list:
        fields = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
        lengths = fields.pop("lengths")
        return [*fields.values(), *(getattr(lengths, f.name) for f in dataclasses.fields(lengths))]

    return all(
        torch.equal(x, y) and x.dtype == y.dtype if isinstance(x, Tensor) else x == y
        for x, y in zip(values(a), values(b), strict=True)
    )


def test_from_encodings():
    """A mapping of lists and a list of mappings give what the padded batch gives; other keys are ignored."""
    inputs = padded_inputs()
    encodings = one_by_one(inputs)
    expected = PackedBatch.from_padded(**inputs)
    mapping = {name: [encoding[name] for encoding in encodings] for name in encodings[0]}
    assert equal_batches(PackedBatch.from_encodings(encodings), expected)
    assert equal_batches(PackedBatch.from_encodings(mapping), expected)
    assert equal_batches(PackedBatch.from_encodings({**mapping, "overflowing": [1, 2]}), expected)
    arrays = [{name: torch.tensor(value) for name, value in encoding.items()} for encoding in encodings]
    assert equal_batches(PackedBatch.from_encodings(arrays), expected)


def test_from_encodings_leaves_out_what_masks_exclude():
    inputs = padded_inputs("holes")
    lists = {name: value.tolist() for name, value in inputs.items()}
    assert equal_batches(PackedBatch.from_encodings(lists), PackedBatch.from_padded(**inputs))


def test_from_encodings_with_ragged_mentions_and_missing_entities():
    encodings = [
        {"input_ids": [0, 11, 12, 2]},
        {"input_ids": [0, 13, 2], "entity_ids": [4, 5], "entity_position_ids": [[1], [1, 2]]},
        {"input_ids": [0, 2], "entity_ids": [], "entity_position_ids": []},
    ]
    batch = PackedBatch.from_encodings(encodings)
    assert batch.lengths.cu_words.tolist() == [0, 4, 7, 9]
    assert batch.lengths.cu_entities.tolist() == [0, 0, 2, 2]
    assert batch.input_ids.tolist() == [0, 11, 12, 2, 0, 13, 2, 0, 2]
    assert batch.position_ids.tolist() == [2, 3, 4, 5, 2, 3, 4, 2, 3]
    assert batch.entity_ids.tolist() == [4, 5]
    assert batch.entity_position_ids.tolist() == [[1, -1], [1, 2]]
    assert PackedBatch.from_encodings(encodings[:1]).padded_entities == 0


@pytest.mark.parametrize(
    ("encodings", "message"),
    [
        ([], "encodings must hold at least one sequence, each with input_ids"),
        ({}, "encodings must hold at least one sequence, each with input_ids"),
        (
            [{"input_ids": [1]}, {"token_type_ids": [0]}],
            "encodings must hold at least one sequence, each with input_ids",
        ),
        (
            [{"input_ids": [5, 6], "token_type_ids": [0]}],
            "token_type_ids must have one value for each of input_ids, 2, got 1",
        ),
        ({"input_ids": [[5]], "entity_ids": [[3]]}, "entity_position_ids must"),
        (
            [{"input_ids": [5]}, {"input_ids": [5], "entity_ids": [3], "entity_position_ids": []}],
            "entity_position_ids must have one value for each of entity_ids, 1, got 0",
        ),
        ([{"input_ids": [5, 6], "attention_mask": [1, 2]}], "attention_mask must hold 0 and 1 only, got 1 to 2"),
        ([{"input_ids": [5.5, 6]}], "input_ids must be integers, got"),
    ],
)
def test_bad_encodings(encodings, message):
    with pytest.raises((ValueError, TypeError), match=message):
        PackedBatch.from_encodings(encodings)


@pytest.mark.parametrize("padding", PADDINGS)
def test_packing_and_padding(padding):
    batch = PackedBatch.from_padded(**padded_inputs(padding))
    for pack, pad, tokens in (
        (batch.pack_words, batch.pad_words, batch.num_words),
        (batch.pack_entities, batch.pad_entities, batch.num_entities),
    ):
        packed = torch.randn(tokens, 5)
        padded = pad(packed, -7)
        assert torch.equal(pack(padded), packed)
        assert (padded == -7).all(dim=-1).sum() == padded.shape[0] * padded.shape[1] - tokens
        labels = torch.arange(padded.shape[0] * padded.shape[1]).view(padded.shape[:2])
        assert torch.equal(pad(pack(labels), -1)[padded[..., 0] != -7], labels[padded[..., 0] != -7])
        assert not pad(packed)[padded[..., 0] == -7].any()


@pytest.mark.parametrize("shape", [(BATCH, WORDS + 1), (WORDS, BATCH), (BATCH - 1, WORDS), (BATCH * WORDS,)])
def test_packing_other_shapes_is_refused(shape):
    """Rows counted in another width would be other words."""
    batch = PackedBatch.from_padded(**padded_inputs())
    with pytest.raises(ValueError, match=r"must have the shape \(3, 7.*got"):
        batch.pack_words(torch.zeros(shape))


@pytest.mark.parametrize("backend", ["auto", "cpu", "sdpa", "reference"])
@pytest.mark.parametrize("changes", [{}, {"use_entity_aware_attention": False}])
@pytest.mark.parametrize("padding", PADDINGS)
def test_packed_equals_padded_equals_one_by_one(padding, changes, backend):
    inputs = padded_inputs(padding)
    batch = PackedBatch.from_padded(**inputs)
    model = build(LukeModel, backend=backend, **changes)
    expected = build(LukeModel, backend="reference", **changes)(**inputs)
    words, entities = inputs["attention_mask"].bool(), inputs["entity_attention_mask"].bool()
    padded = model(**inputs)
    packed = model(batch, output_hidden_states=True)
    torch.testing.assert_close(padded.last_hidden_state, expected.last_hidden_state)
    torch.testing.assert_close(padded.entity_last_hidden_state, expected.entity_last_hidden_state)
    torch.testing.assert_close(packed.last_hidden_state, expected.last_hidden_state[words])
    torch.testing.assert_close(packed.entity_last_hidden_state, expected.entity_last_hidden_state[entities])
    torch.testing.assert_close(packed.pooler_output, expected.pooler_output)
    assert [state.shape for state in packed.hidden_states] == [(batch.num_words, 32)] * 3
    assert [state.shape for state in packed.entity_hidden_states] == [(batch.num_entities, 32)] * 3
    for b in range(BATCH):
        alone = model(**{name: value[b : b + 1] for name, value in inputs.items()})
        torch.testing.assert_close(alone.last_hidden_state[0], padded.last_hidden_state[b])
        torch.testing.assert_close(alone.entity_last_hidden_state[0], padded.entity_last_hidden_state[b])
        torch.testing.assert_close(alone.pooler_output[0], padded.pooler_output[b])


def test_attentions_of_a_packed_batch():
    inputs = padded_inputs("holes")
    model = build(LukeModel)
    padded = model(**inputs, output_attentions=True)
    packed = model(PackedBatch.from_padded(**inputs), output_attentions=True)
    for a, b in zip(packed.attentions, padded.attentions, strict=True):
        assert torch.equal(a, b)


def test_to():
    inputs = padded_inputs()
    columns = torch.zeros(BATCH, ENTITIES, dtype=torch.int64)
    batch = PackedBatch.from_padded(**inputs, entity_start_positions=columns, entity_end_positions=columns)
    assert equal_batches(batch.to("cpu"), batch)
    moved = batch.to("meta")
    tensors = {f.name: getattr(moved, f.name) for f in dataclasses.fields(moved)}
    assert {name for name, value in tensors.items() if value is None} == {"inputs_embeds"}
    devices = {value.device.type for value in tensors.values() if isinstance(value, Tensor)}
    assert devices == {"meta"}
    assert moved.lengths.cu_words.device.type == moved.lengths.cu_entities.device.type == "meta"
    output = build(LukeModel).to("meta")(moved)
    assert output.last_hidden_state.shape == (batch.num_words, 32)


@pytest.mark.parametrize("backend", ["auto", "cpu", "sdpa"])
@pytest.mark.parametrize("with_entities", [True, False])
def test_a_sequence_without_words(with_entities, backend):
    model, inputs = build(LukeModel, backend=backend), padded_inputs()
    inputs["attention_mask"][1] = 0
    if not with_entities:
        inputs["entity_attention_mask"][1] = 0
    output = model(**inputs)
    assert not output.last_hidden_state[1].any()
    torch.testing.assert_close(output.pooler_output[1], model.pooler["dense"].bias.tanh())
    assert output.entity_last_hidden_state[1, :2].any().item() is with_entities
    for b in (0, 2):
        alone = model(**{name: value[b : b + 1] for name, value in inputs.items()})
        torch.testing.assert_close(output.last_hidden_state[b], alone.last_hidden_state[0])
    sum(value.sin().sum() for value in output.to_tuple()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("backend", ["auto", "cpu", "sdpa"])
@pytest.mark.parametrize(("batch", "words", "entities"), [(0, 7, 4), (2, 0, 0), (2, 0, 3), (2, 5, 0)])
@pytest.mark.parametrize("attentions", [True, False])
def test_empty_batches(batch, words, entities, attentions, backend):
    model = build(LukeModel, backend=backend)
    output = model(
        torch.full((batch, words), 5),
        entity_ids=torch.full((batch, entities), 5),
        entity_position_ids=torch.zeros(batch, entities, 2, dtype=torch.int64),
        output_attentions=attentions,
    )
    assert output.last_hidden_state.shape == (batch, words, 32)
    assert output.pooler_output.shape == (batch, 32)
    assert output.pooler_output.isfinite().all()
    if entities:
        assert output.entity_last_hidden_state.shape == (batch, entities, 32)
        assert output.entity_last_hidden_state.isfinite().all()
    sum(value.sum() for value in output.to_tuple()[:2]).backward()


def test_entities_absent_from_some_sequences():
    model, inputs = build(LukeModel), padded_inputs()
    inputs["entity_attention_mask"][1] = 0
    output = model(**inputs)
    assert not output.entity_last_hidden_state[1].any()
    alone = model(**{name: value[1:2] for name, value in words_of(inputs).items()})
    torch.testing.assert_close(output.last_hidden_state[1], alone.last_hidden_state[0])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("outputs", [{}, {"output_attentions": True}, {"output_hidden_states": True}])
def test_rows_to_compute(packed, outputs):
    model, inputs = build(LukeModel), padded_inputs("holes")
    batch = PackedBatch.from_padded(**inputs)
    rows = torch.tensor([0, 3, batch.num_words - 1, batch.num_words, batch.num_words + 5])
    rows = rows[[3, 0, 4, 1, 2]]  # in any order
    given = {"input_ids": batch} if packed else inputs
    some, every = (model(**given, **outputs, rows_to_compute=r) for r in (rows, None))

    def tokens(output) -> Tensor:
        words, entities = output.last_hidden_state, output.entity_last_hidden_state
        return torch.cat([words, entities] if packed else [batch.pack_words(words), batch.pack_entities(entities)])

    torch.testing.assert_close(tokens(some)[rows], tokens(every)[rows])
    others = torch.ones(len(tokens(some)), dtype=torch.bool).index_fill(0, rows, False)
    assert not tokens(some)[others].any()
    assert tokens(every)[others].any(dim=1).all()
    if outputs == {"output_hidden_states": True}:
        torch.testing.assert_close(some.hidden_states[1], every.hidden_states[1])
        assert torch.equal(some.hidden_states[-1], some.last_hidden_state)
    gradients = [
        torch.autograd.grad(tokens(o)[rows].sin().sum(), model.get_input_embeddings().weight) for o in (some, every)
    ]
    torch.testing.assert_close(*gradients)


# Bad input

LONG = torch.full((1, 39), 5)
HIDDEN = torch.zeros(BATCH, WORDS, 32, dtype=torch.float64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_ids": torch.full((BATCH, WORDS), 99)}, r"input_ids must lie in \[0, 98\], got 99"),
        ({"input_ids": torch.full((BATCH, WORDS), -1)}, r"input_ids must lie in \[0, 98\], got -1"),
        ({"input_ids": torch.full((BATCH, WORDS), 5.0)}, "input_ids must be integers, got torch.float32"),
        ({"input_ids": torch.full((WORDS,), 5)}, r"input_ids must have the shape \(any, any\), got \(7,\)"),
        ({"input_ids": [[5] * WORDS] * BATCH}, "input_ids must be a tensor, got list"),
        ({"input_ids": None}, "input_ids or inputs_embeds must be given, and not both"),
        ({"inputs_embeds": HIDDEN}, "input_ids or inputs_embeds must be given, and not both"),
        ({"input_ids": None, "inputs_embeds": HIDDEN[..., :31]}, "inputs_embeds must have the hidden size 32, got 31"),
        ({"input_ids": None, "inputs_embeds": HIDDEN[0]}, r"inputs_embeds must be \(B, W, C\), got .*\(7, 32\)"),
        ({"position_ids": torch.full((BATCH, WORDS), 40)}, r"position_ids must lie in \[0, 39\], got 40"),
        ({"position_ids": torch.full((BATCH, WORDS), -1)}, r"position_ids must lie in \[0, 39\], got -1"),
        ({"position_ids": torch.zeros(1, WORDS).long()}, r"position_ids must have the shape \(3, 7\), got \(1, 7\)"),
        ({"token_type_ids": torch.full((BATCH, WORDS), 3)}, r"token_type_ids must lie in \[0, 2\], got 3"),
        ({"token_type_ids": torch.zeros(BATCH, WORDS)}, "token_type_ids must be integers, got torch.float32"),
        ({"attention_mask": torch.full((BATCH, WORDS), 2)}, "attention_mask must hold 0 and 1 only, got 2 to 2"),
        (
            {"attention_mask": torch.full((BATCH, WORDS), -1e4)},
            "attention_mask must hold 0 and 1 only, got -10000.0 to",
        ),
        (
            {"attention_mask": torch.ones(BATCH, 1, WORDS)},
            r"attention_mask must have the shape \(3, 7\), got \(3, 1, 7\)",
        ),
        (
            {"attention_mask": torch.ones(BATCH, WORDS + 4)},
            r"attention_mask must have the shape \(3, 7\), got \(3, 11\)",
        ),
        ({"entity_ids": torch.full((BATCH, ENTITIES), 10)}, r"entity_ids must lie in \[0, 9\], got 10"),
        ({"entity_ids": torch.zeros(BATCH, ENTITIES)}, "entity_ids must be integers, got torch.float32"),
        ({"entity_ids": torch.zeros(2, ENTITIES).long()}, r"entity_ids must have the shape \(3, any\), got \(2, 4\)"),
        ({"entity_position_ids": None}, "entity_position_ids must be given with entity_ids, got None"),
        (
            {"entity_position_ids": torch.full((BATCH, ENTITIES, 2), 40)},
            r"entity_position_ids must lie in \[-1, 39\], got 40",
        ),
        (
            {"entity_position_ids": torch.full((BATCH, ENTITIES, 2), -2)},
            r"entity_position_ids must lie in \[-1, 39\], got -2",
        ),
        (
            {"entity_position_ids": torch.zeros(BATCH, ENTITIES).long()},
            r"entity_position_ids must have the shape \(3, 4, any\), got \(3, 4\)",
        ),
        (
            {"entity_token_type_ids": torch.full((BATCH, ENTITIES), 3)},
            r"entity_token_type_ids must lie in \[0, 2\], got 3",
        ),
        (
            {"entity_attention_mask": torch.full((BATCH, ENTITIES), 2)},
            "entity_attention_mask must hold 0 and 1 only, got 2",
        ),
        (
            {"entity_attention_mask": torch.ones(BATCH, WORDS)},
            r"entity_attention_mask must have the shape \(3, 4\), got \(3, 7\)",
        ),
        ({"entity_ids": None}, "entity_attention_mask must be None where entity_ids is None, got torch.int64"),
        (
            {"entity_ids": None, "entity_attention_mask": None, "entity_token_type_ids": None},
            "entity_position_ids must be None where entity_ids is None, got torch.int64",
        ),
    ],
)
def test_bad_inputs(changes, message):
    inputs = {**padded_inputs("none"), **changes}
    with pytest.raises((ValueError, TypeError), match=message):
        build(LukeModel)(**inputs)


def test_types_where_there_is_one():
    """As in every released model; transformers fails in the middle."""
    model, inputs = build(LukeModel, type_vocab_size=1), padded_inputs()
    del inputs["token_type_ids"]
    inputs["entity_token_type_ids"] = torch.ones_like(inputs["entity_ids"])
    with pytest.raises(ValueError, match=r"entity_token_type_ids must lie in \[0, 0\], got 1"):
        model(**inputs)


@pytest.mark.parametrize("kind", ["padded", "packed", "embeds"])
def test_the_longest_sequence(kind):
    model = build(LukeModel)

    def run(words: int) -> Tensor:
        ids = torch.full((1, words), 5)
        if kind == "packed":
            return model(PackedBatch.from_encodings({"input_ids": ids.tolist()}))[0]
        return model(inputs_embeds=model.get_input_embeddings()(ids))[0] if kind == "embeds" else model(ids)[0]

    assert run(38).isfinite().all()
    with pytest.raises(ValueError, match=r"input_ids must have at most 38 words a sequence .*, got 39"):
        run(39)
    # Pads do not count.
    ids, mask = torch.full((1, 50), 1), torch.zeros(1, 50)
    ids[0, -38:], mask[0, -38:] = 5, 1
    torch.testing.assert_close(model(ids, mask)[0][:, -38:], run(38).view(1, 38, 32))


def test_what_the_masks_exclude_is_not_checked_nor_read():
    """Ids of tokens that do not exist may be anything, as padding with -100 makes them."""
    model, inputs = build(LukeModel), padded_inputs()
    expected = model(**inputs)
    for name, mask in (("input_ids", "attention_mask"), ("entity_ids", "entity_attention_mask")):
        inputs[name] = inputs[name].masked_fill(inputs[mask] == 0, -100)
    result = model(**inputs)
    assert torch.equal(result.last_hidden_state, expected.last_hidden_state)
    assert torch.equal(result.entity_last_hidden_state, expected.entity_last_hidden_state)


@pytest.mark.parametrize("name", ["attention_mask", "token_type_ids", "entity_ids", "inputs_embeds"])
def test_a_packed_batch_comes_alone(name):
    inputs = padded_inputs()
    with pytest.raises(ValueError, match="must be None where input_ids is a PackedBatch, got"):
        build(LukeModel)(PackedBatch.from_padded(**inputs), **{name: inputs.get(name, HIDDEN)})


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_of_int32(dtype):
    inputs = {name: value.to(dtype) for name, value in padded_inputs().items()}
    columns = torch.zeros(BATCH, ENTITIES, dtype=dtype)
    batch = PackedBatch.from_padded(**inputs, entity_start_positions=columns, entity_end_positions=columns)
    expected = PackedBatch.from_padded(**{name: value.long() for name, value in inputs.items()})
    model = build(LukeModel)
    assert torch.equal(model(batch)[0], model(expected)[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_ids": torch.zeros(2).long()}, r"input_ids must have 16 rows, got torch.int64 \(2,\)"),
        ({"entity_rows": torch.zeros(2).long()}, r"entity_rows must have 9 rows, got torch.int64 \(2,\)"),
        ({"input_ids": None}, "input_ids or inputs_embeds must be given, and not both"),
        (
            {"lengths": PackedLengths.from_lengths([7, 4, 6], [4, 2, 3])},
            "lengths must add up to 16 words and 9 entities",
        ),
        # Kernels trust them: no row beyond the buffers may be read.
        (
            {"lengths": PackedLengths(torch.tensor([0, 50, 4, 16]).int(), torch.tensor([0, 4, 6, 9]).int(), 50, 4)},
            "lengths",
        ),
        (
            {"lengths": PackedLengths(torch.tensor([0, 7, 11, 16]).int(), torch.tensor([0, 4, 6, 9]).int(), 3, 4)},
            "lengths",
        ),
    ],
)
def test_bad_packed_batches(changes, message):
    batch = PackedBatch.from_padded(**padded_inputs())
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(batch, **changes)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_size": 30}, "hidden_size must be a multiple of num_attention_heads, 4, got 30"),
        ({"hidden_act": "glu"}, "hidden_act must be one of gelu, .*, got 'glu'"),
        ({"vocab_size": 0}, "vocab_size must be a positive int, got 0"),
        ({"entity_vocab_size": -1}, "entity_vocab_size must be a positive int, got -1"),
        ({"entity_emb_size": 0}, "entity_emb_size must be a positive int, got 0"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive int, got 0"),
        ({"num_attention_heads": 0}, "num_attention_heads must be a positive int, got 0"),
        ({"intermediate_size": 1.0}, "intermediate_size must be a positive int, got 1.0"),
        ({"type_vocab_size": True}, "type_vocab_size must be a positive int, got True"),
        ({"num_labels": 0}, "num_labels must be a positive int, got 0"),
        ({"num_labels": 3, "id2label": {0: "a", 1: "b"}}, "id2label must name num_labels, 3, labels, got 2"),
        ({"pad_token_id": 99}, "pad_token_id must be a word id .*, got 99"),
        ({"max_position_embeddings": 2}, "pad_token_id must be a word id that leaves positions free"),
        ({"problem_type": "ranking"}, "problem_type must be None or one of regression, .*, got 'ranking'"),
        ({"hidden_dropout_prob": 1.5}, "dropout"),
        ({"attention_probs_dropout_prob": -0.1}, "dropout"),
    ],
)
def test_bad_configs(settings, message):
    with pytest.raises(ValueError, match=message):
        LukeModel(LukeConfig(**{**SIZES, **settings}))


def test_config():
    config = LukeConfig(**{**SIZES, "entity_emb_size": None}, id2label={"0": "PER", "1": "LOC", "2": "ORG"})
    assert (config.entity_emb_size, config.num_labels, config.max_words) == (32, 3, 38)
    assert config.label2id == {"PER": 0, "LOC": 1, "ORG": 2}
    assert LukeConfig.from_dict(config.to_dict()) == config
    assert LukeConfig.from_dict(config.to_dict(), num_labels=5).id2label[4] == "LABEL_4"
    assert LukeConfig.from_dict({**config.to_dict(), "bert_model_name": "x"}).extra == {"bert_model_name": "x"}
    with pytest.raises(ValueError, match="hidden must be a setting of LukeConfig, got 3"):
        LukeConfig.from_dict({}, hidden=3)


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu", "swish", "tanh"])
def test_activations(activation):
    model, inputs = build(LukeModel, hidden_act=activation), padded_inputs("none")
    torch.testing.assert_close(model(**inputs)[0], of_transformers(model)(**inputs)[0])


def test_unknown_backend():
    with pytest.raises(ValueError, match=r"backend must be one of auto, .*, got 'flash'"):
        LukeModel(LukeConfig(**SIZES), backend="flash")


# torch.compile


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo, past a graph break
@pytest.mark.parametrize("kind", ["padded", "packed", "words"])
@pytest.mark.parametrize("grad", [True, False])
def test_compiles(kind, grad):
    torch._dynamo.reset()
    model = build(LukeModel)
    compiled = torch.compile(model, backend="aot_eager")
    for padding in ("holes", "right"):
        inputs = padded_inputs(padding)
        given = {"packed": {"input_ids": PackedBatch.from_padded(**inputs)}, "words": words_of(inputs)}.get(
            kind, inputs
        )
        with torch.set_grad_enabled(grad):
            results, expected = compiled(**given), model(**given)
        assert results.keys() == expected.keys()
        for a, b in zip(results.to_tuple(), expected.to_tuple(), strict=True):
            torch.testing.assert_close(a, b)
        if grad:
            weight = model.get_input_embeddings().weight
            torch.testing.assert_close(*(torch.autograd.grad(o[0].sin().sum(), weight) for o in (results, expected)))
