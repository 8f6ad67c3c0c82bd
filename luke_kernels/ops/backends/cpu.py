"""The C++ kernels for the CPU (csrc/cpu): tensors go in as addresses and strides."""

import torch
from torch import Tensor

from luke_kernels import _C
from luke_kernels.ops.layout import Layout, empty_gradients, empty_outputs

DTYPES = {
    torch.float32: _C.DType.float32,
    torch.float64: _C.DType.float64,
    torch.bfloat16: _C.DType.bfloat16,
    torch.float16: _C.DType.float16,
}


def forward(
    words: Tensor, entities: Tensor, layout: Layout, scale: float, dropout_p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    # The core fills the rows that no sequence holds, and only those.
    out, lse = empty_outputs(words, entities, covers_rows=True)
    _C.attention_forward_cpu(parameters(words, entities, layout, scale, dropout_p, seed, out, lse))
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
    _C.attention_backward_cpu(
        parameters(words, entities, layout, scale, dropout_p, seed, out, lse),
        (_rows(dout_words), _rows(dout_entities)),
        (_stacks(dwords), _stacks(dentities)),
    )
    return dwords, dentities


def parameters(
    words: Tensor,
    entities: Tensor,
    layout: Layout,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
) -> "_C.AttentionParams":
    """Describe a call to the C++ core. The tensors must outlive its use."""
    stack, num_heads, head_dim = words.shape[1:]
    key, offset = (0, 0) if seed is None else (value & 0xFFFFFFFFFFFFFFFF for value in seed.tolist())
    return _C.AttentionParams(
        DTYPES[words.dtype],
        layout.batch_size,
        stack,
        num_heads,
        head_dim,
        (
            (_address(layout.word_offsets), _address(layout.word_lengths), words.shape[0], layout.max_words),
            (_address(layout.entity_offsets), _address(layout.entity_lengths), entities.shape[0], layout.max_entities),
        ),
        (_stacks(words), _stacks(entities)),
        _rows(out),
        (lse.data_ptr(), lse.stride(1), 0, lse.stride(0)),
        scale,
        0.0 if seed is None else dropout_p,
        key,
        offset,
        torch.get_num_threads(),
    )


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _stacks(tensor: Tensor) -> tuple[int, int, int, int]:
    """Describe a tensor (tokens, slots, H, D): its address, and strides of all but D."""
    token_stride, slot_stride, head_stride, _ = tensor.stride()
    return tensor.data_ptr(), token_stride, slot_stride, head_stride


def _rows(tensor: Tensor) -> tuple[int, int, int, int]:
    """Describe a tensor (tokens, H, ...) in the same way."""
    token_stride, head_stride, *_ = tensor.stride()
    return tensor.data_ptr(), token_stride, 0, head_stride
