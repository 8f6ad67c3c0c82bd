"""Against transformers' LukeTokenizer: every key of 4.57 on real sentences; files exchanged with 4.57 and with 5."""

import itertools
import json
import logging
import os
import random
import re
import tarfile
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from luke_kernels.tokenizer import LukeTokenizer

transformers = pytest.importorskip("transformers", reason="needs transformers")

DATA = Path(os.environ.get("LUKE_KERNELS_DATA", "/nowhere"))
FILES = (
    "roberta_bpe/vocab.json",
    "roberta_bpe/merges.txt",
    "conll2003/eng.testa",
    "wikipedia/enwiki-plain-text.tar.xz",
    "wikipedia/enwiki_20181220_entvocab_100.tsv",
)
TASKS = (None, "entity_classification", "entity_pair_classification", "entity_span_classification")
# All that 4.57 takes for special in texts.
SPECIAL_IN_TEXT = ("<s>", "</s>", "<pad>", "<unk>", "<ent>", "<ent2>")

pytestmark = [
    pytest.mark.skipif(
        any(not (DATA / file).exists() for file in FILES), reason="needs the data that LUKE_KERNELS_DATA points to"
    ),
    pytest.mark.filterwarnings("ignore"),  # of transformers, about itself
]
needs_4_57 = pytest.mark.skipif(
    not transformers.__version__.startswith("4.57"),
    reason=f"needs transformers 4.57, there is {transformers.__version__}",
)


@pytest.fixture(scope="module", autouse=True)
def _quiet():
    transformers.logging.set_verbosity(logging.CRITICAL)


@pytest.fixture(scope="module")
def titles() -> dict[str, int]:
    lines = (DATA / FILES[4]).read_text(encoding="utf-8").splitlines()
    return {title: index for index, title in enumerate([*(line.split("\t")[0] for line in lines), "[MASK2]"])}


@pytest.fixture(scope="module")
def files(titles, tmp_path_factory) -> tuple[str, str, str]:
    entity_vocab = tmp_path_factory.mktemp("vocab") / "entity_vocab.json"
    entity_vocab.write_text(json.dumps(titles), encoding="utf-8")
    return str(DATA / FILES[0]), str(DATA / FILES[1]), str(entity_vocab)


@pytest.fixture(scope="module")
def sentences() -> list[str]:
    """1,000 sentences of CoNLL-2003, then 1,000 of Wikipedia with all their white space."""
    conll: list[list[str]] = [[]]
    with open(DATA / FILES[2], encoding="utf-8") as file:
        for line in file:
            if line.startswith("-DOCSTART-") or not line.strip():
                conll += [[]] if conll[-1] else []
            else:
                conll[-1].append(line.split()[0])
            if len(conll) > 1000:
                break
    wikipedia: list[str] = []
    with tarfile.open(DATA / FILES[3], "r|xz") as archive:
        for member in archive:
            if member.isfile():
                text = archive.extractfile(member).read().decode("utf-8")
                pieces = re.split(r"(?<=[.!?])(?= )|(?<=\n\n)", text)
                wikipedia += [piece for piece in pieces if piece.strip() and "<doc" not in piece and len(piece) < 1000]
            if len(wikipedia) >= 1000:
                break
    return [*(" ".join(words) for words in conll[:1000]), *wikipedia[:1000]]


@pytest.fixture(scope="module")
def theirs(files):
    cache = {}

    def make(task=None, **options):
        # Built once a task: most of the time goes into it.
        if task not in cache:
            cache[task] = transformers.LukeTokenizer(*files, task=task)
        for name, value in {"padding_side": "right", "model_max_length": 10**30, **options}.items():
            setattr(cache[task], name, value)
        return cache[task]

    return make


@pytest.fixture(scope="module")
def ours(files):
    cache = {}

    def make(task=None, **options):
        key = (task, *sorted(options.items()))
        if key not in cache:
            cache[key] = LukeTokenizer.from_files(*files, task=task, special_tokens_in_text=SPECIAL_IN_TEXT, **options)
        return cache[key]

    return make


SPANS_OF_MASKED = {
    None: [(2, 8)],
    "entity_classification": [(9, 10)],
    "entity_pair_classification": [(9, 10), (0, 1)],
    "entity_span_classification": [(0, 1), (9, 10)],
}


