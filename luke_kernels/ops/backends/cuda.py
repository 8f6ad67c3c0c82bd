"""The CUDA kernels (csrc/cuda): tensors go in as addresses and strides, on torch's current stream."""

import torch
from torch import Tensor

from luke_kernels import _C
from luke_kernels.ops.backends.parameters import parameters, rows, stacks
from luke_kernels.ops.layout import Layout, empty_gradients, empty_outputs

# Rows are copied 16 bytes at a time.
ALIGNMENT = 16


def forward(
    words: Tensor, entities: Tensor, layout: Layout, scale: float, dropout_p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    head_dim = words.shape[-1]
    words, entities = aligned(words), aligned(entities)
    out, lse = empty_outputs(words, entities, layout.covers_rows)
    call = parameters(_C, words, entities, layout, scale, *_dropout(dropout_p, seed), out, lse)
    _C.attention_forward_cuda(call, *_where(words, seed))
    return _narrow(out, head_dim), lse


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
    head_dim = words.shape[-1]
    dout_words, dout_entities, out, words, entities = map(aligned, (dout_words, dout_entities, out, words, entities))
    dwords, dentities = empty_gradients(words, entities, layout.covers_rows)
    statistics = lse.new_empty(2, *lse.shape)
    _C.attention_backward_cuda(
        parameters(_C, words, entities, layout, scale, *_dropout(dropout_p, seed), out, lse),
        *_where(words, seed),
        (rows(dout_words), rows(dout_entities)),
        (stacks(dwords), stacks(dentities)),
        statistics.data_ptr(),
    )
    return _narrow(dwords, head_dim), _narrow(dentities, head_dim)


def aligned(tensor: Tensor) -> Tensor:
    """Return the tensor, or a copy whose rows are of whole 16 bytes, padded with zeros, at addresses that are too."""
    elements = ALIGNMENT // tensor.element_size()
    padding = -tensor.shape[-1] % elements
    strided = all(stride % elements == 0 for stride in tensor.stride()[:-1])
    if padding == 0 and strided and tensor.data_ptr() % ALIGNMENT == 0:
        return tensor
    padded = tensor.new_zeros(*tensor.shape[:-1], tensor.shape[-1] + padding)
    padded[..., : tensor.shape[-1]] = tensor
    return padded


def _narrow(tensor: Tensor, head_dim: int) -> Tensor:
    return tensor if tensor.shape[-1] == head_dim else tensor[..., :head_dim].contiguous()


def _dropout(dropout_p: float, seed: Tensor | None) -> tuple[float, tuple[int, int]]:
    return 0.0 if seed is None else dropout_p, (0, 0)


def _where(tensor: Tensor, seed: Tensor | None) -> tuple[int, int, int]:
    """Return the device, its current stream and where the seed lies; all 0 for the emulator, on the CPU."""
    address = 0 if seed is None else seed.data_ptr()
    if tensor.device.type != "cuda":
        return 0, 0, address
    return tensor.device.index, torch.cuda.current_stream(tensor.device).cuda_stream, address
