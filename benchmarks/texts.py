"""Real texts with their entities, drawn from data sets in the folder that LUKE_KERNELS_DATA names."""

import html
import itertools
import json
import os
import random
import re
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from luke_kernels import LukeTokenizer
from luke_kernels.tokenizer import LukeEncoding

# Of so many draws the one with a middling share of padding is taken: one long text among short ones makes any ratio.
DRAWS = 101
MASK = "[MASK]"
SPECIAL_ENTITIES = ("[PAD]", "[UNK]", MASK, "[MASK2]")
# What LUKE was pretrained with (Yamada et al. 2020, appendix A); answers are looked for in windows of 384 words.
MAX_WORDS, MAX_ENTITIES = 512, 128
MAX_QUESTION_WORDS = 384
# Named entities are looked for in all spans of up to so many words (ibid., section 4.3).
MAX_SPAN_WORDS = 16


@dataclass(frozen=True)
class Text:
    """A text, the character spans of its entities and their titles."""

    text: str
    spans: list[tuple[int, int]]
    titles: list[str]


def conll(count: int) -> list[Text]:
    """Draw sentences that have mentions from CoNLL-2003's eng.testa, IOB1; entities are [MASK], as to be named."""
    sentences = []
    for block in (_data() / "conll2003/eng.testa").read_text(encoding="utf-8").split("\n\n"):
        text, spans, previous = "", [], "O"
        for line in block.splitlines():
            word, *_, tag = line.split()
            start = len(text) + bool(text)
            text += " " * bool(text) + word
            if tag != "O":
                if previous[1:] == tag[1:] and not tag.startswith("B-"):
                    start, _ = spans.pop()
                spans.append((start, len(text)))
            previous = tag
        if spans:
            sentences.append(Text(text, spans, [MASK] * len(spans)))
    return _draw(sentences, count, lambda sentence: len(sentence.text.split()))


def wikipedia(count: int) -> list[Text]:
    """Draw the leads of English Wikipedia's biographies; entities are their links."""
    with tarfile.open(_data() / "wikipedia/enwiki-people-wikitext.tar.xz") as archive:
        articles = {
            member.name: file.read().decode() for member in archive if (file := archive.extractfile(member)) is not None
        }
    leads = [_linked(articles[name].split("\n==")[0]) for name in sorted(articles)]
    return _draw(leads, count, lambda lead: min(len(lead.text.split()), MAX_WORDS))


def conll_spans(count: int) -> list[Text]:
    """Draw sentences of CoNLL-2003's eng.testa; entities are all spans of MAX_SPAN_WORDS words at most, as [MASK]."""
    sentences = []
    for block in (_data() / "conll2003/eng.testa").read_text(encoding="utf-8").split("\n\n"):
        words = [line.split()[0] for line in block.splitlines() if line and not line.startswith("-DOCSTART-")]
        if words:
            ends = list(itertools.accumulate(words, lambda end, word: end + 1 + len(word), initial=-1))[1:]
            spans = [
                (end - len(word), last)
                for place, (word, end) in enumerate(zip(words, ends, strict=True))
                for last in ends[place : place + MAX_SPAN_WORDS]
            ]
            sentences.append(Text(" ".join(words), spans, [MASK] * len(spans)))
    return _draw(sentences, count, lambda sentence: len(sentence.text.split()) + len(sentence.spans))


def questions(count: int) -> list[Text]:
    """Draw questions, each before its paragraph of Wikipedia; entities are the answers of all questions to that, as
    [MASK]: no data set at hand links them.
    """
    pairs = []
    for article in json.loads((_data() / "squad/new_wiki_v1.0.json").read_text(encoding="utf-8"))["data"]:
        for paragraph in article["paragraphs"]:
            answers = [answer for question in paragraph["qas"] for answer in question["answers"]]
            spans = {(answer["answer_start"], answer["answer_start"] + len(answer["text"])) for answer in answers}
            for question in paragraph["qas"]:
                text = f"{question['question']} {paragraph['context']}"
                shift = len(question["question"]) + 1
                found = [(shift + start, shift + end) for start, end in sorted(spans)]
                pairs.append(Text(text, found, [MASK] * len(found)))
    return _draw(pairs, count, lambda pair: min(len(pair.text.split()), MAX_QUESTION_WORDS))


