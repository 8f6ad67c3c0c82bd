"""Our models against transformers' on real sentences: outputs, losses, gradients. Under transformers 4.57 and 5."""

import copy

import pytest
import torch
from parity_cases import (
    BY_NAME,
    HEADS,
    LABELS,
    assert_close,
    assert_gradients,
    encode,
    existing,
    outputs,
    pair_of_models,
    run,
)

from luke_kernels import PackedBatch


@pytest.mark.parametrize("entity_aware", [True, False])
@pytest.mark.parametrize("size", ["tiny", "mini", "base"])
def test_encoder(size, entity_aware):
    theirs, ours = pair_of_models("LukeModel", size, use_entity_aware_attention=entity_aware)
    batch = encode(None)
    with torch.no_grad():
        assert_close(ours(**batch), theirs(**batch), batch, size)
        words = {name: batch[name] for name in ("input_ids", "attention_mask")}
        assert_close(ours(**words), theirs(**words), words, size)


@BY_NAME
@pytest.mark.parametrize("size", ["tiny", "mini"])
def test_head(head, size):
    """Outputs at tokens that exist, the loss, and every gradient as exact as eager's."""
    theirs, ours = pair_of_models(head.name, size)
    batch = encode(head.task)
    labels = head.labels(batch)
    exact = copy.deepcopy(theirs).double()
    results = {}
    for name, model in (("theirs", theirs), ("ours", ours), ("exact", exact)):
        output = run(model, head, batch, labels)
        output["loss"].backward()
        results[name] = output
    assert_close(results["ours"], results["theirs"], batch, size)
    torch.testing.assert_close(results["ours"].loss, results["theirs"].loss, rtol=2e-6, atol=0)
    assert_gradients(ours, theirs, exact)


def test_gradients_at_base_size():
    head = HEADS[3]
    theirs, ours = pair_of_models(head.name, "base")
    batch = encode(head.task, count=4)
    labels = head.labels(batch)
    exact = copy.deepcopy(theirs).double()
    for model in (theirs, ours, exact):
        run(model, head, batch, labels).loss.backward()
    assert_gradients(ours, theirs, exact)


@BY_NAME
def test_losses_without_padding(head):
    """One sequence at a time, transformers' own loss, of answers too."""
    theirs, ours = pair_of_models(head.name, "tiny")
    for first in range(3):
        batch = encode(head.task, first, 2 if head.name == "LukeForMultipleChoice" else 1)
        labels = head.labels(batch)
        with torch.no_grad():
            expected = run(theirs, head, batch, labels).loss
            torch.testing.assert_close(run(ours, head, batch, labels).loss, expected, rtol=2e-6, atol=0)


@pytest.mark.parametrize("several", [True, False])
@pytest.mark.parametrize("head", HEADS[1:4], ids=[head.name for head in HEADS[1:4]])
def test_losses_of_several_labels(head, several):
    theirs, ours = pair_of_models(head.name, "tiny")
    batch = encode(head.task, count=1)
    shape = (1, batch["entity_ids"].shape[1], LABELS) if "Span" in head.name else (1, LABELS)
    labels = {"labels": torch.randint(0, 2, shape) if several else torch.randint(0, LABELS, shape[:-1])}
    with torch.no_grad():
        expected = theirs(**batch, **labels).loss
        torch.testing.assert_close(ours(**batch, **labels).loss, expected, rtol=2e-6, atol=0)


@pytest.mark.parametrize("backend", ["cpu", "sdpa", "reference"])
def test_backends(backend):
    theirs, ours = pair_of_models("LukeModel", "tiny")
    with torch.no_grad():
        for layer in ours.encoder["layer"]:
            layer.attention["self"].backend = backend
        assert_close(ours(**encode(None)), theirs(**encode(None)), encode(None), "tiny")


@BY_NAME
def test_packed_and_one_by_one(head):
    """Padded, packed on the way in, and alone: the same numbers."""
    _, ours = pair_of_models(head.name, "tiny")
    batch = encode(head.task)
    labels = head.labels(batch)
    packed = PackedBatch.from_padded(**batch)
    choices = {"num_choices": 2} if head.name == "LukeForMultipleChoice" else {}
    with torch.no_grad():
        padded = run(ours, head, batch, labels)
        result = ours(packed, **{name: existing(value, batch) for name, value in labels.items()}, **choices)
        torch.testing.assert_close(result.loss, padded.loss, rtol=1e-6, atol=0)
        for name, value in outputs(padded).items():
            torch.testing.assert_close(outputs(result)[name], existing(value, batch), rtol=1e-5, atol=1e-5)
        if head.name == "LukeForMultipleChoice":
            return
        for row in range(3):
            alone = ours(**encode(head.task, row, 1))
            for name, value in outputs(alone).items():
                longest = value.shape[1] if value.dim() > 1 else None
                torch.testing.assert_close(value[0], outputs(padded)[name][row][:longest], rtol=1e-5, atol=1e-5)
