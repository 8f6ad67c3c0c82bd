"""The operator as torch knows it: schema, fake implementations, autograd. Imports torch and its own floor only."""

import contextlib
import functools
import importlib

import torch
from torch import Tensor
from torch.autograd import forward_ad

from luke_kernels.ops.layout import Layout, accumulator_dtype

NAMESPACE = "luke_kernels"
_LAYOUT = (
    "Tensor? word_offsets, Tensor? word_lengths, Tensor? entity_offsets, Tensor? entity_lengths, SymInt batch_size, "
    "SymInt max_words, SymInt max_entities, bool covers_rows, float scale, float dropout_p, Tensor? seed, str backend"
)
_library = torch.library.Library(NAMESPACE, "DEF")
_library.define(f"attention_forward(Tensor words, Tensor? entities, {_LAYOUT}) -> (Tensor out, Tensor lse)")
_library.define(
    "attention_backward(Tensor dout_words, Tensor? dout_entities, Tensor out, Tensor lse, "
    f"Tensor words, Tensor? entities, {_LAYOUT}) -> (Tensor dwords, Tensor dentities)"
)


def attention(words, entities, *arguments, split=True):
    """Run the op with autograd.

    Returns:
        split: (out_words (Tw, H, D), out_entities (Te, H, D) or None); two parts of one buffer, gradients of each
        taken as they come. Otherwise that buffer, out (Tw + Te, H, D), words first.
    """
    if not torch.compiler.is_compiling() and _differentiates(words, entities):
        outputs = _Attention.apply(words, entities, split, *arguments)
        if not split:
            return outputs[0]
        return outputs[0], None if entities is None else outputs[1]
    # Under tracing the dispatcher comes to autograd by itself.
    call = torch.ops.luke_kernels.attention_forward if torch.compiler.is_compiling() else _below_autograd
    out, _ = call(words, entities, *arguments)
    if not split:
        return out
    if entities is None:
        return out, None
    return out.split_with_sizes([words.shape[0], entities.shape[0]])


def _differentiates(words, entities):
    """Return whether autograd takes part: it costs as much as the rest of a call on a few tokens."""
    if forward_ad._current_level >= 0:
        return True  # refuses, where the op itself would drop tangents in silence
    return torch.is_grad_enabled() and (words.requires_grad or (entities is not None and entities.requires_grad))


@functools.cache
def _backend(name):
    # Not at import: the table of backends looks for extensions and GPUs.
    return importlib.import_module("luke_kernels.ops.backends").load(name)


def _normalised(words, entities, arguments):
    """Turn the flat arguments of the schema into what backends take.

    Absent entities become an empty buffer; projections have unit stride in D, offsets and lengths no gaps.
    """
    *layout, scale, dropout_p, seed, backend = arguments
    words = _unit_stride(words)
    return (
        _backend(backend),
        words,
        words[:0] if entities is None else _unit_stride(entities),
        Layout(*(None if t is None else t.contiguous() for t in layout[:4]), *layout[4:]),
        (scale, dropout_p, seed if dropout_p > 0 else None),
    )


def _forward(words, entities, *arguments):
    module, words, entities, layout, options = _normalised(words, entities, arguments)
    with _no_autocast(words):
        return module.forward(words, entities, layout, *options)


def _backward(dout_words, dout_entities, out, lse, words, entities, *arguments):
    module, words, entities, layout, options = _normalised(words, entities, arguments)
    if dout_entities is None:
        absent = (entities.shape[0], *dout_words.shape[1:])
        dout_entities = dout_words.new_zeros(absent) if entities.shape[0] else dout_words[:0]
    douts = _unit_stride(dout_words), _unit_stride(dout_entities)
    with _no_autocast(words):
        return module.backward(*douts, out.contiguous(), lse.contiguous(), words, entities, layout, *options)