@dataclass(frozen=True)
class Corpus:
    """Where texts come from, and what they are cut to."""

    draw: Callable[[int], list[Text]]
    max_words: int = MAX_WORDS
    max_entities: int = MAX_ENTITIES


CORPORA = {
    "conll": Corpus(conll),
    # Sentences are cut nowhere: the longest has 109 words.
    "conll-spans": Corpus(conll_spans, max_entities=109 * MAX_SPAN_WORDS),
    "wikipedia": Corpus(wikipedia),
    "questions": Corpus(questions, max_words=MAX_QUESTION_WORDS),
}


def load(corpus: Corpus, count: int) -> LukeEncoding:
    """Draw texts of a corpus and tokenise them."""
    return encode(corpus.draw(count), corpus)


def _draw(population: list[Text], count: int, length: Callable[[Text], int]) -> list[Text]:
    if count > len(population):
        raise ValueError(f"case must have at most {len(population)} texts, got {count}")
    draws = [random.Random(seed).sample(population, count) for seed in range(DRAWS)]
    draws.sort(key=lambda texts: max(map(length, texts)) * count / sum(map(length, texts)))
    return draws[DRAWS // 2]


# Comments, references, templates, tables, images, tags, bold and italics; what nests goes from the inside out.
_MARKUP = (
    r"<!--.*?-->",
    r"<ref[^>]*/>",
    r"<ref.*?</ref>",
    r"\{\{[^{}]*\}\}",
    r"\{\|.*?\|\}",
    r"\[\[(?:File|Image):(?:[^\[\]]|\[\[[^\[\]]*\]\])*\]\]",
    r"<[^>]+>",
    r"'{2,}",
)


def _linked(wikitext: str) -> Text:
    for pattern in _MARKUP:
        found = 1
        while found:
            wikitext, found = re.subn(pattern, "", wikitext, flags=re.DOTALL)
    text, spans, titles = "", [], []
    # [[title]] or [[title|words]]: the parts of a split are text, title, words, text, title, words, ..., text.
    parts = re.split(r"\[\[([^\[\]|]+)\|?([^\[\]]*)\]\]", " ".join(html.unescape(wikitext).split()))
    for plain, title, words in zip(parts[::3], [*parts[1::3], ""], [*parts[2::3], ""], strict=True):
        text += plain
        if title:
            titles.append(title)
            spans.append((len(text), len(text) + len(words or title)))
            text += words or title
    return Text(text, spans, titles)


def entity_vocab(texts: Sequence[Text]) -> dict[str, int]:
    """Number the titles of texts, all known, after the special ones."""
    titles = sorted({title for text in texts for title in text.titles} - {*SPECIAL_ENTITIES})
    return {title: i for i, title in enumerate((*SPECIAL_ENTITIES, *titles))}


def bpe_files() -> tuple[Path, Path]:
    """Return the vocabulary and merges of RoBERTa's pieces."""
    return _data() / "roberta_bpe/vocab.json", _data() / "roberta_bpe/merges.txt"


def encode(texts: list[Text], corpus: Corpus) -> LukeEncoding:
    """Tokenise with RoBERTa's pieces, cut as the corpus says."""
    tokenizer = LukeTokenizer.from_files(*bpe_files(), entity_vocab(texts), max_entity_length=corpus.max_entities)
    return tokenizer(
        [text.text for text in texts],
        entity_spans=[text.spans for text in texts],
        entities=[text.titles for text in texts],
        truncation=True,
        max_length=corpus.max_words,
    )


def _data() -> Path:
    folder = os.environ.get("LUKE_KERNELS_DATA", "")
    if not Path(folder).is_dir() or not folder:
        raise FileNotFoundError(f"LUKE_KERNELS_DATA must name the folder of data sets, got {folder!r}")
    return Path(folder)
