"""Who competes: our backends, and the peers that compute the same, or plain attention of the same length."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import COMPILED_CASES, Case
from luke_kernels import entity_aware_attention, explain_backends

ENTITY_AWARE = "entity_aware_attention"
# One query a token, W + E tokens: what attention costs without entity-awareness. Its values are others: no gate.
PLAIN = "plain_attention"
OURS = "luke_kernels"
SEED = 0


@dataclass(frozen=True)
class Inputs:
    """Projections (B, W or E, 4, H, D), gradient of out (B, W + E, H, D), which tokens are real (B, W + E)."""

    case: Case
    words: Tensor
    entities: Tensor
    dout: Tensor
    present: Tensor
    word_lengths: Tensor
    entity_lengths: Tensor

    def part(self, num_heads: int, dtype: torch.dtype) -> "Inputs":
        """Return the last heads in another dtype: heads do not mix."""
        tensors = {name: getattr(self, name)[..., -num_heads:, :].to(dtype) for name in ("words", "entities", "dout")}
        return replace(self, **tensors)


@dataclass(frozen=True)
class Prepared:
    """A contender bound to inputs. `unpack` turns the gradients of the leaves into (B, W + E, 4, H, D)."""

    leaves: Sequence[Tensor]
    douts: Sequence[Tensor]
    forward: Callable[..., Sequence[Tensor]]
    unpack: Callable[..., Tensor] | None = None
    threads: int | None = None  # None: as many as torch has

    def run(self, direction: str) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Return the outputs and, where direction is "both", the gradients of the leaves."""
        with _threads(self.threads):
            if direction == "forward":
                with torch.no_grad():
                    return self.forward(*self.leaves), ()
            outs = self.forward(*self.leaves)
            return outs, torch.autograd.grad(outs, self.leaves, self.douts)


@dataclass(frozen=True)
class Contender:
    name: str
    op: str
    backend: str
    prepare: Callable[[Inputs], Prepared]


def draw_inputs(case: Case, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Draw standard normal projections and gradients; the gradient of padding is zero."""
    generator = torch.Generator(device).manual_seed(SEED)
    batch, W, E, H, D = (case.shape[name] for name in "BWEHD")

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype, device=device)

    lengths = [torch.tensor(n, dtype=torch.int32, device=device) for n in (case.word_lengths, case.entity_lengths)]
    present = torch.cat([torch.arange(n, device=device) < m[:, None] for n, m in zip((W, E), lengths, strict=True)], 1)
    dout = draw(batch, W + E, H, D) * present[..., None, None]
    return Inputs(case, draw(batch, W, 4, H, D), draw(batch, E, 4, H, D), dout, present, *lengths)


def contenders(inputs: Inputs) -> list[Contender]:
    """Return who can compete on these tensors."""
    reasons = explain_backends(inputs.words, inputs.entities)
    # The reference is the specification and serves the gate; Triton on the CPU is its interpreter.
    never = {"reference", "triton"} if inputs.words.device.type == "cpu" else {"reference"}
    able = [name for name, reason in reasons.items() if reason is None and name not in never]
    found = [Contender(f"{OURS}:{name}", ENTITY_AWARE, name, partial(prepare_ours, backend=name)) for name in able]
    found += [
        Contender("eager", ENTITY_AWARE, "eager", prepare_eager),
        Contender("doubled_head_dim", ENTITY_AWARE, "sdpa", prepare_doubled),
        Contender("sdpa_plain", PLAIN, "sdpa", prepare_plain),
    ]
    if "cpu" in able and torch.get_num_threads() > 1:
        found.append(Contender(f"{OURS}:cpu, 1 thread", ENTITY_AWARE, "cpu", _prepare_alone))
    if inputs.words.device.type == "cuda":
        for name in ("cudnn", "flash", "efficient"):
            found.append(Contender(f"sdpa_plain:{name}", PLAIN, name, partial(prepare_plain, forced=name)))
        found.append(Contender("varlen_plain", PLAIN, "varlen_attn", prepare_varlen))
        if inputs.case.name in COMPILED_CASES:
            found.append(Contender("eager_compiled", ENTITY_AWARE, "torch.compile", prepare_compiled))
    return found


def prepare_ours(inputs: Inputs, backend: str) -> Prepared:
    """Bind the public function. Dense batches pass no lengths, as their callers would."""
    given = {}
    if inputs.case.ragged:
        given = {"word_lengths": inputs.word_lengths, "entity_lengths": inputs.entity_lengths}
    return Prepared(
        _leaves(inputs.words, inputs.entities),
        inputs.dout.split([inputs.case.num_words, inputs.case.num_entities], dim=1),
        partial(entity_aware_attention, backend=backend, **given),
        lambda dwords, dentities: torch.cat([dwords, dentities], dim=1),
    )


def _prepare_alone(inputs: Inputs) -> Prepared:
    return replace(prepare_ours(inputs, "cpu"), threads=1)


def prepare_eager(inputs: Inputs, core: Callable[..., list[Tensor]] | None = None) -> Prepared:
    """Bind the core of transformers' eager LUKE; its additive mask is there for dense batches too."""
    lowest = torch.finfo(inputs.words.dtype).min
    mask = torch.zeros_like(inputs.present, dtype=inputs.words.dtype).masked_fill(~inputs.present, lowest)
    return _prepare_separate(inputs, partial(core or _eager, mask=mask[:, None, None]))


def prepare_compiled(inputs: Inputs) -> Prepared:
    # What was compiled for other shapes must not make this one dynamic, nor count towards torch's limit.
    torch._dynamo.reset()
    return prepare_eager(inputs, torch.compile(_eager, dynamic=False, fullgraph=True))


def prepare_doubled(inputs: Inputs) -> Prepared:
    return _prepare_separate(inputs, partial(_doubled, mask=_mask(inputs)))


def prepare_plain(inputs: Inputs, forced: str | None = None) -> Prepared:
    def forward(*qkv: Tensor) -> list[Tensor]:
        with _sdpa_backend(forced):
            out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in qkv), attn_mask=mask)
        return [out.transpose(1, 2)]

    mask = _mask(inputs)
    return Prepared(_plain_leaves(inputs), [inputs.dout], forward)