def _no_autocast(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Keep autocast out of a backend: the dtype was settled when the op was called."""
    device = tensor.device.type
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


def _unit_stride(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _forward_fake(words, entities, *arguments):
    tokens = words.shape[0] + (0 if entities is None else entities.shape[0])
    heads, head_dim = words.shape[2:]
    return words.new_empty(tokens, heads, head_dim), words.new_empty(
        heads, tokens, dtype=accumulator_dtype(words.dtype)
    )


def _backward_fake(dout_words, dout_entities, out, lse, words, entities, *arguments):
    entities_shape = (0, *words.shape[1:]) if entities is None else entities.shape
    return words.new_empty(words.shape), words.new_empty(entities_shape)


class _Attention(torch.autograd.Function):
    """Both ops joined. Gradients of words and entities stay two tensors, so that nothing is concatenated."""

    @staticmethod
    def forward(words, entities, split, *arguments):
        out, lse = _below_autograd(words, entities, *arguments)
        if split:
            # Views: the backward reads `out`, so autograd must see who writes into its parts.
            parts = out.split_with_sizes([words.shape[0], out.shape[0] - words.shape[0]])
            return *parts, out, lse
        return out, lse

    @staticmethod
    def setup_context(ctx, inputs, output):
        words, entities, ctx.split, *arguments = inputs
        out, lse = output[-2:]
        tensors = [a if isinstance(a, Tensor) else None for a in arguments]
        ctx.constants = [None if isinstance(a, Tensor) else a for a in arguments]
        ctx.save_for_backward(out, lse, words, entities, *tensors)
        ctx.mark_non_differentiable(*output[-2:] if ctx.split else output[-1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *gradients):
        out, lse, words, entities, *tensors = ctx.saved_tensors
        arguments = [c if t is None else t for c, t in zip(ctx.constants, tensors, strict=True)]
        num_words = words.shape[0]
        if ctx.split:
            dout_words, dout_entities = gradients[:2]
        elif gradients[0] is not None:
            dout_words, dout_entities = gradients[0][:num_words], gradients[0][num_words:]
        else:
            dout_words = dout_entities = None
        if dout_words is None:
            dout_words = torch.zeros_like(out[:num_words])
        # A Function costs as much as the gradients of a few tokens: only where these are themselves differentiated.
        recorded = torch.is_grad_enabled() or forward_ad._current_level >= 0
        gradient = _AttentionGradient.apply if recorded else _AttentionGradient.forward
        dwords, dentities = gradient(
            dout_words, None if entities is None else dout_entities, out, lse, words, entities, *arguments
        )
        return dwords, None if entities is None else dentities, *[None] * (1 + len(arguments))

    @staticmethod
    def vmap(info, in_dims, *arguments):
        _refuse_vmap(info, in_dims, *arguments)


class _AttentionGradient(torch.autograd.Function):
    """The gradient as a function of its own, so that differentiating it is refused and not silently zero."""

    @staticmethod
    def forward(*arguments):
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.luke_kernels.attention_backward(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *gradients):
        raise NotImplementedError("entity_aware_attention must be differentiated once, got a second derivative")

    @staticmethod
    def vmap(info, in_dims, *arguments):
        _refuse_vmap(info, in_dims, *arguments)


def _forward_autograd(words, entities, *arguments):
    if _differentiates(words, entities):
        return _Attention.apply(words, entities, False, *arguments)
    return _below_autograd(words, entities, *arguments)


def _below_autograd(words, entities, *arguments):
    with torch._C._AutoDispatchBelowAutograd():
        # The overload: to find it takes a part of every call.
        return torch.ops.luke_kernels.attention_forward.default(words, entities, *arguments)


def _backward_autograd(*arguments):
    return _AttentionGradient.apply(*arguments)


def _refuse_vmap(info, in_dims, *arguments):
    raise NotImplementedError(
        "entity_aware_attention must not run under torch.vmap, got a mapped tensor: make the mapped dimension part of "
        "the batch"
    )


_library.impl("attention_forward", _forward, "CompositeExplicitAutograd")
_library.impl("attention_backward", _backward, "CompositeExplicitAutograd")
_library.impl("attention_forward", _forward_autograd, "Autograd")
_library.impl("attention_backward", _backward_autograd, "Autograd")
torch.library.register_fake(f"{NAMESPACE}::attention_forward", _forward_fake, lib=_library)
torch.library.register_fake(f"{NAMESPACE}::attention_backward", _backward_fake, lib=_library)
torch.library.register_vmap(f"{NAMESPACE}::attention_forward", _refuse_vmap, lib=_library)
