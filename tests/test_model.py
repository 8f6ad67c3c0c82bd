"""The encoder: equal to transformers' encoder, packed or padded, every bad input named."""

import copy
import dataclasses
import pickle

import pytest
import torch
from luke_cases import (
    BATCH,
    ENTITIES,
    PADDINGS,
    SIZES,
    WORD_LENGTHS,
    WORDS,
    build,
    equal_batches,
    of_transformers,
    padded_inputs,
    words_of,
)
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from luke_kernels import (
    LukeConfig,
    LukeForEntityClassification,
    LukeForMaskedLM,
    LukeForTokenClassification,
    LukeModel,
    PackedBatch,
)

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


@pytest.mark.parametrize("cls", [LukeModel, LukeForEntityClassification, LukeForMaskedLM, LukeForTokenClassification])
def test_packed_batches_compile_whole_and_once(cls):
    """Whatever their lengths, and the number of sequences, from the second batch on."""
    torch._dynamo.reset()
    counter = CompileCounter()
    model = build(cls, num_labels=4)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for words, entities in (([5, 7], [2, 3]), ([9, 4, 3], [1, 6, 2]), ([30, 20, 5, 6], [4, 9, 2, 2])):
        lengths = zip(words, entities, strict=True)
        rows = [{"input_ids": [5] * w, "entity_ids": [3] * e, "entity_position_ids": [[0, 1]] * e} for w, e in lengths]
        batch = PackedBatch.from_encodings(rows, pad_token_id=1)
        with torch.no_grad():
            for a, b in zip(compiled(batch).to_tuple(), model(batch).to_tuple(), strict=True):
                torch.testing.assert_close(a, b)
    assert counter.frame_count == 1


def test_positions_counted_from_another_pad_are_refused():
    """As of a batch packed for RoBERTa that goes to a model started from BERT."""
    batch = PackedBatch.from_padded(**padded_inputs(), pad_token_id=0)
    with pytest.raises(ValueError, match=r"pad_token_id of a PackedBatch must be that of the model, 1, .*, got 0"):
        build(LukeModel)(batch)
