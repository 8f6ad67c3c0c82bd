"""LUKE with each head: equal to transformers' classes, packed or padded, losses, ties, every bad argument named."""

import copy
import dataclasses
import inspect
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from luke_cases import (
    BATCH,
    ENTITIES,
    ENTITY_LENGTHS,
    PADDINGS,
    SIZES,
    WORD_LENGTHS,
    WORDS,
    build,
    of_transformers,
    padded_inputs,
    words_of,
)
from torch import Tensor

import luke_kernels
from luke_kernels import (
    LukeConfig,
    LukeForEntityClassification,
    LukeForEntityPairClassification,
    LukeForEntitySpanClassification,
    LukeForMaskedLM,
    LukeForMultipleChoice,
    LukeForQuestionAnswering,
    LukeForSequenceClassification,
    LukeForTokenClassification,
    LukeModel,
    LukePreTrainedModel,
    PackedBatch,
)

HEADS = [
    LukeForMaskedLM,
    LukeForEntityClassification,
    LukeForEntityPairClassification,
    LukeForEntitySpanClassification,
    LukeForSequenceClassification,
    LukeForTokenClassification,
    LukeForQuestionAnswering,
    LukeForMultipleChoice,
]
CHOICES, LABELS = 3, 5
SETTINGS = {LukeForQuestionAnswering: {"num_labels": 2}}


def make(cls, **changes: Any) -> Any:
    return build(cls, **{"num_labels": LABELS, **SETTINGS.get(cls, {}), **changes})


def inputs_for(cls, padding: str = "right") -> dict[str, Tensor]:
    """Draw the inputs of a head; for choices, each sequence is rolled and taken CHOICES times."""
    inputs = padded_inputs(padding)
    if cls is LukeForEntitySpanClassification:
        for end in ("start", "end"):
            columns = [torch.multinomial(mask.float(), ENTITIES) for mask in inputs["attention_mask"]]
            inputs[f"entity_{end}_positions"] = torch.stack(columns)
    if cls is LukeForMultipleChoice:
        inputs = {
            name: torch.stack([value.roll(choice, 0) for choice in range(CHOICES)], dim=1)
            for name, value in inputs.items()
        }
    return inputs


