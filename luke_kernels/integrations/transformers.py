"""transformers' LUKE on fused attention, in place.

The encoder packs the batch, words first, and hands it to its layers as one long sequence of words (1, Tw + Te, C) with,
in place of the attention mask, where the sequences lie. The layers run as they are, adapters, hooks and checkpointing
included, save for the self-attention: it reads that, and falls back to transformers' code where a mask comes instead.
"""

from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from transformers.models.luke import modeling_luke as luke

from luke_kernels.attention import is_plain, project_joint
from luke_kernels.model import mean_positions
from luke_kernels.ops.attention import attend_joint, described
from luke_kernels.ops.backends import check_name
from luke_kernels.ops.layout import Layout
from luke_kernels.packing import PackedLengths, pad

Module = TypeVar("Module", bound=nn.Module)

UNDO = "luke_kernels.restore(model) undoes it"
# What softmax turns to zero unless all keys of a query have it.
EXCLUDES = -1e4


class PackedTokens(NamedTuple):
    """What the layers get in place of a mask. `has_entities` tells whether any were given, pads or not."""

    num_words: int
    has_entities: bool
    layout: Layout


class PackedLukeSelfAttention(luke.LukeSelfAttention):
    """Attention among the tokens of each packed sequence; transformers' own where a mask or None comes."""

    backend: str

    def forward(
        self,
        word_hidden_states: Tensor,
        entity_hidden_states: Tensor | None,
        attention_mask: PackedTokens | Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor | None, ...]:
        if not isinstance(attention_mask, PackedTokens):
            return super().forward(word_hidden_states, entity_hidden_states, attention_mask, *args, **kwargs)
        num_words, has_entities, layout = attention_mask
        words, entities = project_joint(
            self,
            word_hidden_states[0],
            num_words,
            self.num_attention_heads,
            self.use_entity_aware_attention,
            has_entities,
        )
        dropout_p = self.dropout.p if self.training else 0.0
        return attend_joint(words, entities, layout, dropout_p, self.backend).flatten(-2)[None], None


class LeanLukeEntityEmbeddings(luke.LukeEntityEmbeddings):
    """Averages the positions of mentions without gathering them all, (B, E, M, C)."""

    def forward(self, entity_ids: Any, position_ids: Any, token_type_ids: Any = None) -> Tensor:
        if not is_plain(self.position_embeddings, nn.Embedding):
            return super().forward(entity_ids, position_ids, token_type_ids)
        entities = self.entity_embeddings(entity_ids)
        if self.config.entity_emb_size != self.config.hidden_size:
            entities = self.entity_embedding_dense(entities)
        positions = mean_positions(self.position_embeddings.weight, position_ids)
        types = self.token_type_embeddings(torch.zeros_like(entity_ids) if token_type_ids is None else token_type_ids)
        return self.dropout(self.LayerNorm(entities + positions + types))


class PackedLukeEncoder(luke.LukeEncoder):
    """Reads the mask, packs, runs the layers, pads; last hidden states are zero where no token exists."""

    def forward(  # type: ignore[override]
        self,
        word_hidden_states: Tensor,
        entity_hidden_states: Tensor | None,
        attention_mask: Tensor | None = None,
        *,
        head_mask: Any = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        return_dict: bool = True,
    ) -> Any:
        if head_mask is not None and any(mask is not None for mask in head_mask):
            raise ValueError(f"head_mask must be None in an accelerated model ({UNDO}), got {described(head_mask)}")
        words, entities = word_hidden_states, entity_hidden_states
        if entities is None:
            entities = words[:, :0]
        exists, counts = _read_mask(attention_mask, words, entities)
        words_exist, entities_exist = exists.split([words.shape[1], entities.shape[1]], dim=1)
        if output_attentions or output_hidden_states:
            outputs = super().forward(
                word_hidden_states,
                entity_hidden_states,
                attention_mask,
                output_attentions=output_attentions,
                output_hidden_states=output_hidden_states,
            )
            outputs.last_hidden_state = outputs.last_hidden_state * words_exist[..., None]
            if entity_hidden_states is not None:
                outputs.entity_last_hidden_state = outputs.entity_last_hidden_state * entities_exist[..., None]
            return outputs if return_dict else outputs.to_tuple()

        lengths = PackedLengths.from_lengths(*counts)
        num_words, num_entities = sum(counts[0]), sum(counts[1])
        word_rows = torch.nonzero_static(words_exist.flatten(), size=num_words).squeeze(1)
        entity_rows = torch.nonzero_static(entities_exist.flatten(), size=num_entities).squeeze(1)
        packed = [tokens.flatten(0, 1)[rows] for tokens, rows in ((words, word_rows), (entities, entity_rows))]
        hidden = torch.cat(packed)[None]
        tokens = PackedTokens(num_words, entity_hidden_states is not None, lengths.to(hidden.device).layout())
        for layer in self.layer:
            hidden = layer(hidden, None, tokens)[0]
        packed_words, packed_entities = hidden[0].split([num_words, num_entities])
        words = pad(packed_words, word_rows, *words.shape[:2])
        if entity_hidden_states is None:
            return luke.BaseLukeModelOutput(last_hidden_state=words) if return_dict else (words,)
        entities = pad(packed_entities, entity_rows, *entities.shape[:2])
        if not return_dict:
            return words, entities
        return luke.BaseLukeModelOutput(last_hidden_state=words, entity_last_hidden_state=entities)