def spans_of(text: str, rng: random.Random, number: int) -> list[tuple[int, int]]:
    """Return up to `number` spans, none over another, in random order, half of them of whole words."""
    if rng.random() < 0.5:
        bounds = sorted({bound for match in re.finditer(r"\S+", text) for bound in match.span()})
    else:
        bounds = list(range(len(text) + 1))
    bounds = sorted(rng.sample(bounds, min(len(bounds), 2 * number)))
    # Touching ones also: every other time one begins where the last one ended.
    pairs = (
        list(itertools.pairwise(bounds)) if rng.random() < 0.3 else list(zip(bounds[::2], bounds[1::2], strict=False))
    )
    spans = [(a, b) for a, b in pairs if text[a:b] != " "][:number]
    return rng.sample(spans, len(spans))


def titles_of(spans, titles: dict[str, int], rng: random.Random) -> list[str]:
    return [rng.choice([*titles, "Nowhere at all"]) for _ in spans]


def cases(sentences, rng: random.Random, task: str | None) -> tuple[list[str], list[list[tuple[int, int]]]]:
    """Return sentences with spans as the task wants them."""
    exact = {"entity_classification": 1, "entity_pair_classification": 2}.get(task)
    texts, spans = [], []
    for text in sentences:
        own = spans_of(text, rng, exact or rng.randint(1 if task else 0, 6))
        if len(own) == (exact or max(len(own), 1 if task else 0)):
            texts.append(text)
            spans.append(own)
    # A sentence of one word may have too few.
    assert len(texts) > 0.9 * len(sentences)
    return texts, spans


def same(theirs, ours) -> None:
    assert ours.keys() == theirs.keys()
    for key in theirs:
        assert ours[key] == theirs[key], key


def unshifted(encoding) -> dict:
    """Take the padding on the left out of the positions of spans, as 4.57 has them."""
    rows = dict(encoding)
    for key in rows.keys() & {"entity_start_positions", "entity_end_positions"}:
        rows[key] = [
            [at - mask.count(0) if real else at for at, real in zip(row, reals, strict=True)]
            for row, mask, reals in zip(rows[key], rows["attention_mask"], rows["entity_attention_mask"], strict=True)
        ]
    return rows


@needs_4_57
@pytest.mark.parametrize("task", TASKS)
def test_every_sentence(task, sentences, titles, theirs, ours):
    rng = random.Random(0)
    texts, spans = cases(sentences, rng, task)
    arguments = {"entity_spans": spans, "return_token_type_ids": True, "return_special_tokens_mask": True}
    if task is None:
        arguments["entities"] = [titles_of(own, titles, rng) for own in spans]
    same(theirs(task)(texts, **arguments), ours(task)(texts, **arguments))


OPTIONS = [
    {"truncation": True, "max_length": 16},
    {"max_length": 12},
    {"truncation": "only_first", "max_length": 9, "padding": True},
    {"truncation": "longest_first", "max_length": 24, "padding": "max_length"},
    {"truncation": True, "max_length": 24, "padding": "max_length", "pad_to_multiple_of": 8},
    {"padding": True},
    {"padding": "longest", "pad_to_multiple_of": 8},
    {"padding": "max_length", "max_length": 400},
    {"padding": True, "padding_side": "left"},
    {"truncation": True, "max_length": 20, "padding": "max_length", "padding_side": "left"},
    {"truncation": True, "max_length": 30, "max_entity_length": 2},
    {"truncation": True, "max_length": 30, "max_entity_length": 3, "padding": True, "pad_to_multiple_of": 5},
    {"max_entity_length": 2, "padding": True},
    {"add_special_tokens": False, "truncation": True, "max_length": 10, "padding": True},
    {"return_attention_mask": False, "padding": True},
    {"padding": True, "return_tensors": "pt"},
    {"padding": True, "return_tensors": "np", "truncation": "only_second", "max_length": 400},
    {"return_length": True},
]


