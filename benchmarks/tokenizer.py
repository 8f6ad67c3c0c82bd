"""The tokenizer benchmark: real texts and their spans into inputs, transformers' LukeTokenizer against ours."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import transformers

from benchmarks import batches, records, texts, timing
from benchmarks.encoders import OURS, TRANSFORMERS
from benchmarks.measure import Record
from benchmarks.texts import Text
from luke_kernels import LukeTokenizer

OP = "tokenizer"
DIRECTION = "encode"
CASES = ("conll-256", "conll-spans-32", "wikipedia-32", "questions-32")
# What the model reads.
KEYS = ("input_ids", "attention_mask", "entity_ids", "entity_attention_mask", "entity_position_ids")

Encode = Callable[..., Mapping[str, Any]]


def prepare(drawn: Sequence[Text], max_entities: int) -> dict[str, Encode]:
    """Make both tokenizers of the same files."""
    ours = LukeTokenizer.from_files(*texts.bpe_files(), texts.entity_vocab(drawn), max_entity_length=max_entities)
    with tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(folder)
        theirs = transformers.LukeTokenizer.from_pretrained(folder)
    return {TRANSFORMERS: theirs, OURS: ours}


def cut(text: Text, tokenizer: LukeTokenizer, max_words: int) -> Text:
    """Cut a text before its pieces are too many, and leave out the spans beyond: transformers 5.23 cannot truncate."""
    offsets = tokenizer(text.text, return_offsets_mapping=True)["offset_mapping"]
    if len(offsets) <= max_words:
        return text
    # The last place is that of the end token.
    end = offsets[max_words - 2][1]
    kept = [place for place, (_, stop) in enumerate(text.spans) if stop <= end]
    return Text(text.text[:end], [text.spans[place] for place in kept], [text.titles[place] for place in kept])


def run_case(
    name: str,
    repeats: int,
    run: Record,
    choose: Callable[[Sequence[Text], int], dict[str, Encode]] = prepare,
) -> list[Record]:
    """Gate and time both on the texts of a case; the gate is that both give the same.

    Returns:
        A record a contender; its tokens are words and entities.
    """
    corpus, count = batches.corpus_of(name)
    drawn = corpus.draw(count)
    pieces = LukeTokenizer.from_files(*texts.bpe_files(), texts.entity_vocab(drawn))
    drawn = [cut(text, pieces, corpus.max_words) for text in drawn]
    spans, titles = [text.spans for text in drawn], [text.titles for text in drawn]
    calls = {
        contender: partial(encode, [text.text for text in drawn], entity_spans=spans, entities=titles)
        for contender, encode in choose(drawn, corpus.max_entities).items()
    }
    truth = calls[TRANSFORMERS]()
    tokens = sum(map(len, truth["input_ids"])) + sum(map(len, truth["entity_ids"]))
    rows = {}
    for contender, call in calls.items():
        found = call()
        other = [key for key in KEYS if list(map(list, found[key])) != list(map(list, truth[key]))]
        rows[contender] = records.blank() | run | {"op": OP, "direction": DIRECTION, "contender": contender}
        rows[contender] |= {"case": name, "shape": {"B": count, "real_tokens": tokens}, "dtype": "int64"}
        rows[contender] |= {
            "gate": "wrong" if other else "pass",
            "message": f"other than transformers': {', '.join(other)}" if other else None,
        }
    timed = {contender: call for contender, call in calls.items() if rows[contender]["gate"] == "pass"}
    samples, failed = timing.interleave(timed, repeats, torch.device("cpu"))
    for contender, message in failed.items():
        rows[contender] |= {"gate": "failed", "message": message}
    for contender, times in samples.items():
        row = rows[contender]
        row |= timing.quantiles(times) | {"repeats": repeats}
        row |= {"tokens_per_s": tokens / row["median_ms"] * 1e3, "sequences_per_s": count / row["median_ms"] * 1e3}
    return list(rows.values())