def labels_for(cls, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Draw labels, -100 in pads."""
    words, entities = inputs["attention_mask"] == 0, inputs["entity_attention_mask"] == 0
    if cls is LukeForMaskedLM:
        labels = torch.randint(0, 99, words.shape).masked_fill(words, -100)
        labels[0, :2] = -100
        return {"labels": labels, "entity_labels": torch.randint(0, 10, entities.shape).masked_fill(entities, -100)}
    if cls is LukeForEntitySpanClassification:
        return {"labels": torch.randint(0, LABELS, entities.shape).masked_fill(entities, -100)}
    if cls is LukeForTokenClassification:
        return {"labels": torch.randint(0, LABELS, words.shape).masked_fill(words, -100)}
    if cls is LukeForQuestionAnswering:
        exist = inputs["attention_mask"].float()
        return {f"{end}_positions": torch.multinomial(exist, 1).squeeze(1) for end in ("start", "end")}
    return {"labels": torch.randint(0, CHOICES if cls is LukeForMultipleChoice else LABELS, (BATCH,))}


def packed_for(cls, inputs: dict[str, Tensor], labels: dict[str, Tensor]) -> dict[str, Any]:
    """Pack the arguments of a head."""
    if cls is LukeForMultipleChoice:
        flat = {name: value.flatten(0, 1) for name, value in inputs.items()}
        return {"input_ids": PackedBatch.from_padded(**flat), "num_choices": CHOICES, **labels}
    batch = PackedBatch.from_padded(**inputs)
    pack = {
        LukeForMaskedLM: {"labels": batch.pack_words, "entity_labels": batch.pack_entities},
        LukeForTokenClassification: {"labels": batch.pack_words},
        LukeForEntitySpanClassification: {"labels": batch.pack_entities},
    }.get(cls, {})
    return {"input_ids": batch, **{name: pack.get(name, lambda x: x)(value) for name, value in labels.items()}}


# Against transformers


@pytest.mark.parametrize("changes", [{}, {"entity_emb_size": None}, {"use_entity_aware_attention": False}])
@pytest.mark.parametrize("cls", [LukeModel, *HEADS])
def test_names_of_weights(cls, changes):
    """of_transformers loads strictly; here also the shapes, and which tensors are one."""
    model = make(cls, **changes)
    theirs = of_transformers(model)
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert set(dict(model.named_parameters(remove_duplicate=False))) == set(
        dict(theirs.named_parameters(remove_duplicate=False))
    )


@pytest.mark.parametrize("outputs", [(), ("output_attentions",), ("output_hidden_states", "output_attentions")])
@pytest.mark.parametrize("with_labels", [True, False])
@pytest.mark.parametrize("cls", [LukeModel, *HEADS])
def test_outputs_equal_those_of_transformers(cls, with_labels, outputs):
    """Names, order, values and losses, as an object and as a tuple, where no token is a pad."""
    model, inputs = make(cls), inputs_for(cls, "none")
    arguments = {**inputs, **(labels_for(cls, inputs) if with_labels and cls is not LukeModel else {})}
    arguments |= dict.fromkeys(outputs, True)
    theirs = of_transformers(model)
    ours, expected = (
        model(**arguments),
        theirs(**{k: v.clone() if isinstance(v, Tensor) else v for k, v in arguments.items()}),
    )
    assert ours.keys() == list(expected.keys())
    tuple_, expected_tuple = model(**arguments, return_dict=False), theirs(**arguments, return_dict=False)
    for results, values in ((ours.to_tuple(), expected.to_tuple()), (tuple_, expected_tuple)):
        assert len(results) == len(values)
        torch.testing.assert_close(results, values)
    assert all(a is b for a, b in zip(ours.to_tuple(), (ours[name] for name in ours.keys()), strict=True))  # noqa: SIM118


@pytest.mark.parametrize("cls", [c for c in HEADS if c is not LukeForQuestionAnswering])
def test_losses_and_gradients_equal_those_of_transformers_with_pads(cls):
    """With labels of -100 in the pads, or none a token, pads take no part in either."""
    model, inputs = make(cls), inputs_for(cls)
    theirs, arguments = of_transformers(model), {**inputs, **labels_for(cls, inputs)}
    ours, expected = model(**arguments), theirs(**arguments)
    torch.testing.assert_close(ours.loss, expected.loss)
    for m, output in ((model, ours), (theirs, expected)):
        m.zero_grad()
        output.loss.backward()
    for name, parameter in model.named_parameters():
        gradient = theirs.get_parameter(name).grad
        if name == "lm_head.decoder.weight" or "word_embeddings" in name or "entity_embeddings.entity_emb" in name:
            continue  # transformers ties other tables, and takes entity 0 for a pad
        if name == "lm_head.bias" and gradient is None:
            gradient = theirs.lm_head.decoder.bias.grad
        if parameter.grad is None or gradient is None:
            assert parameter.grad is None or not parameter.grad.any(), name
            assert gradient is None or not gradient.any(), name
        else:
            torch.testing.assert_close(parameter.grad, gradient, msg=lambda text, name=name: f"{name}: {text}")


# Shapes and losses


@pytest.mark.parametrize("with_entities", [True, False])
@pytest.mark.parametrize("cls", HEADS)
def test_shapes_of_logits(cls, with_entities):
    if not with_entities and "Entity" in cls.__name__:
        pytest.skip("reads entities")
    inputs = inputs_for(cls)
    model = make(cls)
    output = model(**(inputs if with_entities else words_of(inputs)), output_hidden_states=True, output_attentions=True)
    shapes = {
        LukeForMaskedLM: {"logits": (BATCH, WORDS, 99), "entity_logits": (BATCH, ENTITIES, 10)},
        LukeForEntitySpanClassification: {"logits": (BATCH, ENTITIES, LABELS)},
        LukeForTokenClassification: {"logits": (BATCH, WORDS, LABELS)},
        LukeForQuestionAnswering: {"start_logits": (BATCH, WORDS), "end_logits": (BATCH, WORDS)},
        LukeForMultipleChoice: {"logits": (BATCH, CHOICES)},
    }.get(cls, {"logits": (BATCH, LABELS)})
    if not with_entities:
        shapes.pop("entity_logits", None)
        assert output.entity_hidden_states is None
    found = {name: tuple(output[name].shape) for name in output.keys() if name.endswith("logits")}  # noqa: SIM118
    assert found == shapes
    assert output.loss is None
    tokens = WORDS + ENTITIES * with_entities
    rows = BATCH * (CHOICES if cls is LukeForMultipleChoice else 1)
    assert [a.shape for a in output.attentions] == [(rows, 4, tokens, tokens)] * 2
    assert [h.shape for h in output.hidden_states] == [(rows, WORDS, 32)] * 3


def test_masked_lm_losses():
    """Word labels only, entity labels only, both; each the mean over its labels that are not -100."""
    model, inputs = make(LukeForMaskedLM), inputs_for(LukeForMaskedLM)
    labels = labels_for(LukeForMaskedLM, inputs)
    both = model(**inputs, **labels)
    mlm = F.cross_entropy(both.logits.flatten(0, 1), labels["labels"].flatten())
    mep = F.cross_entropy(both.entity_logits.flatten(0, 1), labels["entity_labels"].flatten())
    torch.testing.assert_close((both.loss, both.mlm_loss, both.mep_loss), (mlm + mep, mlm, mep))
    words = model(**inputs, labels=labels["labels"])
    torch.testing.assert_close((words.loss, words.mlm_loss), (mlm, mlm))
    assert words.mep_loss is None
    entities = model(**inputs, entity_labels=labels["entity_labels"])
    torch.testing.assert_close((entities.loss, entities.mep_loss), (mep, mep))
    assert entities.mlm_loss is None
    alone = model(**words_of(inputs), labels=labels["labels"])
    assert alone.entity_logits is alone.mep_loss is None
    assert alone.loss == alone.mlm_loss


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64])
@pytest.mark.parametrize("cls", [LukeForEntityClassification, LukeForEntityPairClassification])
def test_take_entities_that_hold_several(cls, dtype):
    model, inputs = make(cls), inputs_for(cls)
    several = torch.randint(0, 2, (BATCH, LABELS)).to(dtype)
    output = model(**inputs, labels=several)
    torch.testing.assert_close(output.loss, F.binary_cross_entropy_with_logits(output.logits, several.double()))
    torch.testing.assert_close(output.loss, of_transformers(model)(**inputs, labels=several).loss)
    one = several.argmax(dim=1)
    torch.testing.assert_close(model(**inputs, labels=one).loss, F.cross_entropy(output.logits, one))


@pytest.mark.parametrize("padding", PADDINGS)
def test_labels_of_spans_that_hold_several(padding):
    model, inputs = make(LukeForEntitySpanClassification), inputs_for(LukeForEntitySpanClassification, padding)
    several = torch.randint(0, 2, (BATCH, ENTITIES, LABELS))
    output = model(**inputs, labels=several)
    exist = inputs["entity_attention_mask"].bool()
    expected = F.binary_cross_entropy_with_logits(output.logits[exist], several[exist].double())
    torch.testing.assert_close(output.loss, expected)
    logits = of_transformers(model)(**inputs).logits
    torch.testing.assert_close(output.logits[exist], logits[exist])
    assert not output.logits[~exist].any()


@pytest.mark.parametrize(
    ("problem_type", "num_labels", "labels"),
    [
        ("regression", 1, torch.rand(BATCH, dtype=torch.float64)),
        ("regression", 1, torch.rand(BATCH, 1, dtype=torch.float64)),
        ("regression", 4, torch.rand(BATCH, 4, dtype=torch.float64)),
        ("single_label_classification", 4, torch.tensor([3, 0, 1])),
        ("multi_label_classification", 4, torch.randint(0, 2, (BATCH, 4)).double()),
    ],
)
@pytest.mark.parametrize("inferred", [False, True])
def test_problem_types(problem_type, num_labels, labels, inferred):
    if inferred and problem_type == "regression" and num_labels > 1:
        pytest.skip("floats of several labels are several classes unless the config says otherwise")
    changes = {"num_labels": num_labels, "problem_type": None if inferred else problem_type}
    model, inputs = make(LukeForSequenceClassification, **changes), inputs_for(LukeForSequenceClassification)
    output = model(**inputs, labels=labels)
    expected = {
        "regression": lambda: F.mse_loss(output.logits.view(labels.shape), labels),
        "single_label_classification": lambda: F.cross_entropy(output.logits, labels),
        "multi_label_classification": lambda: F.binary_cross_entropy_with_logits(output.logits, labels),
    }[problem_type]()
    torch.testing.assert_close(output.loss, expected)
    # transformers writes its guess into the config.
    assert model.config.problem_type == changes["problem_type"]
    theirs = of_transformers(model)(words_of(inputs)["input_ids"], labels=labels).loss
    torch.testing.assert_close(model(inputs["input_ids"], labels=labels).loss, theirs)


@pytest.mark.parametrize("padding", PADDINGS)
def test_answers_lie_in_no_pad(padding):
    model, inputs = make(LukeForQuestionAnswering), inputs_for(LukeForQuestionAnswering, padding)
    labels = labels_for(LukeForQuestionAnswering, inputs)
    output = model(**inputs, **labels)
    theirs = of_transformers(model)(**inputs)
    exist = inputs["attention_mask"].bool()
    losses = []
    for name in ("start", "end"):
        logits = output[f"{name}_logits"]
        torch.testing.assert_close(logits[exist], theirs[f"{name}_logits"][exist])
        assert (logits[~exist] == torch.finfo(logits.dtype).min).all()
        losses += [
            F.cross_entropy(row[mask][None], mask.cumsum(0)[p, None] - 1)
            for row, mask, p in zip(theirs[f"{name}_logits"], exist, labels[f"{name}_positions"], strict=True)
        ]
    torch.testing.assert_close(output.loss, torch.stack(losses).mean())


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("outside", [5, WORDS, 1000, -100])
def test_answers_outside_are_ignored(packed, outside):
    """Outside the padded width or only the sequence: its loss must not hang on the sequences beside it."""
    model, inputs = make(LukeForQuestionAnswering), inputs_for(LukeForQuestionAnswering)
    given = {"input_ids": PackedBatch.from_padded(**inputs)} if packed else inputs
    start, end = torch.tensor([3, outside, 2]), torch.tensor([3, 1, 2])
    positions = start.clone()
    loss = model(**given, start_positions=start, end_positions=end).loss
    assert torch.equal(start, positions)
    if outside == -100:
        # As in transformers: clamped to the first word.
        start[1] = 0
        expected = model(**given, start_positions=start, end_positions=end).loss
    else:
        output = model(**inputs)
        losses = [F.cross_entropy(output.start_logits[[0, 2]], start[[0, 2]]), F.cross_entropy(output.end_logits, end)]
        expected = torch.stack(losses).mean()
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("packed", [False, True])
def test_both_ends_make_the_loss(packed):
    model, inputs = make(LukeForQuestionAnswering), inputs_for(LukeForQuestionAnswering)
    given = {"input_ids": PackedBatch.from_padded(**inputs)} if packed else inputs
    assert model(**given, start_positions=torch.zeros(BATCH).long()).loss is None
    column = torch.zeros(BATCH, 1).long()
    flat = model(**given, start_positions=column[:, 0], end_positions=column[:, 0]).loss
    assert model(**given, start_positions=column, end_positions=column).loss == flat


def test_choices_are_independent():
    model, inputs = make(LukeForMultipleChoice), inputs_for(LukeForMultipleChoice)
    logits = model(**inputs).logits
    other = {name: value.flip(1) for name, value in inputs.items()}
    torch.testing.assert_close(model(**other).logits, logits.flip(1))
    for choice in range(CHOICES):
        torch.testing.assert_close(logits[:, choice], logits[:, 0].roll(choice))
    assert logits[:, 0].unique().numel() == BATCH
    assert torch.equal(model(**inputs, num_choices=CHOICES).logits, logits)


# Packed batches


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("cls", HEADS)
def test_packed_equals_padded(cls, padding):
    model, inputs = make(cls), inputs_for(cls, padding)
    labels = labels_for(cls, inputs)
    arguments = packed_for(cls, inputs, labels)
    batch = arguments["input_ids"]
    padded, packed = model(**inputs, **labels), model(**arguments)
    assert packed.keys() == padded.keys()
    for name in padded.keys():  # noqa: SIM118
        value = padded[name]
        if name == "entity_logits" or (cls is LukeForEntitySpanClassification and name == "logits"):
            value = batch.pack_entities(value)
        elif name in ("start_logits", "end_logits") or (
            name == "logits" and cls in (LukeForMaskedLM, LukeForTokenClassification)
        ):
            value = batch.pack_words(value)
        torch.testing.assert_close(packed[name], value, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("cls", HEADS)
def test_one_at_a_time(cls):
    """A sequence's logits do not hang on those beside it, and losses are means over what has labels."""
    model, inputs = make(cls), inputs_for(cls)
    labels = labels_for(cls, inputs)
    together = model(**inputs, **labels)
    alone = [model(**{k: v[b : b + 1] for k, v in {**inputs, **labels}.items()}) for b in range(BATCH)]
    for name in together.keys():  # noqa: SIM118
        if name.endswith("logits"):
            torch.testing.assert_close(torch.cat([output[name] for output in alone]), together[name])
    name = "mlm_loss" if cls is LukeForMaskedLM else "loss"
    first = next(iter(labels.values()))
    counted = (first != -100).view(BATCH, -1).sum(dim=1).double()
    losses = torch.stack([output[name] for output in alone])
    torch.testing.assert_close(together[name], (losses * counted).sum() / counted.sum())


@pytest.mark.parametrize("backend", ["cpu", "sdpa"])
@pytest.mark.parametrize("cls", HEADS)
def test_backends_agree(cls, backend):
    inputs = inputs_for(cls)
    labels = labels_for(cls, inputs)
    results, expected = (make(cls, backend=name)(**inputs, **labels).to_tuple() for name in (backend, "reference"))
    torch.testing.assert_close(results, expected)


@pytest.mark.parametrize("cls", HEADS)
def test_inputs_embeds_equal_input_ids(cls):
    model, inputs = make(cls), inputs_for(cls)
    expected = model(**inputs).to_tuple()
    embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    torch.testing.assert_close(model(**inputs, inputs_embeds=embeds).to_tuple(), expected)


@pytest.mark.parametrize("cls", [c for c in HEADS if "Entity" not in c.__name__])
def test_from_encodings_without_entities(cls):
    model, inputs = make(cls), words_of(inputs_for(cls))
    if cls is LukeForMultipleChoice:
        lists = {name: value.flatten(0, 1).tolist() for name, value in inputs.items()}
        assert torch.equal(model(PackedBatch.from_encodings(lists), num_choices=CHOICES)[0], model(**inputs)[0])
        return
    batch = PackedBatch.from_encodings({name: value.tolist() for name, value in inputs.items()})
    result, expected = model(batch), model(**inputs)
    assert result.keys() == expected.keys()
    pack = (lambda x: x) if cls is LukeForSequenceClassification else batch.pack_words
    assert torch.equal(result[0], pack(expected[0]))


# Masked language model: few words, few entities


@pytest.mark.parametrize("padding", PADDINGS)
def test_positions(padding):
    model, inputs = make(LukeForMaskedLM), inputs_for(LukeForMaskedLM, padding)
    full = model(**inputs)
    positions = torch.multinomial(inputs["attention_mask"].float(), 3)
    positions[1, 1], positions[2, :2] = -1, -1
    output = model(**inputs, positions=positions)
    assert output.logits.shape == (BATCH, 3, 99)
    expected = full.logits[torch.arange(BATCH)[:, None], positions] * (positions >= 0)[..., None]
    torch.testing.assert_close(output.logits, expected)
    assert torch.equal(output.entity_logits, full.entity_logits)
    assert model(**inputs, positions=positions[:, :0]).logits.shape == (BATCH, 0, 99)
    batch = PackedBatch.from_padded(**inputs)
    rows = torch.tensor([4, 0, batch.num_words - 1, 0])
    torch.testing.assert_close(model(batch, positions=rows).logits, batch.pack_words(full.logits)[rows])


def test_positions_of_words_that_do_not_exist():
    """As the full logits: zero."""
    model, inputs = make(LukeForMaskedLM), inputs_for(LukeForMaskedLM)
    assert not model(**inputs).logits[1, 5].any()
    assert not model(**inputs, positions=torch.tensor([[0], [5], [0]])).logits[1].any()


@pytest.mark.parametrize("padding", PADDINGS)
def test_entity_candidates(padding):
    model, inputs = make(LukeForMaskedLM), inputs_for(LukeForMaskedLM, padding)
    full, batch = model(**inputs), PackedBatch.from_padded(**inputs)
    candidates = torch.tensor([7, 0, 9])
    output = model(**inputs, entity_candidates=candidates)
    torch.testing.assert_close(output.entity_logits, full.entity_logits[..., candidates])
    assert torch.equal(output.logits, full.logits)
    packed = model(batch, entity_candidates=candidates).entity_logits
    torch.testing.assert_close(packed, batch.pack_entities(full.entity_logits)[:, candidates])

    candidates = torch.randint(-1, 10, (BATCH, ENTITIES, 5))
    exist = inputs["entity_attention_mask"].bool()
    expected = full.entity_logits.gather(2, candidates.clamp(min=0)).masked_fill(candidates < 0, -torch.inf)
    output = model(**inputs, entity_candidates=candidates).entity_logits
    assert output.shape == (BATCH, ENTITIES, 5)
    torch.testing.assert_close(output[exist], expected[exist])
    packed = model(batch, entity_candidates=batch.pack_entities(candidates)).entity_logits
    torch.testing.assert_close(packed, expected[exist])


def test_gradients_of_few_equal_those_of_all():
    model, inputs = make(LukeForMaskedLM), inputs_for(LukeForMaskedLM)
    positions, candidates = torch.tensor([[3], [1], [4]]), torch.randint(0, 10, (BATCH, ENTITIES, 2))
    few = model(**inputs, positions=positions, entity_candidates=candidates)
    full = model(**inputs)
    parameters = [p for name, p in model.named_parameters() if "pooler" not in name]
    exist = inputs["entity_attention_mask"][..., None]
    losses = [
        few.logits.sin().sum() + (few.entity_logits.sin() * exist).sum(),
        full.logits[torch.arange(BATCH), positions[:, 0]].sin().sum()
        + (full.entity_logits.gather(2, candidates).sin() * exist).sum(),
    ]
    for a, b in zip(*(torch.autograd.grad(loss, parameters) for loss in losses), strict=True):
        torch.testing.assert_close(a, b)


IDS = torch.full((BATCH, WORDS), 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"positions": IDS, "labels": IDS}, "positions must be None where labels is given, got torch.int64"),
        (
            {"entity_candidates": torch.tensor([1, 6]), "entity_labels": IDS[:, :ENTITIES]},
            "entity_labels must be among entity_candidates, got 5",
        ),
        ({"positions": torch.tensor([3])}, r"positions must be \(B, P\) with B = 3, got \(1,\)"),
        ({"positions": torch.zeros(2, 1).long()}, r"positions must be \(B, P\) with B = 3, got \(2, 1\)"),
        ({"positions": torch.full((BATCH, 1), WORDS)}, r"positions must .*got 7"),
        ({"positions": torch.full((BATCH, 1), -2)}, r"positions must .*got -2"),
        ({"positions": torch.zeros(BATCH, 1)}, "positions must be integers, got torch.float32"),
        ({"entity_candidates": [1, 2]}, "entity_candidates must be a tensor, got list"),
        (
            {"entity_candidates": torch.empty(0, dtype=torch.int64)},
            r"entity_candidates must hold one at least, got \(0,\)",
        ),
        ({"entity_candidates": torch.tensor([10])}, r"entity_candidates must .*got 10"),
        # Without pads in this form, -1 would be the last entity.
        ({"entity_candidates": torch.tensor([3, -1])}, r"entity_candidates must .*got -1"),
        ({"entity_candidates": torch.full((BATCH, ENTITIES, 2), 10)}, r"entity_candidates must .*got 10"),
        ({"entity_candidates": torch.zeros(BATCH, 2).long()}, "entity_candidates must"),
        ({"entity_candidates": torch.zeros(BATCH, ENTITIES + 1, 2).long()}, "entity_candidates must"),
    ],
)
def test_bad_places_to_score(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make(LukeForMaskedLM)(**inputs_for(LukeForMaskedLM), **arguments)


@pytest.mark.parametrize("rows", [torch.tensor([16]), torch.tensor([-1]), torch.tensor([[0]])])
def test_bad_rows_to_score(rows):
    batch = PackedBatch.from_padded(**inputs_for(LukeForMaskedLM))
    with pytest.raises(ValueError, match="positions must"):
        make(LukeForMaskedLM)(batch, positions=rows)


# Training


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("cls", HEADS)
def test_gradients_reach_every_parameter_in_use(cls, packed):
    model, inputs = make(cls), inputs_for(cls)
    model.train()
    labels = labels_for(cls, inputs)
    arguments = packed_for(cls, inputs, labels) if packed else {**inputs, **labels}
    model(**arguments).loss.backward()
    unmoved = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    last = "luke.encoder.layer.1.attention.self."
    words_are_read = cls not in (LukeForEntityClassification, LukeForEntityPairClassification)
    entities_are_read = "Entity" in cls.__name__ or cls is LukeForMaskedLM
    unused = set()
    if not words_are_read:
        unused |= {f"{last}{query}.{p}" for query in ("query", "w2e_query") for p in ("weight", "bias")}
    if not entities_are_read:
        unused |= {f"{last}{query}.{p}" for query in ("e2w_query", "e2e_query") for p in ("weight", "bias")}
    if cls not in (LukeForSequenceClassification, LukeForMultipleChoice):
        unused |= {name for name, _ in model.named_parameters() if "pooler" in name}
    if cls is LukeForMultipleChoice:
        # One bias for all choices: the softmax does not see it, and only rounding moves it.
        unmoved.discard("classifier.bias")
    assert unmoved == unused


@pytest.mark.parametrize("cls", HEADS)
def test_gradient_checkpointing(cls):
    model, inputs = make(cls), inputs_for(cls)
    model.train()
    labels, results = labels_for(cls, inputs), []
    for enable in (model.gradient_checkpointing_disable, model.gradient_checkpointing_enable):
        enable()
        model.zero_grad()
        torch.manual_seed(4)
        loss = model(**inputs, **labels).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert model.is_gradient_checkpointing
    assert model.luke.is_gradient_checkpointing
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("cls", HEADS)
def test_dropout_only_in_training(cls):
    model, inputs = make(cls), inputs_for(cls)
    assert torch.equal(model(**inputs)[0], model(**inputs)[0])
    model.train()
    assert not torch.allclose(model(**inputs)[0], model(**inputs)[0])


@pytest.mark.parametrize("classifier_dropout", [None, 0.0, 0.5])
@pytest.mark.parametrize("cls", HEADS)
def test_classifier_dropout(cls, classifier_dropout):
    """Of sequences, tokens and choices; None is hidden_dropout_prob, and the entity heads take that always."""
    settings = {"hidden_dropout_prob": 0.25, "classifier_dropout": classifier_dropout}
    model = make(cls, **settings)
    takes = cls in (LukeForSequenceClassification, LukeForTokenClassification, LukeForMultipleChoice)
    expected = classifier_dropout if takes and classifier_dropout is not None else 0.25
    if hasattr(model, "dropout"):
        assert model.dropout.p == expected
        assert of_transformers(model).dropout.p == expected
        inputs = inputs_for(cls)
        model.dropout.train()
        assert torch.equal(model(**inputs)[0], model(**inputs)[0]) is (expected == 0)
    else:
        assert cls in (LukeForMaskedLM, LukeForQuestionAnswering)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("cls", HEADS)
def test_half_precision(cls, dtype):
    model, inputs = make(cls, dtype=torch.float32), inputs_for(cls)
    labels = labels_for(cls, inputs)
    expected = model(**inputs, **labels)
    output = model.to(dtype)(**inputs, **labels)
    assert all(output[name].dtype == dtype for name in output.keys())  # noqa: SIM118
    torch.testing.assert_close(output.loss.float(), expected.loss, rtol=0.1, atol=0.1)
    output.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


# Weights


def ties(model: LukePreTrainedModel) -> list[tuple[int, int]]:
    names = [
        ("lm_head.decoder.weight", "luke.embeddings.word_embeddings.weight"),
        ("lm_head.decoder.bias", "lm_head.bias"),
        ("entity_predictions.decoder.weight", "luke.entity_embeddings.entity_embeddings.weight"),
    ]
    return [tuple(model.get_parameter(name).data_ptr() for name in pair) for pair in names]


def saved_and_loaded(model: LukePreTrainedModel, directory) -> LukePreTrainedModel:
    model.save_pretrained(directory)
    return type(model).from_pretrained(directory)


def assigned(model: LukePreTrainedModel, _) -> LukePreTrainedModel:
    other = make(type(model), tie_word_embeddings=model.config.tie_word_embeddings)
    other.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    return other


def emptied(model: LukePreTrainedModel, _) -> LukePreTrainedModel:
    with torch.device("meta"):
        other = type(model)(copy.deepcopy(model.config)).eval()
    other.to_empty(device="cpu").double()
    tied = model.config.tie_word_embeddings
    assert [a == b for a, b in ties(other)] == [tied, True, True]
    other.load_state_dict(model.state_dict())
    return other


COPIES = {
    "assigned": assigned,
    "emptied": emptied,
    "itself": lambda model, _: model,
    "saved": saved_and_loaded,
    "deepcopy": lambda model, _: copy.deepcopy(model),
    "pickle": lambda model, _: pickle.loads(pickle.dumps(model)),
    "dtype": lambda model, _: copy.deepcopy(model).to(torch.float32).to(torch.float64),
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("how", COPIES)
def test_ties(how, tied, tmp_path):
    """The entity decoder is always the entity table, the word decoder where the config says so."""
    model, inputs = make(LukeForMaskedLM, tie_word_embeddings=tied), inputs_for(LukeForMaskedLM)
    other = COPIES[how](model, tmp_path)
    assert [a == b for a, b in ties(other)] == [tied, True, True]
    assert how == "itself" or not {a for a, _ in ties(other)} & {a for a, _ in ties(model)}
    results, expected = other(**inputs), model(**inputs)
    torch.testing.assert_close(results.logits, expected.logits, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        other.get_entity_embeddings().weight.mul_(2)
        other.get_input_embeddings().weight.mul_(2)
    decoders = other.lm_head.decoder.weight, other.entity_predictions.decoder.weight
    tables = other.get_input_embeddings().weight, other.get_entity_embeddings().weight
    assert [torch.equal(a, b) for a, b in zip(decoders, tables, strict=True)] == [tied, True]


def test_a_state_dict_without_its_ties_is_refused():
    """That of a fresh LukeForMaskedLM of transformers 5: its decoder would overwrite the word table."""
    model = make(LukeForMaskedLM)
    state = {**model.state_dict(), "lm_head.decoder.weight": torch.zeros_like(model.lm_head.decoder.weight)}
    before = model.get_input_embeddings().weight.clone()
    with pytest.raises(ValueError, match=r"lm_head.decoder.weight must equal luke.*word_embeddings.weight in"):
        model.load_state_dict(state)
    del state["lm_head.decoder.weight"], state["lm_head.decoder.bias"], state["entity_predictions.decoder.weight"]
    model.load_state_dict(state)  # as transformers 4 leaves them out
    assert torch.equal(model.get_input_embeddings().weight, before)
    assert all(a == b for a, b in ties(model))


@pytest.mark.parametrize("cls", HEADS)
def test_trainers_find_the_labels(cls):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    theirs = getattr(transformers, cls.__name__)
    find_labels = transformers.utils.find_labels
    assert find_labels(cls) == find_labels(theirs)
    taken = set(inspect.signature(cls.forward).parameters)
    assert set(inspect.signature(theirs.forward).parameters) - {"kwargs", "head_mask"} <= taken


@pytest.mark.parametrize(("cls", "count"), [(LukeForEntityClassification, 1), (LukeForEntityPairClassification, 2)])
def test_too_few_entities_where_no_value_can_be_read(cls, count):
    """As on a GPU: the entity of the next sequence must not stand in."""
    inputs = padded_inputs()
    inputs["entity_attention_mask"][1] = 0
    inputs["entity_attention_mask"][1, : count - 1] = 1
    batch = PackedBatch.from_padded(**inputs).to("meta")
    message = f"entity_ids must hold at least {count} entities in each sequence, got one with {count - 1}"
    with pytest.raises(ValueError, match=message):
        make(cls).to("meta")(batch)


@pytest.mark.parametrize("cls", [LukeModel, *HEADS])
def test_saved_and_loaded(cls, tmp_path):
    model = make(cls)
    other = saved_and_loaded(model, tmp_path)
    assert not other.training
    assert dataclasses.replace(other.config, extra={}) == model.config
    assert other.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["token", "entity"])
@pytest.mark.parametrize("change", [5, -3])
def test_resizing(kind, change, tied, tmp_path):
    model = make(LukeForMaskedLM, tie_word_embeddings=tied, initializer_range=0.5)
    inputs = inputs_for(LukeForMaskedLM)
    key, logits, setting = {
        "token": ("input_ids", "logits", "vocab_size"),
        "entity": ("entity_ids", "entity_logits", "entity_vocab_size"),
    }[kind]
    size = getattr(model.config, setting) + change
    inputs[key] = inputs[key].clamp(max=size - 1)
    before = model(**inputs)
    assert getattr(model, f"resize_{kind}_embeddings")(size).weight.shape[0] == size
    assert getattr(model.config, setting) == getattr(model.luke.config, setting) == size
    assert [a == b for a, b in ties(model)] == [tied, True, True]
    after = model(**inputs)
    assert after[logits].shape[-1] == size
    kept = min(size, size - change)
    torch.testing.assert_close(after[logits][..., :kept], before[logits][..., :kept])
    other = {"logits": "entity_logits", "entity_logits": "logits"}[logits]
    assert torch.equal(after[other], before[other])
    if change > 0:
        bias = {"token": model.lm_head.bias, "entity": model.entity_predictions.bias}[kind]
        assert not bias[kept:].any()
        decoder = {"token": model.lm_head.decoder, "entity": model.entity_predictions.decoder}[kind]
        assert 0.3 < decoder.weight[kept:].std() < 0.7
    labels = labels_for(LukeForMaskedLM, inputs)
    model(**inputs, **{name: value.clamp(max=6) for name, value in labels.items()}).loss.backward()
    torch.testing.assert_close(saved_and_loaded(model, tmp_path)(**inputs)[logits], after[logits])
    of_transformers(model)


@pytest.mark.parametrize("kind", ["token", "entity"])
def test_decoders_say_their_new_size(kind):
    model = make(LukeForMaskedLM)
    getattr(model, f"resize_{kind}_embeddings")(8)
    decoder = {"token": model.lm_head.decoder, "entity": model.entity_predictions.decoder}[kind]
    assert decoder.out_features == 8


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("cls", HEADS)
def test_initialisation(cls, tied):
    settings = {**SIZES, "initializer_range": 0.3, "num_labels": 2, "tie_word_embeddings": tied}
    model = cls(LukeConfig(**settings))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name.lower():
            assert (parameter == 1).all(), name
        elif parameter.numel() > 64:
            assert 0.2 < parameter.std() < 0.4, name
        else:
            assert 0 < parameter.std() < 0.6, name
    assert not model.get_input_embeddings().weight[1].any()


# Bad arguments

TAKEN = {
    "labels": [c for c in HEADS if c is not LukeForQuestionAnswering],
    "entity_labels": [LukeForMaskedLM],
    "positions": [LukeForMaskedLM],
    "entity_candidates": [LukeForMaskedLM],
    "start_positions": [LukeForQuestionAnswering],
    "end_positions": [LukeForQuestionAnswering],
    "num_choices": [LukeForMultipleChoice],
}


@pytest.mark.parametrize(
    ("cls", "name"), [(cls, name) for name, takers in TAKEN.items() for cls in HEADS if cls not in takers]
)
def test_arguments_a_head_does_not_take(cls, name):
    value = 3 if name == "num_choices" else torch.zeros(BATCH).long()
    with pytest.raises(ValueError, match=f"{name} must be None for {cls.__name__}, got"):
        make(cls)(**inputs_for(cls), **{name: value})


@pytest.mark.parametrize("cls", HEADS)
def test_unknown_arguments(cls):
    with pytest.raises(TypeError, match="head_mask"):
        make(cls)(**inputs_for(cls), head_mask=None)


@pytest.mark.parametrize("cls", HEADS)
def test_a_packed_batch_comes_alone(cls):
    arguments = packed_for(cls, inputs_for(cls), {})
    with pytest.raises(ValueError, match="must be None where input_ids is a PackedBatch, got"):
        make(cls)(**arguments, attention_mask=torch.ones(BATCH, WORDS))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("cls", "count"), [(LukeForEntityClassification, 1), (LukeForEntityPairClassification, 2)])
def test_too_few_entities(cls, count, packed):
    inputs = inputs_for(cls)
    inputs["entity_attention_mask"][1, count - 1 :] = 0
    given = {"input_ids": PackedBatch.from_padded(**inputs)} if packed else inputs
    message = f"entity_ids must hold at least {count} entities in each sequence, got one with {count - 1}"
    with pytest.raises(ValueError, match=message):
        make(cls)(**given)
    with pytest.raises(
        ValueError, match=f"entity_ids must hold at least {count} entities in each sequence, got one with 0"
    ):
        make(cls)(**words_of(inputs))


@pytest.mark.parametrize("name", ["entity_start_positions", "entity_end_positions"])
def test_spans_need_positions(name):
    inputs = inputs_for(LukeForEntitySpanClassification)
    with pytest.raises(ValueError, match="entity_start_positions and entity_end_positions must be given"):
        make(LukeForEntitySpanClassification)(**{**inputs, name: None})


@pytest.mark.parametrize("name", ["entity_start_positions", "entity_end_positions"])
@pytest.mark.parametrize("value", [-1, WORDS, WORD_LENGTHS[1]])
def test_spans_outside(name, value):
    """Outside the width, or of an entity that exists at a word that does not; what pads hold is not looked at."""
    inputs = inputs_for(LukeForEntitySpanClassification)
    model = make(LukeForEntitySpanClassification)
    inputs[name][1, ENTITY_LENGTHS[1]] = value
    model(**inputs)
    inputs[name][1, 0] = value
    with pytest.raises(ValueError, match=f"{name} must .*, got .*{value}"):
        model(**inputs)


@pytest.mark.parametrize("name", ["entity_start_positions", "entity_end_positions"])
@pytest.mark.parametrize(("value", "sequence"), [(-1, 0), (WORD_LENGTHS[1], 1), (1000, 2)])
def test_spans_outside_in_a_packed_batch(name, value, sequence):
    batch = PackedBatch.from_padded(**inputs_for(LukeForEntitySpanClassification))
    ranks = getattr(batch, name).clone()
    ranks[batch.lengths.cu_entities[sequence]] = value
    with pytest.raises(ValueError, match=f"{name} must .*, got .*{value}"):
        make(LukeForEntitySpanClassification)(dataclasses.replace(batch, **{name: ranks}))


@pytest.mark.parametrize("cls", [LukeForMaskedLM, LukeForTokenClassification, LukeForEntitySpanClassification])
@pytest.mark.parametrize("more", [1, -1])
def test_labels_of_another_width(cls, more):
    """Rows counted in another width would be other tokens."""
    inputs = inputs_for(cls)
    width = more + (ENTITIES if cls is LukeForEntitySpanClassification else WORDS)
    with pytest.raises(ValueError, match=r"labels must .*got"):
        make(cls)(**inputs, labels=torch.zeros(BATCH, width).long())


@pytest.mark.parametrize("num_labels", [1, 3])
def test_answers_have_two_ends(num_labels):
    with pytest.raises(
        ValueError, match=f"num_labels must be 2, start and end, for question answering, got {num_labels}"
    ):
        LukeForQuestionAnswering(LukeConfig(**SIZES, num_labels=num_labels))


def test_choices_need_another_dimension():
    model = make(LukeForMultipleChoice)
    with pytest.raises(ValueError, match=r"input_ids must be \(B, choices, ...\), got \(3, 7\)"):
        model(padded_inputs()["input_ids"])
    with pytest.raises(ValueError, match="input_ids or inputs_embeds must be given, and not both"):
        model()
    inputs = inputs_for(LukeForMultipleChoice)
    with pytest.raises(ValueError, match=r"attention_mask must"):
        model(**{**inputs, "attention_mask": inputs["attention_mask"][:, :2]})
    with pytest.raises(ValueError, match="num_choices must"):
        model(**inputs, num_choices=2)


@pytest.mark.parametrize("num_choices", [None, 0, 2, -3])
def test_bad_num_choices(num_choices):
    arguments = packed_for(LukeForMultipleChoice, inputs_for(LukeForMultipleChoice), {})
    with pytest.raises(ValueError, match=f"num_choices must divide the number of sequences, 9, got {num_choices}"):
        make(LukeForMultipleChoice)(**{**arguments, "num_choices": num_choices})


def test_all_heads_are_public():
    assert all(getattr(luke_kernels, cls.__name__) is cls for cls in HEADS)


def test_a_subclass_keeps_its_own_forward():
    class Doubled(LukeForEntityClassification):
        def forward(self, *args, **kwargs):
            return 2 * super().forward(*args, **kwargs).logits

    model, inputs = make(LukeForEntityClassification), inputs_for(LukeForEntityClassification)
    doubled = Doubled(model.config).eval().double()
    doubled.load_state_dict(model.state_dict())
    assert torch.equal(doubled(**inputs), 2 * model(**inputs).logits)


# Rows that nobody reads


def count_rows(model, inputs, **outputs) -> int:
    rows = []
    handle = model.luke.layers[-1].output.dense.register_forward_hook(lambda _, given, __: rows.append(len(given[0])))
    model(**inputs, **outputs)
    handle.remove()
    return rows[0]


@pytest.mark.parametrize("cls", HEADS)
def test_the_last_layer_computes_the_rows_that_are_read(cls):
    model, inputs = make(cls), inputs_for(cls)
    words, entities, batch = sum(WORD_LENGTHS), sum(ENTITY_LENGTHS), BATCH
    expected = {
        LukeForMaskedLM: words + entities,
        LukeForEntityClassification: batch,
        LukeForEntityPairClassification: 2 * batch,
        # As many boundaries as words: all.
        LukeForEntitySpanClassification: words + entities,
        LukeForSequenceClassification: batch,
        LukeForTokenClassification: words,
        LukeForQuestionAnswering: words,
        LukeForMultipleChoice: CHOICES * batch,
    }[cls]
    assert count_rows(model, inputs) == expected
    everything = (words + entities) * (CHOICES if cls is LukeForMultipleChoice else 1)
    assert count_rows(model, inputs, output_hidden_states=True) == everything


def test_few_spans_read_their_boundaries_and_themselves():
    model, inputs = make(LukeForEntitySpanClassification), inputs_for(LukeForEntitySpanClassification)
    inputs["entity_attention_mask"] = torch.eye(BATCH, ENTITIES, dtype=torch.int64)[[0, 0, 1]]
    assert count_rows(model, inputs) == 3 * BATCH
    few, every = model(**inputs).logits, model(**inputs, output_hidden_states=True).logits
    torch.testing.assert_close(few, every)
    torch.testing.assert_close(
        *(torch.autograd.grad(logits.sin().sum(), model.get_input_embeddings().weight) for logits in (few, every))
    )


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("which", [("labels",), ("entity_labels",), ("labels", "entity_labels")])
def test_in_training_masked_lm_computes_the_losses_alone(which, packed):
    model, inputs = make(LukeForMaskedLM, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), padded_inputs()
    labels = {
        "labels": torch.randint(0, 99, (BATCH, WORDS)).masked_fill(torch.rand(BATCH, WORDS) < 0.5, -100),
        "entity_labels": torch.randint(0, 10, (BATCH, ENTITIES)),
    }
    labels["entity_labels"][0] = -100
    labels = {name: labels[name] for name in which}
    if packed:
        batch = PackedBatch.from_padded(**inputs)
        pack = {"labels": batch.pack_words, "entity_labels": batch.pack_entities}
        inputs, labels = {"input_ids": batch}, {name: pack[name](value) for name, value in labels.items()}
    evaluated, trained = (model.train(mode)(**inputs, **labels) for mode in (False, True))
    assert trained.logits is None
    assert trained.entity_logits is None
    for name in ("loss", "mlm_loss", "mep_loss"):
        torch.testing.assert_close(getattr(trained, name), getattr(evaluated, name))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    torch.testing.assert_close(
        *(torch.autograd.grad(output.loss, parameters, allow_unused=True) for output in (trained, evaluated))
    )


@pytest.mark.parametrize("label", ["labels", "entity_labels"])
def test_in_training_masked_lm_scores_no_positions_beside_its_losses(label):
    labels = {label: torch.zeros(BATCH, WORDS if label == "labels" else ENTITIES, dtype=torch.int64)}
    with pytest.raises(ValueError, match=f"positions must be None where {label} is given, got"):
        make(LukeForMaskedLM).train()(**padded_inputs(), positions=torch.zeros(BATCH, 1).long(), **labels)


def with_candidates(of_each: bool) -> tuple[dict[str, Tensor], Tensor]:
    """Draw candidates with the labels among them, and labels: some ignored, some of entities without candidates."""
    inputs = padded_inputs()
    labels = torch.randint(2, 6, (BATCH, ENTITIES))
    labels[0, 0] = -100
    if not of_each:
        return {**inputs, "entity_candidates": torch.tensor([2, 3, 4, 5, 3, 2])}, labels
    # Pads before and after, and one twice.
    pads = torch.full_like(labels, -1)
    candidates = torch.stack([pads, labels, labels + 1, labels, labels + 1, pads], dim=2)
    candidates[0, 0] = -1
    return {**inputs, "entity_candidates": candidates}, labels


@pytest.mark.parametrize("of_each", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_loss_among_candidates(training, of_each):
    """It equals the cross-entropy of the scores of all, those of others left out; and so do its gradients."""
    model = make(LukeForMaskedLM, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train(training)
    inputs, labels = with_candidates(of_each)
    loss = model(**inputs, entity_labels=labels).loss
    candidates = inputs.pop("entity_candidates")
    allowed = torch.zeros(BATCH, ENTITIES, model.config.entity_vocab_size, dtype=torch.bool)
    allowed.scatter_(2, candidates.expand(BATCH, ENTITIES, -1).clamp(min=0), True)
    allowed[0, 0] = True  # some: its label is ignored
    allowed[..., 0] &= labels == -100
    logits = model.eval()(**inputs).entity_logits.masked_fill(~allowed, -torch.inf)
    exist = inputs["entity_attention_mask"].bool()
    expected = F.cross_entropy(logits[exist], labels[exist])
    torch.testing.assert_close(loss, expected)
    parameters = [p for name, p in model.named_parameters() if not name.startswith("lm_head") and "pooler" not in name]
    gradients, others = (torch.autograd.grad(each, parameters) for each in (loss, expected))
    torch.testing.assert_close(gradients, others)


@pytest.mark.parametrize("of_each", [False, True])
def test_sparse_entity_gradients(of_each):
    """They hold the rows that are read, SparseAdam changes no other, and of those they are as the dense ones."""
    inputs, labels = with_candidates(of_each)
    model = make(LukeForMaskedLM, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, entity_vocab_size=50)
    table = model.train().get_entity_embeddings().weight
    model(**inputs, entity_labels=labels).loss.backward()
    dense, table.grad = table.grad, None
    assert model.sparse_entity_gradients() is model
    model(**inputs, entity_labels=labels).loss.backward()
    assert table.grad.is_sparse
    torch.testing.assert_close(table.grad.to_dense(), dense)
    exist = inputs["entity_attention_mask"].bool()
    candidates = inputs["entity_candidates"]
    read = torch.cat(
        [inputs["entity_ids"][exist], (candidates[exist & (labels >= 0)] if of_each else candidates).flatten()]
    )
    read = read[read >= 0].unique()
    assert table.grad.coalesce().indices().flatten().tolist() == read.tolist()
    before = table.detach().clone()
    torch.optim.SparseAdam([table]).step()
    changed = (table != before).any(dim=1).nonzero().flatten()
    assert changed.tolist() == [row for row in read.tolist() if dense[row].any()]
    assert len(changed) < len(table)

    with pytest.raises(ValueError, match="entity_candidates must be given in training with entity_labels where"):
        model(**padded_inputs(), entity_labels=labels)
    table.grad = None
    model.sparse_entity_gradients(False)(**padded_inputs(), entity_labels=labels).loss.backward()
    assert not table.grad.is_sparse


def test_in_training_masked_lm_without_labels_gives_logits():
    assert make(LukeForMaskedLM).train()(**padded_inputs()).logits is not None