@needs_4_57
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("task", TASKS)
def test_options(task, options, sentences, titles, theirs, ours):
    rng = random.Random(1)
    texts, spans = cases(rng.sample(sentences, 40), rng, task)
    arguments = {"entity_spans": spans, **options}
    if task is None:
        arguments["entities"] = [titles_of(own, titles, rng) for own in spans]
    expected, got = theirs(task)(texts, **arguments), ours(task)(texts, **arguments)
    if "return_tensors" in options:
        expected, got = ({key: value.tolist() for key, value in e.items()} for e in (expected, got))
    same(expected, unshifted(got) if options.get("padding_side") == "left" else got)


@needs_4_57
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_single_texts(options, sentences, titles, theirs, ours):
    rng = random.Random(2)
    texts, spans = cases(rng.sample(sentences, 40), rng, None)
    for text, own in zip(texts, spans, strict=True):
        for entities in (None, titles_of(own, titles, rng)):
            arguments = {"entity_spans": own, "entities": entities, **options}
            expected, got = theirs()(text, **arguments), ours()(text, **arguments)
            if "return_tensors" in options:
                expected, got = ({key: value.tolist() for key, value in e.items()} for e in (expected, got))
            same(expected, got)


@needs_4_57
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_plain_texts(options, sentences, theirs, ours):
    texts = random.Random(3).sample(sentences, 40)
    arguments = {key: value for key, value in options.items() if key != "return_tensors"}
    same(theirs()(texts, **arguments), ours()(texts, **arguments))


@needs_4_57
@pytest.mark.parametrize("mentions", ["none", "first", "both"])
@pytest.mark.parametrize(
    "options",
    [
        {"truncation": True, "max_length": 16},
        {"truncation": True, "max_length": 17, "padding": True, "max_entity_length": 3},
        {"truncation": "only_first", "max_length": 200},
        {"truncation": "only_second", "max_length": 200},
        {"truncation": "only_second", "max_length": 250, "max_entity_length": 2},
        {"truncation": "only_first", "max_length": 250, "max_entity_length": 2, "padding": True},
        {"padding": True, "pad_to_multiple_of": 8},
        {"padding": True, "padding_side": "left"},
        {"add_special_tokens": False},
        {"return_special_tokens_mask": True, "return_token_type_ids": True, "padding": True},
    ],
    ids=str,
)
def test_pairs(mentions, options, sentences, titles, theirs, ours):
    rng = random.Random(4)
    short = [text for text in sentences if len(text) < 150]
    texts, spans = cases(rng.sample(short, 100), rng, None)
    pairs, pair_spans = cases(rng.sample(short, 100), rng, None)
    number = min(len(texts), len(pairs))
    arguments = {"text_pair": pairs[:number], **options}
    if mentions != "none":
        arguments["entity_spans"] = spans[:number]
        arguments["entities"] = [titles_of(own, titles, rng) for own in spans[:number]]
    if mentions == "both":
        arguments["entity_spans_pair"] = pair_spans[:number]
        arguments["entities_pair"] = [titles_of(own, titles, rng) for own in pair_spans[:number]]
    if mentions == "none":
        # The option would say nothing there.
        arguments.pop("max_entity_length", None)
    same(theirs()(texts[:number], **arguments), ours()(texts[:number], **arguments))
    first = {key: value[0] if isinstance(value, list) else value for key, value in arguments.items()}
    same(theirs()(texts[0], **first), ours()(texts[0], **first))


@needs_4_57
@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "  a  b ",
        "a<mask>b",
        "a <mask> b",
        "<mask>",
        "a \t<mask>",
        "<s> a</s> <ent>b<ent2>",
        "\n\u00e9\U0001f600 x",
    ],
)
def test_odd_texts(text, theirs, ours):
    same(theirs()(text), ours()(text))
    same(theirs()([text, "x"], padding=True), ours()([text, "x"], padding=True))


@needs_4_57
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(
    "options", [{}, {"padding": "max_length", "max_length": 300}, {"pad_to_multiple_of": 8}], ids=str
)
@pytest.mark.parametrize("task", TASKS)
def test_pad(task, options, side, sentences, theirs, ours):
    rng = random.Random(5)
    texts, spans = cases(rng.sample(sentences, 20), rng, task)
    rows = [
        ours(task)(text, entity_spans=own, return_special_tokens_mask=True, return_token_type_ids=True)
        for text, own in zip(texts, spans, strict=True)
    ]
    expected = theirs(task, padding_side=side).pad([dict(row) for row in rows], **options)
    got = ours(task, padding_side=side).pad(rows, **options)
    same(expected, unshifted(got) if side == "left" else got)
    same(theirs(task).pad(dict(rows[0]), padding=False), ours(task).pad(rows[0], padding=False))