FAST = {
    luke.LukeEntityEmbeddings: LeanLukeEntityEmbeddings,
    luke.LukeEncoder: PackedLukeEncoder,
    luke.LukeSelfAttention: PackedLukeSelfAttention,
}
SLOW = {fast: slow for slow, fast in FAST.items()}


def accelerate(model: Module, backend: str) -> Module:
    """Do what `luke_kernels.accelerate` says."""
    check_name(backend)
    parts = _parts(model)
    for part in parts:
        if type(part) not in FAST and type(part) not in SLOW:
            raise ValueError(f"model must have transformers' own encoder and embeddings, got a {type(part).__name__}")
        if "forward" in vars(part):
            raise ValueError(
                f"model must be accelerated before its forwards are wrapped, got a wrapped {type(part).__name__}"
            )
        if isinstance(part, luke.LukeEncoder) and part.config.chunk_size_feed_forward:
            raise ValueError(
                "config.chunk_size_feed_forward must be 0, for a packed batch has no length to be cut by, got "
                f"{part.config.chunk_size_feed_forward}"
            )
    for part in parts:
        part.__class__ = FAST.get(type(part), type(part))
        if isinstance(part, PackedLukeSelfAttention):
            part.backend = backend
    for module in model.modules():
        if isinstance(module, luke.LukeForQuestionAnswering):
            _unhook(module)
            module.qa_outputs.register_forward_hook(_exclude_pads)
    return model


def restore(model: Module) -> Module:
    """Do what `luke_kernels.restore` says."""
    for part in _parts(model):
        if type(part) in SLOW:
            vars(part).pop("backend", None)
            part.__class__ = SLOW[type(part)]
    _unhook(model)
    return model


def _parts(model: nn.Module) -> list[nn.Module]:
    """Return the modules to exchange: encoders, their self-attentions, embeddings of entities."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module, got {type(model).__name__}")
    parts = [module for module in model.modules() if isinstance(module, tuple(FAST))]
    if not any(isinstance(part, luke.LukeEncoder) for part in parts):
        raise ValueError(f"model must be or contain a LukeModel of transformers, got {type(model).__name__}")
    return parts


def _unhook(model: nn.Module) -> None:
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if hook is _exclude_pads:
                del module._forward_hooks[key]


def _exclude_pads(head: nn.Module, inputs: tuple[Tensor, ...], logits: Tensor) -> Tensor:
    """Answers neither begin nor end where no token exists, which the encoder marks by zeros."""
    exists = inputs[0].any(dim=-1, keepdim=True)
    return logits.masked_fill(~exists, torch.finfo(logits.dtype).min)


def _read_mask(mask: Tensor | None, words: Tensor, entities: Tensor) -> tuple[Tensor, tuple[list[int], list[int]]]:
    """Return which tokens exist, (B, W + E), and how many words and entities each sequence has; one wait for a GPU."""
    batch, num_words, num_tokens = words.shape[0], words.shape[1], words.shape[1] + entities.shape[1]
    if mask is None:
        everything = torch.ones(batch, num_tokens, dtype=torch.bool, device=words.device)
        return everything, ([num_words] * batch, [num_tokens - num_words] * batch)
    if mask.dim() != 4 or mask.shape[0] not in (1, batch) or mask.shape[1] != 1 or mask.shape[3] != num_tokens:
        raise ValueError(
            f"attention_mask must say which tokens exist, (B, W) and (B, E), in an accelerated model ({UNDO}), got "
            f"{tuple(mask.shape)} for {batch} sequences of {num_tokens} tokens"
        )
    keys = mask[:, 0, 0].expand(batch, num_tokens)
    exists = keys == 0
    is_key_mask = (mask == mask[:, :, :1]).all() & (exists | (keys <= EXCLUDES)).all()
    facts = [exists[:, :num_words].sum(dim=1), exists[:, num_words:].sum(dim=1), is_key_mask.view(1)]
    *counts, is_key_mask = torch.cat(facts).tolist()
    if not is_key_mask:
        raise ValueError(
            "attention_mask must say which tokens exist, the same for all queries, by 0 and 1, in an accelerated model "
            f"({UNDO}), got one that differs between queries or has other values"
        )
    return exists, (counts[:batch], counts[batch:])
