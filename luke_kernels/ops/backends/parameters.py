"""Calls as the C++ core takes them (csrc/attention.h): tensors as addresses and strides."""

from types import ModuleType

import torch
from torch import Tensor

from luke_kernels.ops.layout import Layout

DTYPE_NAMES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}


def parameters(
    core: ModuleType,
    words: Tensor,
    entities: Tensor,
    layout: Layout,
    scale: float,
    dropout_p: float,
    key: tuple[int, int],
    out: Tensor,
    lse: Tensor,
):
    """Describe a call to `core`, luke_kernels._C. The tensors must outlive its use.

    Args:
        key: Seed and offset of dropout, where the core does not read them on the device.
    """
    stack, num_heads, head_dim = words.shape[1:]
    return core.AttentionParams(
        getattr(core.DType, DTYPE_NAMES[words.dtype]),
        layout.batch_size,
        stack,
        num_heads,
        head_dim,
        (
            (_address(layout.word_offsets), _address(layout.word_lengths), words.shape[0], layout.max_words),
            (_address(layout.entity_offsets), _address(layout.entity_lengths), entities.shape[0], layout.max_entities),
        ),
        (stacks(words), stacks(entities)),
        rows(out),
        (lse.data_ptr(), lse.stride(1), 0, lse.stride(0)),
        scale,
        dropout_p,
        *key,
        torch.get_num_threads(),
    )


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def stacks(tensor: Tensor) -> tuple[int, int, int, int]:
    """Describe a tensor (tokens, slots, H, D): its address, and strides of all but D."""
    token_stride, slot_stride, head_stride, _ = tensor.stride()
    return tensor.data_ptr(), token_stride, slot_stride, head_stride


def rows(tensor: Tensor) -> tuple[int, int, int, int]:
    """Describe a tensor (tokens, H, ...) in the same way."""
    token_stride, head_stride, *_ = tensor.stride()
    return tensor.data_ptr(), token_stride, 0, head_stride
