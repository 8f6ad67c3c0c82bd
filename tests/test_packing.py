"""Packed lengths and packed batches: made from padded and ragged inputs, and back."""

import dataclasses

import pytest
import torch
from luke_cases import BATCH, ENTITIES, PADDINGS, WORDS, equal_batches, one_by_one, padded_inputs

from luke_kernels import PackedBatch, PackedLengths


def test_from_lengths():
    packed = PackedLengths.from_lengths([3, 0, 5], [1, 2, 0])
    assert packed.cu_words.tolist() == [0, 3, 3, 8]
    assert packed.cu_entities.tolist() == [0, 1, 3, 3]
    assert (packed.max_words, packed.max_entities) == (5, 2)
    assert packed.cu_words.dtype == packed.cu_entities.dtype == torch.int32
    assert packed.to("meta").cu_words.device.type == "meta"


def test_lengths_may_be_tensors():
    packed = PackedLengths.from_lengths(torch.tensor([3, 0]), torch.tensor([1, 2]))
    assert packed.cu_words.tolist() == [0, 3, 3]
    assert type(packed.max_words) is type(packed.max_entities) is int


def test_no_sequences():
    packed = PackedLengths.from_lengths([], [])
    assert packed.cu_words.tolist() == [0]
    assert packed.max_words == 0


def test_words_only():
    assert PackedLengths.from_lengths([3, 2]).cu_entities.tolist() == [0, 0, 0]


@pytest.mark.parametrize("lengths", [[1.5, 2], torch.tensor([1.0, 2.0]), torch.ones(2, 3, dtype=torch.bool), 3])
def test_lengths_that_are_no_integers(lengths):
    with pytest.raises(TypeError, match=r"word_lengths must be a list or a tensor \(B,\) of integers, got"):
        PackedLengths.from_lengths(lengths, [1, 2])


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        (([1, 2], [1]), "entity_lengths must have one length a sequence, 2, got 1"),
        (([1, -2], [1, 1]), "word_lengths must not be negative, got -2"),
    ],
)
def test_bad_lengths(lengths, message):
    with pytest.raises(ValueError, match=message):
        PackedLengths.from_lengths(*lengths)


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


def test_from_encodings_of_a_single_text():
    encoding = {"input_ids": [0, 5, 2], "entity_ids": [4], "entity_position_ids": [[1, -1]]}
    assert equal_batches(PackedBatch.from_encodings(encoding), PackedBatch.from_encodings([encoding]))


@pytest.mark.parametrize("column", [-1, WORDS, 6])
def test_span_columns_of_no_word(column):
    """Column 6 is a pad of the second sequence."""
    columns = torch.zeros(BATCH, ENTITIES, dtype=torch.int64)
    columns[1, 0] = column
    for name in ("entity_start_positions", "entity_end_positions"):
        with pytest.raises(ValueError, match=f"{name} must hold columns of words that exist, got {column}$"):
            PackedBatch.from_padded(**padded_inputs(), **{name: columns})


def test_columns_of_entities_that_do_not_exist_are_not_looked_at():
    inputs = padded_inputs()
    columns = torch.zeros(BATCH, ENTITIES, dtype=torch.int64).masked_fill(inputs["entity_attention_mask"] == 0, 99)
    batch = PackedBatch.from_padded(**inputs, entity_start_positions=columns)
    assert not batch.entity_start_positions.any()