def prepare_varlen(inputs: Inputs) -> Prepared:
    from torch.nn.attention.varlen import varlen_attn

    lengths = torch.tensor((0, *inputs.case.lengths), dtype=torch.int32, device=inputs.words.device)
    cumulative, longest = lengths.cumsum(0, dtype=torch.int32), max(inputs.case.lengths)

    def forward(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        return [varlen_attn(q, k, v, cumulative, cumulative, longest, longest)]

    leaves = _leaves(*(leaf.detach()[inputs.present] for leaf in _plain_leaves(inputs)))
    return Prepared(leaves, [inputs.dout[inputs.present]], forward)


def _eager(
    w2w: Tensor, w2e: Tensor, e2w: Tensor, e2e: Tensor, key: Tensor, value: Tensor, mask: Tensor
) -> list[Tensor]:
    w2w, w2e, e2w, e2e, key, value = (t.transpose(1, 2) for t in (w2w, w2e, e2w, e2e, key, value))
    to_words, to_entities = key.mT.split([w2w.shape[2], e2w.shape[2]], dim=-1)
    word_scores = torch.cat([w2w @ to_words, w2e @ to_entities], dim=-1)
    entity_scores = torch.cat([e2w @ to_words, e2e @ to_entities], dim=-1)
    scores = torch.cat([word_scores, entity_scores], dim=2) / math.sqrt(key.shape[-1]) + mask
    return [(scores.softmax(dim=-1) @ value).transpose(1, 2)]


def _doubled(
    w2w: Tensor, w2e: Tensor, e2w: Tensor, e2e: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> list[Tensor]:
    """One SDPA call: q' = [q_to_words, q_to_entities], k' = [k, 0] for words and [0, k] for entities."""
    head_dim = key.shape[-1]
    query = torch.cat([torch.cat([w2w, w2e], dim=-1), torch.cat([e2w, e2e], dim=-1)], dim=1)
    word_keys, entity_keys = key.split([w2w.shape[1], e2w.shape[1]], dim=1)
    doubled = torch.cat([F.pad(word_keys, (0, head_dim)), F.pad(entity_keys, (head_dim, 0))], dim=1)
    # Flash kernels take one head dim only: the values are padded too.
    tensors = (t.transpose(1, 2) for t in (query, doubled, F.pad(value, (0, head_dim))))
    out = F.scaled_dot_product_attention(*tensors, attn_mask=mask, scale=head_dim**-0.5)
    return [out[..., :head_dim].transpose(1, 2)]


def _prepare_separate(inputs: Inputs, forward: Callable[..., list[Tensor]]) -> Prepared:
    """Bind a forward to what transformers' layers give: four queries, and keys and values of all tokens."""
    (w2w, w2e, *word_kv), (e2w, e2e, *entity_kv) = inputs.words.unbind(2), inputs.entities.unbind(2)
    key, value = (torch.cat(pair, dim=1) for pair in zip(word_kv, entity_kv, strict=True))

    def unpack(dw2w: Tensor, dw2e: Tensor, de2w: Tensor, de2e: Tensor, dkey: Tensor, dvalue: Tensor) -> Tensor:
        return torch.stack([torch.cat([dw2w, de2w], dim=1), torch.cat([dw2e, de2e], dim=1), dkey, dvalue], dim=2)

    return Prepared(_leaves(w2w, w2e, e2w, e2e, key, value), [inputs.dout], forward, unpack)


def _plain_leaves(inputs: Inputs) -> list[Tensor]:
    """Return the query towards words, key and value of all tokens, (B, W + E, H, D) each."""
    return _leaves(*(torch.cat([inputs.words[:, :, i], inputs.entities[:, :, i]], dim=1) for i in (0, 2, 3)))


def _leaves(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().contiguous().requires_grad_() for t in tensors]


def _mask(inputs: Inputs) -> Tensor | None:
    """Return which keys exist, or None for a dense batch: flash kernels on a GPU take no mask."""
    if not inputs.case.ragged:
        return None
    batch, tokens = inputs.present.shape
    return inputs.present[:, None, None].expand(batch, 1, tokens, tokens)


@contextlib.contextmanager
def _threads(number: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _sdpa_backend(name: str | None) -> contextlib.AbstractContextManager[None]:
    if name is None:
        return contextlib.nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backends = {
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
    }
    return sdpa_kernel(backends[name])
