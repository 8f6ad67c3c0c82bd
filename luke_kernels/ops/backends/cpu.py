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
    out, lse = empty_outputs(words, entities, layout.covers_rows)
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
    gradients = empty_gradients(words, entities, layout.covers_rows)
    params = parameters(words, entities, layout, scale, dropout_p, seed, out, lse)
    params.dout = [_buffer(dout_words[:, None]), _buffer(dout_entities[:, None])]
    params.dprojections = [_buffer(gradient) for gradient in gradients]
    _C.attention_backward_cpu(params)
    return gradients


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
    num_words = words.shape[0]
    params = _C.AttentionParams()
    params.dtype = DTYPES[words.dtype]
    params.batch_size = layout.batch_size
    params.stack, params.num_heads, params.head_dim = words.shape[1:]
    params.segments = [
        _C.Segments(_address(layout.word_offsets), _address(layout.word_lengths), num_words, layout.max_words),
        _C.Segments(
            _address(layout.entity_offsets), _address(layout.entity_lengths), entities.shape[0], layout.max_entities
        ),
    ]
    params.projections = [_buffer(words), _buffer(entities)]
    # Not by views, each of which costs as much as the attention of a few tokens.
    begins = (0, num_words)
    out_stride, out_bytes = out.stride(), out.element_size()
    params.out = [
        _C.Buffer(out.data_ptr() + begin * out_stride[0] * out_bytes, out_stride[0], 0, out_stride[1])
        for begin in begins
    ]
    head_stride, lse_bytes = lse.stride(0), lse.element_size()
    params.lse = [_C.Buffer(lse.data_ptr() + begin * lse_bytes, 1, 0, head_stride) for begin in begins]
    params.scale = scale
    if seed is not None:
        params.dropout_p = dropout_p
        params.seed, params.offset = (value & 0xFFFFFFFFFFFFFFFF for value in seed.tolist())
    params.num_threads = torch.get_num_threads()
    return params


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _buffer(tensor: Tensor) -> "_C.Buffer":
    """Describe a tensor (tokens, slots, H, D)."""
    return _C.Buffer(tensor.data_ptr(), *tensor.stride()[:3])
