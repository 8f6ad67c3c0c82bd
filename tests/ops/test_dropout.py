"""The dropout mask: one rule of logical positions, against an independent Philox in numpy."""

import numpy as np
import pytest
import torch
from attention_cases import BACKENDS

from luke_kernels import PackedLengths, entity_aware_attention, entity_aware_attention_varlen
from luke_kernels.ops import dropout

SEED, OFFSET, P = 0x0123456789ABCDEF, 0x0FEDCBA987654321, 0.3
BATCH, WORDS, ENTITIES, HEADS = 2, 70, 21, 3
TOKENS = WORDS + ENTITIES


def numpy_philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox-4x32-10 by its paper, in Python's unbounded integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [p1 // 2**32 ^ c[1] ^ k[0], p1 % 2**32, p0 // 2**32 ^ c[3] ^ k[1], p0 % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def numpy_mask(words: int = WORDS, entities: int = ENTITIES, batch: int = BATCH) -> np.ndarray:
    """Which probabilities are kept, (batch, HEADS, tokens, tokens)."""
    ranks = [(0, rank) for rank in range(words)] + [(1, rank) for rank in range(entities)]
    key = [SEED % 2**32, SEED // 2**32]
    keep = np.zeros((batch, HEADS, len(ranks), len(ranks)), dtype=bool)
    for b, h in np.ndindex(batch, HEADS):
        for i, (row_kind, row) in enumerate(ranks):
            draws: dict[tuple[int, int], list[int]] = {}
            for j, (column_kind, column) in enumerate(ranks):
                group = (column_kind, column // 4)
                if group not in draws:
                    last = OFFSET % 2**32 ^ row_kind * 2**31 ^ column_kind * 2**30
                    draws[group] = numpy_philox([column // 4, row, h + HEADS * b, last], key)
                keep[b, h, i, j] = draws[group][column % 4] >= int(P * 2**32)
    return keep


@pytest.fixture(scope="module")
def mask() -> torch.Tensor:
    return torch.from_numpy(numpy_mask())


@pytest.fixture
def seed() -> torch.Tensor:
    return torch.tensor([SEED, OFFSET])


# Known answers published with the generator (Random123, kat_vectors, philox4x32-10).
GOLDEN = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), GOLDEN)
def test_philox_known_answers(counter, key, expected):
    assert numpy_philox(counter, key) == expected
    words = dropout.philox(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert [word.item() for word in words] == expected


GOLDEN_ROWS = {
    (0, 0, 0): "11010011001111111111",
    (1, 2, 69): "01111010011111100101",
    (0, 1, 70): "00000110110101011011",
    (1, 0, 90): "10101101011100001111",
}


def test_the_rule_does_not_drift(mask):
    """A run resumed under a later version must drop the same elements."""
    for (b, h, i), row in GOLDEN_ROWS.items():
        assert "".join("01"[kept] for kept in mask[b, h, i, 60:80]) == row


def kept_by(backend: str, seed: torch.Tensor, packed: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Read the mask off the op: equal scores and one-hot values make out[i, j] tell of element (i, j), dv[j, i] too."""
    dim = 128
    stack = torch.zeros(BATCH, TOKENS, 4, HEADS, dim)
    stack[:, :, 3] = torch.eye(dim)[:TOKENS][None, :, None]
    words, entities = (t.clone().requires_grad_() for t in stack.split([WORDS, ENTITIES], dim=1))
    dout = torch.eye(dim)[:TOKENS].expand(BATCH, HEADS, TOKENS, dim).transpose(1, 2)
    if packed:
        lengths = PackedLengths.from_lengths([WORDS] * BATCH, [ENTITIES] * BATCH).to(seed.device)
        outs = entity_aware_attention_varlen(
            words.flatten(0, 1),
            entities.flatten(0, 1),
            lengths.cu_words,
            lengths.cu_entities,
            WORDS,
            ENTITIES,
            dropout_p=P,
            seed=seed,
            backend=backend,
        )
        outs = [out.unflatten(0, (BATCH, -1)) for out in outs]
    else:
        outs = entity_aware_attention(words, entities, dropout_p=P, seed=seed, backend=backend)
    out = torch.cat(outs, dim=1)
    dwords, dentities = torch.autograd.grad(out, (words, entities), dout)
    dv = torch.cat([dwords, dentities], dim=1)[:, :, 3]
    for values in (out, dv):
        kept = values[values != 0]
        torch.testing.assert_close(kept, torch.full_like(kept, 1 / TOKENS / (1 - P)))
    return out.transpose(1, 2)[..., :TOKENS] != 0, dv.permute(0, 2, 3, 1)[:, :, :TOKENS] != 0


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_elements_kept_equal_numpy(backend, packed, seed, mask):
    forward, backward = kept_by(backend, seed, packed)
    assert torch.equal(forward.cpu(), mask)
    assert torch.equal(backward.cpu(), mask)


@pytest.mark.parametrize("block", [4, 64, 512])
def test_elements_do_not_depend_on_the_block(block, seed, mask, monkeypatch):
    monkeypatch.setattr("luke_kernels.ops.backends.sdpa.BLOCK", block)
    forward, backward = kept_by("sdpa", seed)
    assert torch.equal(forward.cpu(), mask)
    assert torch.equal(backward.cpu(), mask)


@pytest.mark.parametrize("backend", BACKENDS)
def test_holes_and_pads_do_not_move_elements(backend, seed):
    """Rows and columns are ranks among the tokens that exist."""
    words, entities = torch.randn(BATCH, 20, 4, HEADS, 16), torch.randn(BATCH, 6, 4, HEADS, 16)
    keep_words, keep_entities = torch.rand(20) < 0.5, torch.rand(6) < 0.5
    options = {"dropout_p": P, "seed": seed, "backend": backend}
    dense = entity_aware_attention(words[:, keep_words], entities[:, keep_entities], **options)
    masks = {"word_mask": keep_words.expand(BATCH, 20), "entity_mask": keep_entities.expand(BATCH, 6)}
    holes = entity_aware_attention(words, entities, **masks, **options)
    torch.testing.assert_close(holes[0][:, keep_words], dense[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(holes[1][:, keep_entities], dense[1], rtol=1e-6, atol=1e-6)


def test_rate():
    kept = dropout.keep_mask(dropout.draw_seed(torch.device("cpu")), P, range(4), 8, 256, range(256), False, True)
    n = kept.numel()
    assert abs(kept.sum().item() - n * (1 - P)) < 4 * (n * P * (1 - P)) ** 0.5


def test_streams_differ():
    """No two of: seeds, offsets, sequences, heads, kinds share a mask."""

    def draw(seed=0, offset=0, sequence=0, row=False, column=False):
        value = torch.tensor([seed, offset])
        return dropout.keep_mask(value, 0.5, range(sequence, sequence + 1), 2, 16, range(16), row, column)

    masks = [
        draw(),
        draw(seed=1),
        draw(seed=2**32),
        draw(offset=1),
        draw(sequence=1),
        draw(row=True),
        draw(column=True),
    ]
    drawn = [mask[0, head] for mask in masks for head in range(2)]
    for i, a in enumerate(drawn):
        for b in drawn[:i]:
            assert 60 < (a != b).sum() < 196


@pytest.mark.parametrize("backend", ["reference", "sdpa", "cpu"])
def test_gradient_by_finite_differences(backend, seed):
    words = torch.randn(2, 5, 4, 2, 4, dtype=torch.float64, requires_grad=True)
    entities = torch.randn(2, 3, 4, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda w, e: entity_aware_attention(w, e, dropout_p=P, seed=seed, backend=backend), (words, entities)
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_seed_is_drawn_from_torch(backend):
    words = torch.randn(2, 5, 4, 2, 16)
    torch.manual_seed(3)
    first, second = (entity_aware_attention(words, dropout_p=P, backend=backend)[0] for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(entity_aware_attention(words, dropout_p=P, backend=backend)[0], first)
    assert not torch.equal(first, second)
