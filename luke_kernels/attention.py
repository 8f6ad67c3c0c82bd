"""Entity-aware self-attention as a module, in place of the self-attention of a transformer encoder layer."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luke_kernels.ops.attention import (
    attend_joint,
    attention_with_probabilities,
    check_dropout,
    entity_aware_attention,
    entity_aware_attention_varlen,
)
from luke_kernels.ops.backends import check_name
from luke_kernels.ops.layout import Layout
from luke_kernels.packing import PackedBatch, PackedLengths

PLAIN_QUERY, WORD_QUERIES, ENTITY_QUERIES = ("query",), ("query", "w2e_query"), ("e2w_query", "e2e_query")


class EntityAwareSelfAttention(nn.Module):
    """Self-attention over words and entities, with a query for each pair of kinds.

        e(i, j) = Q_st x_i . K x_j / sqrt(D),   s, t in {word, entity} the kinds of i and j
        out(i)  = sum_j softmax_j(e(i, .))(j) V x_j

    The parameters bear the names of LUKE checkpoints: `query` (word to word), `w2e_query`, `e2w_query`, `e2e_query`,
    `key`, `value`. Projections are one matrix product a kind of token, written where the attention kernel reads them.
    A projection that was replaced or hooked (LoRA, quantisation, parametrisation) is called as the module it is.

    Args:
        hidden_size: Size C of the hidden states, H * D.
        num_heads: Number of heads H.
        dropout: Probability of dropping an attention probability in training.
        entity_aware: Whether the four queries differ; False is plain attention over all tokens with `query`.
        backend: As in `luke_kernels.entity_aware_attention`.

    Raises:
        ValueError, TypeError: hidden_size is no multiple of num_heads, dropout not in [0, 1), backend unknown.

    Source: Yamada et al. 2020, "LUKE", section 3.2.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        dropout: float = 0.0,
        entity_aware: bool = True,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        for name, size in (("hidden_size", hidden_size), ("num_heads", num_heads)):
            if not isinstance(size, int):
                raise TypeError(f"{name} must be an int, got {size!r}")
        if num_heads < 1 or hidden_size < 1 or hidden_size % num_heads:
            raise ValueError(f"hidden_size must be a multiple of num_heads, {num_heads}, got {hidden_size}")
        check_dropout("dropout", dropout)
        check_name(backend)
        self.hidden_size, self.num_heads, self.dropout = hidden_size, num_heads, dropout
        self.entity_aware, self.backend = entity_aware, backend
        names = ("query", "key", "value", *(("w2e_query", "e2w_query", "e2e_query") if entity_aware else ()))
        for name in names:
            self.add_module(name, nn.Linear(hidden_size, hidden_size, device=device, dtype=dtype))

    def forward(
        self,
        word_hidden: Tensor,
        entity_hidden: Tensor | None = None,
        *,
        word_mask: Tensor | None = None,
        entity_mask: Tensor | None = None,
        word_lengths: Tensor | None = None,
        entity_lengths: Tensor | None = None,
        packed: PackedLengths | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None] | tuple[Tensor, Tensor | None, Tensor]:
        """Attend among the words and entities of each sequence.

        Args:
            word_hidden: Hidden states of the words, (B, W, C); (Tw, C) with `packed`.
            entity_hidden: Hidden states of the entities, (B, E, C); (Te, C) with `packed`; None for none.
            word_mask, entity_mask, word_lengths, entity_lengths: Which tokens exist, as in
                `luke_kernels.entity_aware_attention`. Absent rows of the results are zero.
            packed: The lengths of a packed batch, instead of masks and lengths.
            output_attentions: Also return the probabilities, after dropout, (B, H, W + E, W + E); they are computed by
                the reference path, in memory of that size. Not for packed batches.

        Returns:
            Contexts of the words (B, W, C) or (Tw, C), and of the entities likewise or None; then the probabilities,
            if asked for.

        Raises:
            ValueError, TypeError, NotImplementedError: as in `luke_kernels.entity_aware_attention`.
        """
        dims = 3 if packed is None else 2
        for name, hidden in (("word_hidden", word_hidden), ("entity_hidden", entity_hidden)):
            if name == "word_hidden" and not isinstance(hidden, Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(hidden).__name__}")
            if hidden is not None and (hidden.dim() != dims or hidden.shape[-1] != self.hidden_size):
                shape = f"(B, tokens, {self.hidden_size})" if packed is None else f"(tokens, {self.hidden_size})"
                raise ValueError(f"{name} must be {shape}, got {tuple(hidden.shape)}")
        words = self.project_words(word_hidden)
        entities = None if entity_hidden is None else self.project_entities(entity_hidden)
        dropout_p = self.dropout if self.training else 0.0
        masks: dict[str, Any] = {
            "word_mask": word_mask,
            "entity_mask": entity_mask,
            "word_lengths": word_lengths,
            "entity_lengths": entity_lengths,
        }
        if packed is not None:
            if not isinstance(packed, PackedLengths):
                raise TypeError(f"packed must be PackedLengths, got {type(packed).__name__}")
            for name, value in {**masks, "output_attentions": output_attentions or None}.items():
                if value is not None:
                    raise ValueError(f"{name} must not be given with packed, got {value}")
            if entities is None and packed.max_entities:
                raise ValueError(
                    f"entity_hidden must be given where packed has entities, {packed.max_entities}, got None"
                )
            contexts = entity_aware_attention_varlen(
                words,
                entities,
                packed.cu_words,
                None if entities is None else packed.cu_entities,
                packed.max_words,
                0 if entities is None else packed.max_entities,
                dropout_p=dropout_p,
                backend=self.backend,
            )
        elif output_attentions:
            out_words, out_entities, probs = attention_with_probabilities(words, entities, **masks, dropout_p=dropout_p)
            return *_merge_heads(out_words, out_entities), probs
        else:
            contexts = entity_aware_attention(words, entities, **masks, dropout_p=dropout_p, backend=self.backend)
        return _merge_heads(*contexts)

    def project_words(self, hidden: Tensor) -> Tensor:
        """Project hidden states of words, (..., C) -> (..., 4 or 3, H, D), as `entity_aware_attention` takes them."""
        return project(self, WORD_QUERIES if self.entity_aware else PLAIN_QUERY, hidden, self.num_heads)

    def project_entities(self, hidden: Tensor) -> Tensor:
        """Project hidden states of entities, (..., C) -> (..., 4 or 3, H, D)."""
        return project(self, ENTITY_QUERIES if self.entity_aware else PLAIN_QUERY, hidden, self.num_heads)

    def extra_repr(self) -> str:
        return (
            f"hidden_size={self.hidden_size}, num_heads={self.num_heads}, dropout={self.dropout}, "
            f"entity_aware={self.entity_aware}, backend={self.backend!r}"
        )


