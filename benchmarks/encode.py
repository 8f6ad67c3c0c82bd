"""The encoding benchmark: real texts to vectors, from end to end, and how long the model waits for texts meanwhile.

transformers' tokenizer and model take batches of texts in their order, padded; ours is `luke_kernels.encode`.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import batches, encoders, records, texts, timing, tokenizer
from benchmarks.measure import Record
from benchmarks.texts import Text
from luke_kernels import LukeTokenizer
from luke_kernels import encode as encode_texts
from luke_kernels.encode import Text as NamedText
from luke_kernels.encode import TextEncoder

OP = "encode"
DIRECTION = "vectors"
CASES = ("conll-256",)
BATCH = 32  # texts that transformers pads together
MAX_TOKENS = 512  # of a batch of ours, few: the texts of a case then make several windows
# Largest difference of a vector from transformers', in roundings of the largest number.
EPS = {torch.float32: 256, torch.bfloat16: 16, torch.float16: 16}

Vectors = list[tuple[Tensor, Tensor]]  # of the words and of the entities of each text


class WatchedEncoder(TextEncoder):
    """Counts the seconds between windows: what the model waits for texts, and the caller takes for its results."""

    waited_s = busy_s = 0.0
    ended: float | None = None

    def _run(self, window: Any) -> Iterator[Any]:
        begin = time.perf_counter()
        self.waited_s += 0.0 if self.ended is None else begin - self.ended
        yield from super()._run(window)
        self.ended = time.perf_counter()
        self.busy_s += self.ended - begin

    @property
    def waiting(self) -> float:
        """The share of the time from the first window on."""
        return self.waited_s / (self.waited_s + self.busy_s)


@torch.no_grad()
def encode_padded(model: nn.Module, pieces: Callable[..., Any], drawn: Sequence[Text]) -> Vectors:
    """Encode with transformers' tokenizer and model."""
    device, found = next(model.parameters()).device, []
    for first in range(0, len(drawn), BATCH):
        part = drawn[first : first + BATCH]
        spans, titles = [text.spans for text in part], [text.titles for text in part]
        inputs = pieces(
            [text.text for text in part], entity_spans=spans, entities=titles, padding=True, return_tensors="pt"
        )
        output = model(**inputs.to(device))
        words, entities = output.last_hidden_state.cpu(), output.entity_last_hidden_state.cpu()
        lengths = (inputs[mask].sum(dim=1).tolist() for mask in ("attention_mask", "entity_attention_mask"))
        found += [(words[row, :w], entities[row, :e]) for row, (w, e) in enumerate(zip(*lengths, strict=True))]
    return found


def run_case(name: str, size: str, dtype: torch.dtype, device: torch.device, repeats: int, run: Record) -> list[Record]:
    """Gate and time both on the texts of a case, of which all have entities.

    Returns:
        A record a contender; `waiting` is of one more pass.
    """
    corpus, count = batches.corpus_of(name)
    drawn = corpus.draw(count)
    pieces = LukeTokenizer.from_files(*texts.bpe_files(), texts.entity_vocab(drawn))
    drawn = [tokenizer.cut(text, pieces, corpus.max_words) for text in drawn]
    tokenizers = tokenizer.prepare(drawn, corpus.max_entities)
    model = encoders.draw_model(encoders.config_of(size), dtype, device).eval()
    theirs = partial(encode_padded, model, tokenizers[encoders.TRANSFORMERS], drawn)
    truth = theirs()
    shape = {"B": count, "real_tokens": sum(len(words) + len(entities) for words, entities in truth)}
    shared = records.blank() | run | {"op": OP, "direction": DIRECTION, "backend": "auto", "size": size, "case": name}
    shared |= {"dtype": str(dtype).removeprefix("torch."), "shape": shape}
    rows = {encoders.TRANSFORMERS: shared | {"contender": encoders.TRANSFORMERS, "gate": "pass"}}
    calls: dict[str, timing.Call] = {encoders.TRANSFORMERS: theirs}
    columns = [text.text for text in drawn], [text.spans for text in drawn], [text.titles for text in drawn]
    for contender in (encoders.OURS, encoders.OPTIMIZED):
        ours = encoders.ours(model).eval()
        row = rows[contender] = shared | {"contender": contender}
        try:
            if contender == encoders.OPTIMIZED:
                ours.optimize_for_inference()
            call = partial(_vectors, ours, tokenizers[encoders.OURS], columns)
            row |= _judge(call(), truth, dtype)
            if row["gate"] == "pass":
                watched = WatchedEncoder(ours, tokenizers[encoders.OURS], max_tokens=MAX_TOKENS)
                named = (NamedText(text.text[:20], *row) for text, *row in zip(drawn, *columns, strict=True))
                for _ in watched.encode(named, lambda number: None):
                    pass
                row["waiting"] = watched.waiting
                calls[contender] = call
        except (*timing.failures(), NotImplementedError) as error:
            row |= {"gate": "failed", "message": timing.described(error)}
    begin = time.perf_counter()
    theirs()
    warm_up, repeats = timing.plan_rounds(len(calls) * (time.perf_counter() - begin), repeats)
    samples, failed = timing.interleave(calls, repeats, device, warm_up)
    for contender, message in failed.items():
        rows[contender] |= {"gate": "failed", "message": message}
    for contender, times in samples.items():
        row = rows[contender]
        row |= timing.quantiles(times) | {"repeats": repeats}
        row["tokens_per_s"] = shape["real_tokens"] / row["median_ms"] * 1e3
        row["sequences_per_s"] = count / row["median_ms"] * 1e3
    return list(rows.values())


def _vectors(model: Any, pieces: LukeTokenizer, columns: tuple[Any, Any, Any]) -> Vectors:
    found = encode_texts(model, pieces, *columns, max_tokens=MAX_TOKENS, progress=False)
    return [(vectors.words, vectors.entities) for vectors in found]


def _judge(found: Vectors, truth: Vectors, dtype: torch.dtype) -> Record:
    errors, largest = [], 0.0
    for mine, theirs in zip(found, truth, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            errors.append((a.double() - b.double()).abs().max().item())
            largest = max(largest, b.abs().max().item())
    bound = EPS[dtype] * torch.finfo(dtype).eps * largest
    # NaN is beyond every bound, and no maximum.
    error = float("nan") if any(error != error for error in errors) else max(errors)
    passed = error <= bound
    return {
        "gate": "pass" if passed else "wrong",
        "message": None if passed else f"differs from transformers' by {error:.1e}, more than {bound:.1e}",
        "error": {"vectors": error if error == error else None},
        "bound": {"vectors": bound},
    }