@needs_4_57
def test_model_max_length(sentences, theirs, ours):
    texts = sentences[:50]
    expected = theirs(model_max_length=10)(texts, truncation=True, padding="max_length")
    same(expected, ours(model_max_length=10)(texts, truncation=True, padding="max_length"))


@pytest.mark.parametrize(
    ("pair", "truncation", "stride"),
    [(False, True, 0), (False, True, 5), (False, "only_first", 12), (True, "only_second", 4), (True, "only_first", 4)],
)
def test_windows(pair, truncation, stride, sentences, files, ours):
    """Windows are those of transformers' Rust tokenizers, for RoBERTa."""
    words = Tokenizer(models.BPE.from_file(files[0], files[1]))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    rust = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>")
    rng = random.Random(8)
    texts = [" ".join(rng.sample(sentences, 6)).replace("\n", " ") for _ in range(40)]
    pairs = rng.sample([text for text in sentences if len(text) < 60], 40) if pair else None
    if truncation == "only_second":
        texts, pairs = pairs, texts
    arguments = {
        "truncation": truncation,
        "max_length": 60,
        "stride": stride,
        "padding": True,
        "return_overflowing_tokens": True,
        "return_offsets_mapping": True,
        "return_special_tokens_mask": True,
    }
    expected, got = rust(texts, pairs, **arguments), ours()(texts, pairs, **arguments)
    for key in ("input_ids", "attention_mask", "special_tokens_mask", "overflow_to_sample_mapping", "offset_mapping"):
        assert got[key] == expected[key], key
    assert got.sequence_ids == [expected.sequence_ids(row) for row in range(len(got.input_ids))]


@pytest.mark.parametrize("task", TASKS)
def test_theirs_loads_what_ours_saves(task, sentences, files, tmp_path):
    rng = random.Random(6)
    texts, spans = cases(rng.sample(sentences, 100), rng, task)
    texts.append("a <mask> b")
    spans.append(SPANS_OF_MASKED[task])
    saved = LukeTokenizer.from_files(*files, task=task, max_mention_length=20)
    saved.save_pretrained(tmp_path)
    loaded = transformers.LukeTokenizer.from_pretrained(tmp_path)
    again = LukeTokenizer.from_pretrained(tmp_path)
    assert (loaded.task, loaded.max_mention_length, again.task) == (task, 20, task)
    expected = saved(texts, entity_spans=spans, padding=True)
    same(expected, loaded(texts, entity_spans=spans, padding=True))
    same(expected, again(texts, entity_spans=spans, padding=True))
    for name in ("cls", "sep", "pad", "unk", "mask", "entity_unk", "entity_pad", "entity_mask", "entity_mask2"):
        assert getattr(loaded, f"{name}_token_id") == getattr(saved, f"{name}_token_id")


@pytest.mark.parametrize("task", TASKS)
def test_ours_loads_what_theirs_saves(task, sentences, titles, files, tmp_path):
    rng = random.Random(7)
    texts, spans = cases(rng.sample(sentences, 100), rng, task)
    if transformers.__version__.startswith("4."):
        saved = transformers.LukeTokenizer(*files, task=task)
    else:
        merges = [tuple(line.split()) for line in Path(files[1]).read_text(encoding="utf-8").splitlines()[1:]]
        vocab = json.loads(Path(files[0]).read_text(encoding="utf-8"))
        saved = transformers.LukeTokenizer(vocab, merges, titles, task=task)
    saved.save_pretrained(tmp_path)
    loaded = LukeTokenizer.from_pretrained(tmp_path)
    assert loaded.task == task
    assert loaded.entity_vocab == titles
    assert len(loaded) == 50267
    same(saved(texts, entity_spans=spans, padding=True), loaded(texts, entity_spans=spans, padding=True))