class PackedSelfAttention(EntityAwareSelfAttention):
    """The same for an encoder that keeps the words and entities of a batch in one buffer, words first.

    Its caller has checked the lengths, once for all layers.
    """

    def forward(self, hidden: Tensor, num_words: int, layout: Layout) -> Tensor:  # type: ignore[override]
        """Attend among the tokens of each sequence: (Tw + Te, C) -> contexts (Tw + Te, C)."""
        words, entities = self._project_joint(hidden, num_words)
        dropout_p = self.dropout if self.training else 0.0
        return attend_joint(words, entities, layout, dropout_p, self.backend).flatten(-2)

    def with_probabilities(self, hidden: Tensor, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """Also return the probabilities, (B, H, W + E, W + E) as the batch is padded, by the reference path."""
        words, entities = self._project_joint(hidden, batch.num_words)
        masks: dict[str, Any] = {"word_mask": batch.pad_words(torch.ones_like(batch.word_rows, dtype=torch.bool))}
        padded_entities = None
        if entities is not None:
            masks["entity_mask"] = batch.pad_entities(torch.ones_like(batch.entity_rows, dtype=torch.bool))
            padded_entities = batch.pad_entities(entities)
        out_words, out_entities, probs = attention_with_probabilities(
            batch.pad_words(words), padded_entities, **masks, dropout_p=self.dropout if self.training else 0.0
        )
        contexts = [batch.pack_words(out_words)]
        if out_entities is not None:
            contexts.append(batch.pack_entities(out_entities))
        return torch.cat(contexts).flatten(-2), probs

    def _project_joint(self, hidden: Tensor, num_words: int) -> tuple[Tensor, Tensor | None]:
        return project_joint(self, hidden, num_words, self.num_heads, self.entity_aware, hidden.shape[0] > num_words)


def project_joint(
    module: nn.Module, hidden: Tensor, num_words: int, num_heads: int, entity_aware: bool, has_entities: bool
) -> tuple[Tensor, Tensor | None]:
    """Project the words and the entities of one buffer (Tw + Te, C), each with its queries, as `project` does."""
    sizes = [num_words, hidden.shape[0] - num_words]
    if not (entity_aware and has_entities):
        stacked = project(module, PLAIN_QUERY, hidden, num_heads)
        return stacked.split(sizes) if has_entities else (stacked, None)
    names = (*WORD_QUERIES, *ENTITY_QUERIES, "key", "value")
    w2w, w2e, e2w, e2e, key, value = linears = [getattr(module, name) for name in names]
    how = _how_to_project(linears, hidden)
    words, entities = hidden.split(sizes)
    if how == "one product":
        return project(module, WORD_QUERIES, words, num_heads), project(module, ENTITY_QUERIES, entities, num_heads)
    if how == "in place":
        stacked = hidden.new_empty(hidden.shape[0], 4, hidden.shape[1])
        word_slots, entity_slots = stacked.split(sizes)
        of_words, of_entities = (words, word_slots), (entities, entity_slots)
        projections = [
            (w2w, *of_words, 0),
            (w2e, *of_words, 1),
            (e2w, *of_entities, 0),
            (e2e, *of_entities, 1),
            (key, hidden, stacked, 2),
            (value, hidden, stacked, 3),
        ]
        for linear, tokens, slots, slot in projections:
            torch.addmm(linear.bias, tokens, linear.weight.t(), out=slots[:, slot])
    else:
        keys, values = key(hidden).split(sizes), value(hidden).split(sizes)
        word_slots = torch.stack([w2w(words), w2e(words), keys[0], values[0]], dim=1)
        entity_slots = torch.stack([e2w(entities), e2e(entities), keys[1], values[1]], dim=1)
    return _split_heads(word_slots, num_heads), _split_heads(entity_slots, num_heads)


def project(module: nn.Module, queries: tuple[str, ...], hidden: Tensor, num_heads: int) -> Tensor:
    """Project by linear layers of `module`: its `queries`, its `key` and `value`, (..., C) -> (..., 4 or 3, H, D)."""
    linears: list[nn.Linear] = [getattr(module, name) for name in (*queries, "key", "value")]
    how = _how_to_project(linears, hidden)
    if how == "one product":
        weight = torch.cat([linear.weight for linear in linears])
        bias = torch.cat([linear.bias for linear in linears])
        slots = F.linear(hidden, weight, bias).unflatten(-1, (len(linears), -1))
    elif how == "in place":
        slots = hidden.new_empty(*hidden.shape[:-1], len(linears), hidden.shape[-1])
        for linear, out in zip(linears, slots.flatten(0, -3).unbind(1), strict=True):
            torch.addmm(linear.bias, hidden.flatten(0, -2), linear.weight.t(), out=out)
    else:
        slots = torch.stack([linear(hidden) for linear in linears], dim=-2)
    return _split_heads(slots, num_heads)


def _how_to_project(linears: list[nn.Linear], hidden: Tensor) -> str:
    """Choose among a product by all weights at once, products into slots of one buffer, and calls of the modules."""
    if not _fusable(linears):
        return "modules"
    if hidden.dtype != linears[0].weight.dtype and not _autocast_is_on(hidden):
        raise TypeError(
            f"hidden states must have the dtype of the weights, {linears[0].weight.dtype}, got {hidden.dtype}"
        )
    if hidden.device != linears[0].weight.device:
        raise ValueError(
            f"hidden states must be on the device of the weights, {linears[0].weight.device}, got {hidden.device}"
        )
    if _writes_in_place(hidden):
        return "in place"
    # One product copies the weights, (4 C, C), the calls their results, (T, 4 C).
    few = not torch.compiler.is_compiling() and hidden.shape[:-1].numel() < hidden.shape[-1]
    return "modules" if few else "one product"


def _split_heads(slots: Tensor, num_heads: int) -> Tensor:
    return slots.unflatten(-1, (num_heads, -1))


def _merge_heads(words: Tensor, entities: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return words.flatten(-2), None if entities is None else entities.flatten(-2)


def _fusable(linears: list[nn.Linear]) -> bool:
    """Return whether the weights and biases alone say what the modules do."""
    return all(is_plain(linear, nn.Linear) and type(linear.bias) in (nn.Parameter, Tensor) for linear in linears)


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Return whether a module is of that very kind, its weight a tensor, nothing hooked on."""
    return (
        type(module) is kind
        and type(module.weight) in (nn.Parameter, Tensor)
        and "forward" not in vars(module)  # how Hugging Face's accelerate hooks
        and not (module._forward_hooks or module._forward_pre_hooks)
        and not (module._backward_hooks or module._backward_pre_hooks)
        and not nn.modules.module._has_any_global_hook()
    )


def _autocast_is_on(hidden: Tensor) -> bool:
    device = hidden.device.type
    return device != "meta" and torch.is_autocast_enabled(device)


def _writes_in_place(hidden: Tensor) -> bool:
    return (
        hidden.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not _autocast_is_on(hidden)
        and not torch.compiler.is_compiling()
    )
