import pytest
import torch

from luke_kernels import PackedLengths


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
