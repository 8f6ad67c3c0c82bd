"""The C++ kernels for the CPU (csrc/cpu): tensors go in as addresses and strides."""

from torch import Tensor

from luke_kernels import _C
from luke_kernels.ops.backends.parameters import parameters, rows, stacks
from luke_kernels.ops.layout import Layout, empty_gradients, empty_outputs


def forward(
    words: Tensor, entities: Tensor, layout: Layout, scale: float, dropout_p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    # The core fills the rows that no sequence holds, and only those.
    out, lse = empty_outputs(words, entities, covers_rows=True)
    dropout = _dropout(dropout_p, seed)
    _C.attention_forward_cpu(parameters(_C, words, entities, layout, scale, *dropout, out, lse))
    return out, lse


def backward(
    dout_words: Tensor,
    dout_entities: Tensor,
    out: Tensor,
    lse: Tensor,
    words: Tensor,
    entities: Tensor,
    layout: Layout,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    dwords, dentities = empty_gradients(words, entities, covers_rows=True)
    dropout = _dropout(dropout_p, seed)
    _C.attention_backward_cpu(
        parameters(_C, words, entities, layout, scale, *dropout, out, lse),
        (rows(dout_words), rows(dout_entities)),
        (stacks(dwords), stacks(dentities)),
    )
    return dwords, dentities


def _dropout(dropout_p: float, seed: Tensor | None) -> tuple[float, tuple[int, int]]:
    if seed is None:
        return 0.0, (0, 0)
    key, offset = (value & 0xFFFFFFFFFFFFFFFF for value in seed.tolist())
    return dropout_p, (key, offset)
