"""transformers' LUKE on fused attention, in place.

The encoder packs the batch, words first, and hands it to its layers as one long sequence of words (1, Tw + Te, C), with
where the sequences lie in place of the attention mask. The layers run as they are, adapters, hooks and checkpointing
included. Only their self-attention reads that; where it gets a mask instead, it runs transformers' code.
"""

import warnings
from typing import Any, NamedTuple, TypeVar

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers.models.luke import modeling_luke as luke

from luke_kernels.attention import is_plain, project_joint
from luke_kernels.model import mean_positions
from luke_kernels.ops.attention import attend_joint, described
from luke_kernels.ops.backends import check_name
from luke_kernels.ops.layout import Layout
from luke_kernels.packing import PackedLengths, pad

# Before, the encoder and not its layers recomputed activations.
if Version(transformers.__version__) < Version("4.57"):
    raise ImportError(f"transformers must be 4.57 or later, got {transformers.__version__}")

Module = TypeVar("Module", bound=nn.Module)

UNDO = "luke_kernels.restore(model) undoes it"
# A score this low has no weight after softmax.
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
        # The state of the module: some train with its dropout off, or draw with it on.
        dropout_p = self.dropout.p if isinstance(self.dropout, nn.Dropout) and self.dropout.training else 0.0
        return attend_joint(words, entities, layout, dropout_p, self.backend).flatten(-2)[None], None


class LeanLukeEntityEmbeddings(luke.LukeEntityEmbeddings):
    """Averages the positions of mentions without gathering them all, (B, E, M, C)."""

    def forward(self, entity_ids: Any, position_ids: Any, token_type_ids: Any = None) -> Tensor:
        if not (is_plain(self.position_embeddings, nn.Embedding) and _has_usual_gradient(self.position_embeddings)):
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
        if torch.jit.is_tracing():
            raise RuntimeError(f"an accelerated model must not be traced, for a trace keeps its lengths ({UNDO})")
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
            outputs.last_hidden_state = outputs.last_hidden_state.masked_fill(~words_exist[..., None], 0)
            if entity_hidden_states is not None:
                states = outputs.entity_last_hidden_state
                outputs.entity_last_hidden_state = states.masked_fill(~entities_exist[..., None], 0)
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


def _has_usual_gradient(table: nn.Embedding) -> bool:
    return table.padding_idx is None and table.max_norm is None and not (table.sparse or table.scale_grad_by_freq)


FAST = {
    luke.LukeEntityEmbeddings: LeanLukeEntityEmbeddings,
    luke.LukeEncoder: PackedLukeEncoder,
    luke.LukeSelfAttention: PackedLukeSelfAttention,
}
SLOW = {fast: slow for slow, fast in FAST.items()}


def accelerate(model: Module, backend: str) -> Module:
    """Do what `luke_kernels.accelerate` says."""
    check_name(backend)
    encoders = _encoders(model)
    devices = getattr(model, "hf_device_map", {}).values()
    if len(set(devices)) > 1:
        raise ValueError(f"model must lie on one device, got a device_map over {', '.join(map(str, set(devices)))}")
    for encoder in encoders:
        _check_code(encoder, luke.LukeEncoder)
        layer: Any
        for layer in encoder.layer:
            _check_code(layer, luke.LukeLayer)
            _check_code(layer.attention, luke.LukeAttention)
            _check_code(layer.attention.self, luke.LukeSelfAttention)
            if type(layer.attention.self.dropout) not in (nn.Dropout, nn.Identity):
                raise ValueError(f"attention must have nn.Dropout, got {type(layer.attention.self.dropout).__name__}")
            if layer.chunk_size_feed_forward:
                raise ValueError(
                    "chunk_size_feed_forward must be 0, for a packed batch has no length to be cut by, got "
                    f"{layer.chunk_size_feed_forward}"
                )
    for module in model.modules():
        if type(module) in FAST:
            module.__class__ = FAST[type(module)]
        if isinstance(module, PackedLukeSelfAttention):
            module.backend = backend
        if isinstance(module, luke.LukeForQuestionAnswering):
            _hook_once(module._forward_pre_hooks, module.register_forward_pre_hook, _watch_answers)
    return model


def restore(model: Module) -> Module:
    """Do what `luke_kernels.restore` says."""
    _encoders(model)
    for module in model.modules():
        if isinstance(module, tuple(SLOW)) and type(module) not in SLOW:
            raise ValueError(f"model must be as accelerate left it, got a {type(module).__name__}")
    for module in model.modules():
        if type(module) in SLOW:
            vars(module).pop("backend", None)
            module.__class__ = SLOW[type(module)]
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key, hook in list(hooks.items()):
                if hook in (_exclude_pads, _watch_answers):
                    del hooks[key]
    return model


def _encoders(model: nn.Module) -> list[luke.LukeEncoder]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module, one that is loaded, got {described(model)}")
    encoders = [module for module in model.modules() if isinstance(module, luke.LukeEncoder)]
    if not encoders:
        kind = f"{type(model).__module__}.{type(model).__name__}"
        raise ValueError(f"model must be or contain a LukeModel of transformers, got {kind}")
    return encoders


def _check_code(module: nn.Module, kind: type[nn.Module]) -> None:
    """Raise unless transformers' own code stands between the tokens: other code would mix sequences."""
    if type(module) not in (kind, FAST.get(kind)):
        raise ValueError(f"model must have transformers' own {kind.__name__}, got {type(module).__name__}")
    if "forward" in vars(module):
        raise ValueError(f"model must be accelerated before its forwards are replaced, got one of {kind.__name__}")


def _hook_once(hooks: Any, register: Any, hook: Any) -> None:
    if hook not in hooks.values():
        register(hook)


def _watch_answers(model: Any, inputs: Any) -> None:
    """Hook the head that there is now: peft and users replace it."""
    _hook_once(model.qa_outputs._forward_hooks, model.qa_outputs.register_forward_hook, _exclude_pads)


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
    words_exist, entities_exist = exists[:, :num_words], exists[:, num_words:]
    later = [(part.any(dim=1) & ~part[:, :1].any(dim=1)).any() for part in (words_exist, entities_exist)]
    facts = [words_exist.sum(dim=1), entities_exist.sum(dim=1), torch.stack([is_key_mask, *later])]
    *counts, is_key_mask, words_begin_later, entities_begin_later = torch.cat(facts).tolist()
    if not is_key_mask:
        raise ValueError(
            "attention_mask must say which tokens exist, the same for all queries, by 0 and 1, in an accelerated model "
            f"({UNDO}), got one that differs between queries or has other values"
        )
    if words_begin_later or entities_begin_later:
        warnings.warn(
            "attention_mask leaves out the first column of a sequence, as padding on the left does: in an accelerated "
            "model its states are zero, so that heads which read the first word or entity read nothing",
            stacklevel=2,
        )
    return exists, (counts[:batch], counts[batch:])
