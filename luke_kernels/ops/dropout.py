"""The dropout mask as a function of logical positions: Philox-4x32-10, one rule for every backend.

An element of the probability matrix is kept or dropped by its place among the tokens of its own kind, never by the
tile that computes it. Forward, backward, every backend, every block size and every batch layout drop the same elements.

    counter = (column // 4, row, head + H * sequence, low32(offset) xor row_is_entity << 31 xor column_is_entity << 30)
    key     = (low32(seed), high32(seed))
    keep    = philox(counter, key)[column % 4] >= floor(p * 2^32)

Row and column are ranks within their kind (word or entity) among the tokens that exist.
Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
"""

import torch
from torch import Tensor

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROW_IS_ENTITY_BIT, COLUMN_IS_ENTITY_BIT = 31, 30
_MASK32 = 0xFFFFFFFF


def threshold(dropout_p: float) -> int:
    """Return the smallest 32-bit draw that is kept, floor(p * 2^32)."""
    return int(dropout_p * 2**32)


def draw_seed(device: torch.device) -> Tensor:
    """Draw (seed, offset), int64 (2,), on the device: no host sync, replayed by activation checkpointing."""
    return torch.randint(2**63 - 1, (2,), dtype=torch.int64, device=device)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Return the four 32-bit outputs of Philox-4x32-10 as int64 tensors; the words of the counter broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # The product of two 32-bit numbers wraps in int64; its bits are right all the same.
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (product1 >> 32 & _MASK32) ^ c1 ^ k0,
            product1 & _MASK32,
            (product0 >> 32 & _MASK32) ^ c3 ^ k1,
            product0 & _MASK32,
        )
        k0, k1 = k0 + WEYL[0] & _MASK32, k1 + WEYL[1] & _MASK32
    return c0, c1, c2, c3


def keep_mask(
    seed: Tensor,
    dropout_p: float,
    sequences: range,
    num_heads: int,
    num_rows: int,
    columns: range,
    row_is_entity: bool,
    column_is_entity: bool,
) -> Tensor:
    """Return which elements are kept, bool (len(sequences), num_heads, num_rows, len(columns)).

    `columns` must start at a multiple of four, the number of columns one draw serves.
    """
    device = seed.device
    kinds = row_is_entity << ROW_IS_ENTITY_BIT | column_is_entity << COLUMN_IS_ENTITY_BIT
    groups = torch.arange(columns.start // 4, -(-columns.stop // 4), device=device)
    heads = torch.arange(num_heads, device=device)
    stream = heads + num_heads * torch.arange(sequences.start, sequences.stop, device=device)[:, None]
    draws = philox(
        (
            groups,
            torch.arange(num_rows, device=device)[:, None],
            stream[:, :, None, None] & _MASK32,
            seed[1] & _MASK32 ^ kinds,
        ),
        (seed[0] & _MASK32, seed[0] >> 32 & _MASK32),
    )
    drawn = torch.stack(torch.broadcast_tensors(*draws), dim=-1).flatten(-2)[..., : len(columns)]
    return drawn >= threshold(dropout_p)
