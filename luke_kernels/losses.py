"""Cross-entropy over large vocabularies: without the logits of all classes in memory, or among candidates."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Of the logits of a chunk of classes, or of their vectors, in float32.
CHUNK_BYTES = 32 * 2**20


def linear_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy of linear scores, a chunk of classes at a time.

        loss = mean_r(logsumexp_n(h_r . w_n + b_n) - (h_r . w_l + b_l)),   l = labels_r

    Equal to `F.cross_entropy(F.linear(hidden, weight, bias), labels)` up to rounding. The backward computes the scores
    again: one product more for memory of a chunk in place of (R, N). Under autocast products are in its dtype.

    Args:
        hidden: (R, D).
        weight: A vector for each class, (N, D).
        bias: (N,).
        labels: Classes, int64 (R,), all in [0, N).

    Returns:
        A scalar in the dtype of the products, NaN where R is 0.

    Raises:
        IndexError: a label is no class; on a GPU an assertion on the device fails.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden = hidden.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        return _LinearCrossEntropy.apply(hidden, weight, bias, labels)


def candidate_cross_entropy(logits: Tensor, candidates: Tensor, labels: Tensor, ignored: int) -> Tensor:
    """Return the mean cross-entropy among candidates.

    Args:
        logits: Scores of the candidates, (R, K), -inf for none.
        candidates: Their classes, int64 (K,) or (R, K); one that stands there twice counts once.
        labels: Classes, int64 (R,); a row whose label is `ignored` does not count.

    Returns:
        A scalar; infinite where a label is no candidate, NaN where all rows are ignored.
    """
    counts = labels != ignored
    # A row that does not count may have no candidates: -inf throughout makes gradients of NaN.
    wide = _wide(logits).masked_fill(_repeated(candidates), -torch.inf).masked_fill(~counts[:, None], 0)
    of_label = wide.masked_fill(candidates != labels[:, None], -torch.inf).amax(dim=1)
    losses = wide.logsumexp(dim=1) - of_label
    return (torch.where(counts, losses, 0).sum() / counts.sum()).to(logits.dtype)


def _repeated(candidates: Tensor) -> Tensor:
    """Return which candidates stand before their place already, (K,) or (R, K)."""
    ordered, places = candidates.sort(dim=-1, stable=True)
    repeated = F.pad(ordered[..., 1:] == ordered[..., :-1], (1, 0))
    return torch.zeros_like(repeated).scatter(-1, places, repeated)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
        # Of the chunks: their logsumexp, so that nothing is lost where one has all the weight.
        parts = [logits.logsumexp(dim=1) for _, logits in _chunks(hidden, weight, bias)]
        logsumexp = torch.stack(parts).logsumexp(dim=0)
        # Not weight[labels], which would take a negative label from the end.
        of_labels = F.embedding(labels, weight).to(hidden.dtype)
        scores = (_wide(hidden) * _wide(of_labels)).sum(dim=1) + _wide(bias[labels])
        ctx.save_for_backward(hidden, weight, bias, labels, logsumexp)
        return (logsumexp - scores).mean().to(hidden.dtype)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(dloss.device.type, enabled=False):
            return _LinearCrossEntropy.gradients(ctx, dloss)

    @staticmethod
    def gradients(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, logsumexp = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        share = _wide(dloss) / len(labels)
        dhidden = torch.zeros_like(_wide(hidden)) if needs_hidden else None
        dweight = torch.empty_like(weight) if needs_weight else None
        dbias = torch.empty_like(bias) if needs_bias else None
        rows = torch.arange(len(labels), device=labels.device)
        for chunk, logits in _chunks(hidden, weight, bias):
            dlogits = logits.sub_(logsumexp[:, None]).exp_()
            columns = labels - chunk.start
            inside = (columns >= 0) & (columns < dlogits.shape[1])
            dlogits.index_put_(
                (rows, columns.clamp(0, dlogits.shape[1] - 1)), -inside.to(dlogits.dtype), accumulate=True
            )
            dlogits *= share
            if dbias is not None:
                dbias[chunk] = dlogits.sum(dim=0)
            dlogits = dlogits.to(hidden.dtype)
            if dhidden is not None:
                dhidden += dlogits @ weight[chunk].to(hidden.dtype)
            if dweight is not None:
                dweight[chunk] = dlogits.t() @ hidden
        return None if dhidden is None else dhidden.to(hidden.dtype), dweight, dbias, None


def _chunks(hidden: Tensor, weight: Tensor, bias: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of classes and their scores, (R, chunk), wide and free to be written to."""
    size = max(1, CHUNK_BYTES // 4 // max(hidden.shape))
    for begin in range(0, len(weight), size):
        chunk = slice(begin, begin + size)
        yield chunk, _wide(F.linear(hidden, weight[chunk].to(hidden.dtype), bias[chunk].to(hidden.dtype)))


def _wide(x: Tensor) -> Tensor:
    """Return what sums are kept in: float32, or float64 of float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
