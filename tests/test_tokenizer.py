"""LukeTokenizer on a vocabulary trained here: where it goes beyond transformers 4.57, its files, its errors."""

import itertools
import json
import multiprocessing
import pickle
import random
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from luke_kernels import PackedBatch
from luke_kernels.tokenizer import BUNDLED, LukeTokenizer, read_entity_vocab

CORPUS = [
    "Beyoncé lives in Los Angeles with her husband, a rapper from New York City.",
    "Ana Ivanovic said on Tuesday she could hardly believe her luck in Los Angeles.",
    "The cities of New York and Los Angeles lie far apart; most of them live in the cities.",
]
TEXT = "Beyoncé lives in Los Angeles."
BEYONCE, LOS_ANGELES = (0, 7), (17, 28)
TITLES = {"[PAD]": 0, "[UNK]": 1, "[MASK]": 2, "Beyoncé": 3, "Los Angeles": 4, "Beyonce": 3, "[MASK2]": 5}
SPECIALS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    """Return a folder with vocab.json, merges.txt, entity_vocab.json."""
    folder = tmp_path_factory.mktemp("bpe")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=350, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.model.save(str(folder))
    (folder / "entity_vocab.json").write_text(json.dumps(TITLES), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def make(bpe):
    def make(**options) -> LukeTokenizer:
        return LukeTokenizer.from_files(bpe / "vocab.json", bpe / "merges.txt", bpe / "entity_vocab.json", **options)

    return make


@pytest.fixture(scope="module")
def plain(make):
    return make()


@pytest.fixture(scope="module")
def long_mentions(make):
    return make(max_mention_length=200)


@pytest.fixture(scope="module")
def wordpiece():
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=200, special_tokens=specials, show_progress=False)
    )
    return tokenizer


BERT = {
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "mask_token": "[MASK]",
    "pair_separators": 1,
}


def mention_texts(tokenizer, encoding, row=None) -> list[str]:
    """Return what the tokens of each entity say."""
    ids = encoding.input_ids if row is None else encoding.input_ids[row]
    positions = encoding.entity_position_ids if row is None else encoding.entity_position_ids[row]
    return [tokenizer.decode([ids[at] for at in entity if at >= 0]) for entity in positions]


def tokens(tokenizer, encoding) -> str:
    return "".join(tokenizer.convert_ids_to_tokens(encoding.input_ids)).replace("Ġ", " ")


# What it computes.


@settings(deadline=None, max_examples=200, derandomize=True)
@given(data=st.data())
def test_mentions_are_whole_tokens_and_nothing_is_lost(long_mentions, data):
    text = data.draw(st.text(alphabet="ab é.\n\U0001f600", min_size=1, max_size=30))
    bound = st.integers(0, len(text))
    spans = data.draw(
        st.lists(st.tuples(bound, bound).filter(lambda s: s[0] < s[1] and text[slice(*s)] != " "), max_size=5)
    )
    encoding = long_mentions(text, entity_spans=spans, return_offsets_mapping=True)

    def cut(at):
        return at - 1 if at and text[at - 1] == " " else at

    pieces = [text[cut(start) : cut(end)] for start, end in spans]
    assert long_mentions.decode(encoding.input_ids[1:-1]) == text
    assert mention_texts(long_mentions, encoding) == pieces
    for piece, (start, end), positions in zip(pieces, spans, encoding.entity_position_ids, strict=True):
        offsets = [encoding.offset_mapping[at] for at in positions if at >= 0]
        assert min(offset[0] for offset in offsets) >= cut(start)
        assert max(offset[1] for offset in offsets) == cut(end)
        if piece.strip(" "):
            assert text[min(a for a, b in offsets if a < b) : cut(end)] == piece.lstrip(" ")


def test_span_classification(make):
    tokenizer = make(task="entity_span_classification")
    encoding = tokenizer(TEXT, entity_spans=[LOS_ANGELES, BEYONCE])
    spans = list(zip(encoding.entity_start_positions, encoding.entity_end_positions, strict=True))
    assert [tokenizer.decode(encoding.input_ids[a : b + 1]) for a, b in spans] == [" Los Angeles", "Beyoncé"]
    assert encoding.entity_ids == [2, 2]


def test_mentions_longer_than_max_mention_length(make):
    tokenizer = make(task="entity_span_classification", max_mention_length=2)
    encoding = tokenizer("zqzq Angeles", entity_spans=[(0, 4)])
    assert encoding.entity_position_ids == [[1, 2]]
    assert (encoding.entity_start_positions, encoding.entity_end_positions) == ([1], [4])


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        ([BEYONCE, LOS_ANGELES], "<ent>Beyoncé<ent> lives in<ent2> Los Angeles<ent2>."),
        ([LOS_ANGELES, BEYONCE], "<ent2>Beyoncé<ent2> lives in<ent> Los Angeles<ent>."),
        ([(0, 17), (17, 28)], "<ent>Beyoncé lives in<ent><ent2> Los Angeles<ent2>."),
        ([(8, 28), LOS_ANGELES], "Beyoncé<ent> lives in<ent2> Los Angeles<ent2><ent>."),
        ([LOS_ANGELES, (8, 28)], "Beyoncé<ent2> lives in<ent> Los Angeles<ent><ent2>."),
        ([LOS_ANGELES, (17, 20)], "Beyoncé lives in<ent><ent2> Los<ent2> Angeles<ent>."),
        ([(17, 20), LOS_ANGELES], "Beyoncé lives in<ent2><ent> Los<ent> Angeles<ent2>."),
        ([LOS_ANGELES, LOS_ANGELES], "Beyoncé lives in<ent><ent2> Los Angeles<ent2><ent>."),
        ([(8, 20), LOS_ANGELES], "Beyoncé<ent> lives in<ent2> Los<ent> Angeles<ent2>."),
    ],
)
def test_nested_pair_markers(make, spans, expected):
    tokenizer = make(task="entity_pair_classification", special_tokens_in_text=["<ent>", "<ent2>"])
    encoding = tokenizer(TEXT, entity_spans=spans)
    assert tokenizer.decode(encoding.input_ids[1:-1]) == expected
    assert encoding.entity_ids == [2, 5]
    # From the opening marker to the closing one.
    for text, marker in zip(mention_texts(tokenizer, encoding), ("<ent>", "<ent2>"), strict=True):
        assert text == expected[expected.index(marker) : expected.rindex(marker) + len(marker)]


def test_only_the_mask_is_special_in_text(make, plain):
    text = "a <s> </s> <pad> <ent>[MASK] <unk>"
    ids = plain(text).input_ids[1:-1]
    assert plain.decode(ids) == text
    assert not {plain.cls_token_id, plain.sep_token_id, plain.pad_token_id, plain.entity_token_1_id} & {*ids}
    assert tokens(plain, plain("a  <mask> b")) == "<s>a<mask> b</s>"
    some = make(special_tokens_in_text=["<ent>", "</s>"])
    assert some("a</s><ent>").input_ids[2:] == [2, some.entity_token_1_id, 2]
    assert plain.tokenize("a <mask>") == ["a", "<mask>"]


def test_prefix_space_at_the_start_only(make, plain):
    tokenizer = make(add_prefix_space=True)
    text = "Los Angeles."
    encoding = tokenizer(text, entity_spans=[(0, 11), (11, 12)], return_offsets_mapping=True)
    assert encoding.input_ids == plain(" Los Angeles.", entity_spans=[(1, 12), (12, 13)]).input_ids
    assert mention_texts(tokenizer, encoding) == [" Los Angeles", "."]
    expected = plain(text, entity_spans=[(0, 11), (11, 12)], return_offsets_mapping=True)
    assert encoding.offset_mapping[1][0] == 0
    assert encoding.offset_mapping[-3:] == expected.offset_mapping[-3:]
    assert tokenizer(" a").input_ids == plain(" a").input_ids


@pytest.mark.parametrize("in_sequence", [False, True])
def test_prefix_space_of_the_wrapped_tokenizer_is_left_out(bpe, in_sequence):
    inner = Tokenizer(models.BPE.from_file(str(bpe / "vocab.json"), str(bpe / "merges.txt")))
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=True)
    inner.pre_tokenizer = pre_tokenizers.Sequence([splitter]) if in_sequence else splitter
    before = inner.to_str()
    tokenizer = LukeTokenizer(inner, TITLES)
    assert tokens(tokenizer, tokenizer("a.", entity_spans=[(0, 1)])) == "<s>a.</s>"
    assert inner.to_str() == before


def test_offsets(plain, make):
    encoding = plain(["Beyoncé  lives", "\U0001f600 in"], ["in Los", "a"], return_offsets_mapping=True, padding=True)
    for row, texts in enumerate((("Beyoncé  lives", "in Los"), ("\U0001f600 in", "a"))):
        words = [set(), set()]
        for index, sequence, (start, end) in zip(
            encoding.input_ids[row], encoding.sequence_ids[row], encoding.offset_mapping[row], strict=True
        ):
            if sequence is None:
                assert (start, end) == (0, 0)
                assert index in (0, 1, 2)
            else:
                words[sequence].update(range(start, end))
        for text, covered in zip(texts, words, strict=True):
            assert covered == {at for at, character in enumerate(text) if character != " "}
    marked = make(task="entity_classification")(TEXT, entity_spans=[BEYONCE], return_offsets_mapping=True)
    at = [place for place, index in enumerate(marked.input_ids) if index == plain.entity_token_1_id]
    assert [marked.offset_mapping[place] for place in at] == [(0, 0), (0, 0)]
    assert [marked.sequence_ids[0][place] for place in at] == [0, 0]


def test_spans_may_be_lists_arrays_and_in_any_order(plain):
    expected = plain(TEXT, entity_spans=[LOS_ANGELES, BEYONCE], entities=["Los Angeles", "Nobody"])
    assert expected.entity_ids == [4, 1]
    for spans in ([[17, 28], [0, 7]], np.array([[17, 28], [0, 7]])):
        assert plain(TEXT, entity_spans=spans, entities=["Los Angeles", "Nobody"]) == expected


def test_rows_without_entities(plain):
    encoding = plain([TEXT, TEXT, TEXT], entity_spans=[None, [BEYONCE], []], padding=True, return_tensors="pt")
    assert encoding.entity_ids.tolist() == [[0], [2], [0]]
    assert encoding.entity_attention_mask.tolist() == [[0], [1], [0]]
    assert (encoding.entity_position_ids[[0, 2]] == -1).all()
    none = plain([TEXT, "a"], entity_spans=[[], []], padding=True, return_tensors="pt")
    assert none.entity_position_ids.shape == (2, 0, 30)
    assert none.entity_ids.dtype == torch.int64
    assert plain([], padding=True) == {"input_ids": [], "attention_mask": []}


def test_pair_spans_alone(plain):
    encoding = plain("a", TEXT, entity_spans_pair=[BEYONCE], entities_pair=["Beyoncé"])
    assert encoding.entity_ids == [3]
    assert mention_texts(plain, encoding) == ["Beyoncé"]


@pytest.mark.parametrize("separators", [1, 2, 3])
def test_pair_separators(make, separators):
    tokenizer = make(pair_separators=separators)
    encoding = tokenizer("a", TEXT, entity_spans=[(0, 1)], entity_spans_pair=[BEYONCE], return_special_tokens_mask=True)
    assert tokens(tokenizer, encoding).startswith("<s>a" + "</s>" * separators + "B")
    assert mention_texts(tokenizer, encoding) == ["a", "Beyoncé"]
    assert sum(encoding.special_tokens_mask) == 2 + separators
    assert len(tokenizer("a", TEXT, max_length=9, truncation=True).input_ids) == 9


def test_left_padding_shifts_positions(make):
    tokenizer = make(task="entity_span_classification", padding_side="left")
    encoding = tokenizer([TEXT, "in Los Angeles"], entity_spans=[[BEYONCE], [(3, 14), (0, 2)]], padding=True)
    for row, expected in enumerate((["", "Beyoncé"], [" Los Angeles", "in"])):
        starts, ends = encoding.entity_start_positions[row], encoding.entity_end_positions[row]
        said = [tokenizer.decode(encoding.input_ids[row][a : b + 1]) for a, b in zip(starts, ends, strict=True)]
        real = encoding.entity_attention_mask[row]
        assert [text for text, one in zip(said, real, strict=True) if one] == [text for text in expected if text]
    rows = [
        tokenizer(text, entity_spans=spans)
        for text, spans in ((TEXT, [BEYONCE]), ("in Los Angeles", [(3, 14), (0, 2)]))
    ]
    assert tokenizer.pad(rows) == encoding


def test_max_length_padding_takes_max_entity_length_of_the_call(plain):
    batch = plain([TEXT, TEXT], entity_spans=[[BEYONCE], []], padding="max_length", max_length=40, max_entity_length=4)
    assert [len(row) for row in batch.entity_ids] == [4, 4]
    assert [len(row) for row in batch.input_ids] == [40, 40]


def test_max_length_padding_of_longer_rows(plain):
    spans = [[(at, at + 1) for at in range(5)], []]
    encoding = plain(
        [TEXT, "a"], entity_spans=spans, padding="max_length", max_length=4, max_entity_length=3, return_tensors="np"
    )
    assert encoding.entity_ids.shape == (2, 5)
    assert encoding.input_ids.shape == (2, len(plain(TEXT, entity_spans=spans[0]).input_ids))


def test_length_counts_no_padding(plain):
    assert plain("a", padding="max_length", max_length=9, return_length=True)["length"] == 3
    assert plain(["a", "a."], padding=True, return_length=True)["length"] == [3, 4]


def test_token_types_without_special_tokens(plain):
    encoding = plain("a", entity_spans=[(0, 1)], add_special_tokens=False, return_token_type_ids=True)
    assert (encoding.token_type_ids, encoding.entity_token_type_ids) == ([0], [0])


def test_tensors(plain):
    encoding = plain(TEXT, entity_spans=[BEYONCE], return_tensors="pt", return_length=True)
    assert encoding.entity_position_ids.shape == (1, 1, 30)
    assert {value.dtype for value in encoding.values()} == {torch.int64}
    assert encoding.to("meta") is encoding
    assert {value.device.type for value in encoding.values()} == {"meta"}
    array = plain(TEXT, entity_spans=[BEYONCE], return_tensors="np")
    assert {value.dtype for value in array.values()} == {np.dtype("int64")}


def test_decode(make):
    tokenizer = make(task="entity_classification")
    ids = tokenizer(
        TEXT, entity_spans=[LOS_ANGELES], padding="max_length", max_length=40, return_tensors="pt"
    ).input_ids[0]
    assert tokenizer.decode(ids, skip_special_tokens=True) == TEXT
    assert tokenizer.decode(ids[:-2]).startswith("<s>Beyoncé lives in<ent> Los Angeles<ent>.</s><pad>")


def test_ids_and_tokens(plain):
    assert len(plain) == 352
    assert (plain.entity_token_1_id, plain.entity_token_2_id) == (350, 351)
    assert plain.convert_ids_to_tokens(plain.convert_tokens_to_ids(["<s>", "Ġin", "<ent2>"])) == [
        "<s>",
        "Ġin",
        "<ent2>",
    ]
    assert plain.convert_tokens_to_ids("nowhere at all") == plain.unk_token_id == 3
    assert plain.convert_ids_to_tokens(350) == "<ent>"
    assert plain.convert_ids_to_tokens(999) is None
    assert (plain.entity_id("Los Angeles"), plain.entity_id("Nobody")) == (4, 1)
    assert [plain.entity_title(index) for index in (3, 5, 9)] == ["Beyoncé", "[MASK2]", None]


# Truncation and windows.


def test_dropped_spans(plain):
    whole = plain(TEXT, entity_spans=[LOS_ANGELES, BEYONCE])
    assert (whole.entity_span_indices, whole.dropped_spans) == ([[0, 1]], [[]])
    cut = plain(TEXT, entity_spans=[LOS_ANGELES, BEYONCE], truncation=True, max_length=len(whole.input_ids) - 2)
    assert (cut.entity_span_indices, cut.dropped_spans) == ([[1]], [[0]])
    many = plain(TEXT, entity_spans=[BEYONCE, LOS_ANGELES], truncation=True, max_length=99, max_entity_length=1)
    assert (many.entity_ids, many.dropped_spans) == ([2], [[1]])
    # Those of the pair are numbered on.
    arguments = {"entity_spans": [[BEYONCE], []], "entity_spans_pair": [[LOS_ANGELES, BEYONCE], [(0, 1)]]}
    pair = plain([TEXT, "a"], [TEXT, "b"], **arguments, truncation="only_second", max_length=len(whole.input_ids) + 6)
    assert (pair.entity_span_indices, pair.dropped_spans) == ([[0, 2], [0]], [[1], []])


@pytest.mark.parametrize("stride", [0, 1, 3])
def test_windows(plain, stride):
    text = " ".join(CORPUS)
    spans = [match.span() for match in re.finditer(r"\w+ \w+", text)]
    whole = plain(text, entity_spans=spans)
    encoding = plain(
        [text, "a"],
        entity_spans=[spans, [(0, 1)]],
        truncation=True,
        max_length=12,
        stride=stride,
        return_overflowing_tokens=True,
    )
    rows = encoding.input_ids
    assert encoding.overflow_to_sample_mapping == [0] * (len(rows) - 1) + [1]
    words = [row[1:-1] for row in rows[:-1]]
    assert all(len(row) == 10 for row in words[:-1])
    assert words[0] + [index for row in words[1:] for index in row[stride:]] == whole.input_ids[1:-1]
    mentions = [{at - 1 for at in positions if at > 0} for positions in whole.entity_position_ids]
    for row, (ids, indices) in enumerate(zip(rows[:-1], encoding.entity_span_indices, strict=False)):
        assert (ids[0], ids[-1]) == (0, 2)
        window = {row * (10 - stride) + at for at in range(len(ids) - 2)}
        # All that lie wholly in it, and no others.
        assert indices == [index for index, mention in enumerate(mentions) if mention <= window]
        assert [said.strip() for said in mention_texts(plain, encoding, row)] == [
            text[slice(*spans[i])] for i in indices
        ]
    assert (encoding.entity_span_indices[-1], encoding.entity_ids[-1]) == ([0], [2])
    carried = {i for indices in encoding.entity_span_indices[:-1] for i in indices}
    lost = [i for i in range(len(spans)) if i not in carried]
    assert encoding.dropped_spans == [lost] * (len(rows) - 1) + [[]]
    assert lost or stride > 0


def test_windows_of_pairs(plain):
    first, second = CORPUS[0], CORPUS[1]
    encoding = plain(
        second[:3],
        first,
        entity_spans=[(0, 3)],
        entity_spans_pair=[(17, 28)],
        truncation="only_second",
        max_length=16,
        stride=4,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        padding=True,
        return_tensors="pt",
    )
    question = plain(second[:3]).input_ids
    second_ids = []
    for row, sequence in zip(encoding.input_ids.tolist(), encoding.sequence_ids, strict=True):
        assert row[: len(question)] == question
        window = [index for index, which in zip(row, sequence, strict=True) if which == 1]
        assert second_ids[-4:] == (window[:4] if second_ids else [])
        second_ids += window[4 if second_ids else 0 :]
    assert second_ids == plain(first).input_ids[1:-1]
    assert all(indices[0] == 0 for indices in encoding.entity_span_indices)
    assert any(indices == [0, 1] for indices in encoding.entity_span_indices)
    assert encoding.overflow_to_sample_mapping.tolist() == [0] * len(encoding.input_ids)


def test_windows_without_need(plain):
    encoding = plain("a", truncation=True, max_length=9, return_overflowing_tokens=True)
    assert encoding == {
        "input_ids": [[0, *plain.convert_tokens_to_ids(["a"]), 2]],
        "attention_mask": [[1, 1, 1]],
        "overflow_to_sample_mapping": [0],
    }


# Files.


def test_save_and_load(make, bpe, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "model.safetensors").write_text("weights")
    saved = make(
        task="entity_pair_classification", padding_side="left", model_max_length=12, special_tokens_in_text=["<s>"]
    )
    saved.save_pretrained(tmp_path)
    names = ["entity_vocab.json", "merges.txt", "model.safetensors", "tokenizer_config.json", "vocab.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    loaded = LukeTokenizer.from_pretrained(tmp_path)
    arguments = {"entity_spans": [[BEYONCE, LOS_ANGELES]], "padding": "max_length"}
    text = TEXT + "<s> <mask>"
    assert loaded([text], **arguments) == saved([text], **arguments)
    assert loaded.entity_vocab == TITLES
    other = LukeTokenizer.from_pretrained(tmp_path, task=None, padding_side="right", special_tokens_in_text=())
    assert (other.task, other.max_entity_length, other.padding_side) == (None, 32, "right")
    assert other(text).input_ids == make()(text).input_ids


@pytest.mark.parametrize("add_prefix_space", [False, True])
def test_saved_words_have_the_offsets_of_roberta(make, tmp_path, add_prefix_space):
    make(add_prefix_space=add_prefix_space).save_words(tmp_path)
    ours = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    theirs = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    separator, first = (("</s>", ours.token_to_id("</s>")), ("<s>", ours.token_to_id("<s>")))
    theirs.post_processor = processors.RobertaProcessing(separator, first, add_prefix_space=add_prefix_space)
    for texts in ((TEXT,), ("  Ada  met <mask> Zoë.",), ("in", TEXT)):
        expected = theirs.encode(*texts)
        assert (ours.encode(*texts).ids, ours.encode(*texts).offsets) == (expected.ids, expected.offsets)
    assert ours.encode("in Los").offsets[2][0] == 3


def test_saved_words_replace_another_tokenizer(plain, tmp_path, monkeypatch):
    plain.save_pretrained(tmp_path)
    before = {path.name: path.read_text() for path in tmp_path.iterdir()}

    def fail(*_, **__):
        raise OSError("no space left")

    with monkeypatch.context() as patched:
        patched.setattr("luke_kernels.tokenizer.files._write_json", fail)
        with pytest.raises(OSError, match="no space left"):
            plain.save_words(tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == before
    plain.save_words(tmp_path)
    names = ["entity_vocab.json", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_added_tokens_are_kept(bpe, plain, tmp_path):
    inner = Tokenizer(models.BPE.from_file(str(bpe / "vocab.json"), str(bpe / "merges.txt")))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_tokens([AddedToken("covid19", normalized=False)])
    saved = LukeTokenizer(inner, TITLES)
    assert inner.token_to_id("<ent>") is None
    saved.save_pretrained(tmp_path)
    loaded = LukeTokenizer.from_pretrained(tmp_path)
    for tokenizer in (saved, loaded):
        assert (len(tokenizer), tokenizer.entity_token_1_id) == (353, 351)
        assert tokenizer("a covid19").input_ids[-2] == 350


def test_old_hub_layout(bpe, tmp_path, plain):
    for name in ("vocab.json", "merges.txt", "entity_vocab.json"):
        (tmp_path / name).write_bytes((bpe / name).read_bytes())
    (tmp_path / "added_tokens.json").write_text('{"<ent2>": 351, "<ent>": 350}')
    mask = {"content": "<mask>", "lstrip": True, "rstrip": False, "single_word": False, "normalized": True}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"mask_token": mask, "cls_token": "<s>"}))
    loaded = LukeTokenizer.from_pretrained(tmp_path, max_mention_length=7)
    assert (len(loaded), loaded.max_mention_length, loaded.model_max_length) == (352, 7, None)
    assert loaded("a <mask>").input_ids == plain("a <mask>").input_ids
    (tmp_path / "added_tokens.json").write_text('{"<ent2>": 501, "<ent>": 500}')
    with pytest.raises(ValueError, match="added tokens must continue the vocabulary, got '<ent>' as 500 for 350"):
        LukeTokenizer.from_pretrained(tmp_path)


def test_layout_of_transformers_5(bpe, tmp_path, plain):
    inner = Tokenizer(models.BPE.from_file(str(bpe / "vocab.json"), str(bpe / "merges.txt")))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    # It adds the titles to the words, and takes no white space into the mask token.
    inner.add_special_tokens([*SPECIALS, "<ent>", "<ent2>", "[UNK]", "[PAD]", "[MASK]", "[MASK2]"])
    inner.save(str(tmp_path / "tokenizer.json"))
    config = {"entity_vocab": TITLES, "entity_1_token": "<ent>", "model_max_length": 10**30, "max_mention_length": 9}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    loaded = LukeTokenizer.from_pretrained(tmp_path)
    assert (len(loaded), loaded.entity_vocab, loaded.max_mention_length) == (len(plain), TITLES, 9)
    text = "a [MASK] <mask> <ent>"
    assert loaded(text) == plain(text)


def test_bundled():
    tokenizer = LukeTokenizer.from_pretrained(BUNDLED)
    encoding = tokenizer("Ada Lovelace wrote it.", entity_spans=[(0, 12)], entities=["Ada Lovelace"])
    assert tokenizer.entity_title(encoding.entity_ids[0]) == "Ada Lovelace"
    assert tokenizer.decode(encoding.input_ids, skip_special_tokens=True) == "Ada Lovelace wrote it."


def test_hub(bpe, tmp_path, plain):
    pytest.importorskip("huggingface_hub", reason="needs huggingface_hub")
    commit = "a" * 40
    repository = tmp_path / "models--someone--luke"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for name in ("vocab.json", "merges.txt", "entity_vocab.json"):
        (snapshot / name).write_bytes((bpe / name).read_bytes())
    loaded = LukeTokenizer.from_pretrained("someone/luke", cache_dir=tmp_path, local_files_only=True, task=None)
    assert loaded(TEXT) == plain(TEXT)
    with pytest.raises(FileNotFoundError, match=r"someone/other must be a directory, .* or an id on the hub"):
        LukeTokenizer.from_pretrained("someone/other", cache_dir=tmp_path, local_files_only=True)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("entity_vocab.tsv", "[PAD]\t0\n[UNK]\t0\n[MASK]\t0\nLos Angeles\t7\nA\u2028B\t2\n[MASK2]\t0\n"),
        (
            "entity_vocab.jsonl",
            "".join(
                json.dumps({"id": index, "entities": names, "count": 1}) + "\n"
                for index, names in enumerate(
                    [
                        [["[PAD]", None]],
                        [["[UNK]", None]],
                        [["[MASK]", None]],
                        [["Los Angeles", None]],
                        [["A\u2028B", "en"], ["AB", "de"]],
                        [["[MASK2]", None]],
                    ]
                )
            ),
        ),
    ],
)
def test_original_entity_vocabs(bpe, tmp_path, name, content):
    for file in ("vocab.json", "merges.txt"):
        (tmp_path / file).write_bytes((bpe / file).read_bytes())
    (tmp_path / name).write_text(content, encoding="utf-8")
    loaded = LukeTokenizer.from_pretrained(tmp_path)
    assert (loaded.entity_id("Los Angeles"), loaded.entity_mask2_token_id) == (3, 5)
    assert loaded.entity_id("A\u2028B" if name.endswith("tsv") else "en:A\u2028B") == 4
    assert loaded.entity_id("de:AB") == (1 if name.endswith("tsv") else 4)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("v.tsv", "[PAD]\t0\nLos Angeles 7\n", r"v\.tsv, line 2: must be title, tab, count, got 'Los Angeles 7'"),
        ("v.tsv", "[PAD]\t0\n[PAD]\t0\n", r"v\.tsv, line 2: title must stand once, got '\[PAD\]'"),
        ("v.json", '{"a": 1,\n "b": }', r"v\.json must hold JSON, .* line 2"),
        ("v.json", '{"a": -1}', r"v\.json must have ids from 0, got 'a': -1"),
        ("v.jsonl", '{"id": 0, "entities": [["a", null]]}\n{"id": 1}\n', r"v\.jsonl, line 2: must be"),
        ("v.jsonl", '{"id": "0", "entities": [["a", null]]}\n', r"v\.jsonl, line 1: entities must map titles to int"),
        ("v.txt", "", r"entity_vocab must be a file of suffix \.json, \.tsv, \.jsonl, got '.*v\.txt'"),
    ],
)
def test_malformed_entity_vocabs(tmp_path, name, content, message):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises((ValueError, TypeError), match=message):
        read_entity_vocab(tmp_path / name)


def test_malformed_merges(bpe, tmp_path):
    (tmp_path / "merges.txt").write_text("#version: 0.2\ni n\nzq qz\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"merges\.txt, line 3: must be two tokens that make a third, got 'zq qz'"):
        LukeTokenizer.from_files(bpe / "vocab.json", tmp_path / "merges.txt", TITLES)


def test_missing_files(bpe, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"must hold vocab\.json and merges\.txt, or tokenizer\.json, .*, got none of them$"
    ):
        LukeTokenizer.from_pretrained(tmp_path)
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((bpe / name).read_bytes())
    with pytest.raises(FileNotFoundError, match=r"must hold one of entity_vocab\.json, .*, got none of them$"):
        LukeTokenizer.from_pretrained(tmp_path)
    (tmp_path / "sentencepiece.bpe.model").write_text("")
    with pytest.raises(NotImplementedError, match="got mLUKE's, of sentencepiece, which is not supported yet"):
        LukeTokenizer.from_pretrained(tmp_path)


def test_wordpiece(wordpiece, tmp_path):
    saved = LukeTokenizer(wordpiece, TITLES, task="entity_classification", **BERT)
    saved.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "entity_vocab.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    text = "Beyonce lives in Los Angeles, [CLS] [MASK]."
    start = text.index("Los")
    for tokenizer in (saved, LukeTokenizer.from_pretrained(tmp_path)):
        encoding = tokenizer(text, entity_spans=[(start, start + 11)], return_offsets_mapping=True)
        said = tokenizer.convert_ids_to_tokens(encoding.input_ids)
        assert (said[0], said[-1], said.count("[MASK]"), said.count("[CLS]")) == ("[CLS]", "[SEP]", 1, 1)
        assert mention_texts(tokenizer, encoding) == ["<ent> los angeles <ent>"]
        positions = [at for at in encoding.entity_position_ids[0] if at >= 0][1:-1]
        offsets = [encoding.offset_mapping[at] for at in positions]
        assert (offsets[0][0], offsets[-1][1]) == (start, start + 11)
        assert len(tokenizer) == wordpiece.get_vocab_size() + 2
        plain = LukeTokenizer.from_pretrained(tmp_path, task=None)
        assert plain.convert_ids_to_tokens(plain("in", "los").input_ids) == ["[CLS]", "in", "[SEP]", "los", "[SEP]"]


def test_pickled_and_forked(make):
    tokenizer = make(task="entity_classification")
    texts, spans = [TEXT + " <ent>"] * 20, [[BEYONCE]] * 20
    expected = tokenizer(texts, entity_spans=spans)
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy(texts, entity_spans=spans) == expected
    assert pickle.loads(pickle.dumps(expected)).dropped_spans == expected.dropped_spans
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(tokenizer, (texts, None, spans)) == expected


# pad


def test_pad(make):
    tokenizer = make(task="entity_span_classification")
    texts, spans = [TEXT, "a", "in Los Angeles"], [[BEYONCE, LOS_ANGELES], [(0, 1)], [(3, 14)]]
    rows = [tokenizer(text, entity_spans=own) for text, own in zip(texts, spans, strict=True)]
    expected = tokenizer(texts, entity_spans=spans, padding=True, pad_to_multiple_of=8, return_tensors="pt")
    for row in rows:
        row["labels"] = 1.5
    padded = tokenizer.pad(rows, pad_to_multiple_of=8, return_tensors="pt")
    labels = padded.pop("labels")
    assert (labels.tolist(), labels.dtype) == ([1.5] * 3, torch.float32)
    assert (padded.input_ids.shape[1] % 8, padded.entity_ids.shape) == (0, (3, 8))
    assert padded.keys() == expected.keys()
    assert all(torch.equal(padded[key], expected[key]) for key in expected)
    # Of tensors it makes tensors, of one text one text.
    tensors = [{key: torch.tensor(value) for key, value in row.items()} for row in rows]
    again = tokenizer.pad(tensors, padding=True, pad_to_multiple_of=8)
    assert all(torch.equal(again[key], expected[key]) for key in expected)
    single = tokenizer.pad(rows[1], padding="max_length", max_length=5)
    assert (len(single.input_ids), len(single.entity_ids), len(rows[1].input_ids)) == (5, 32, 3)


def test_pad_errors(plain):
    with pytest.raises(ValueError, match=r"encodings must have input_ids, got \['labels'\]"):
        plain.pad([{"labels": 1}])
    with pytest.raises(ValueError, match="encodings must have the same keys"):
        plain.pad([plain("a"), plain("a", entity_spans=[(0, 1)])])


@pytest.mark.filterwarnings("ignore")
def test_collators_of_transformers(make):
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    tokenizer = make()
    rows = [tokenizer(text, entity_spans=[(0, 1)]) for text in (TEXT, "a")]
    batch = transformers.DataCollatorWithPadding(tokenizer)([dict(row) for row in rows])
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    assert batch["entity_position_ids"].shape == (2, 1, 30)
    labelled = [{**row, "labels": [0] * len(row["input_ids"])} for row in rows]
    batch = transformers.DataCollatorForTokenClassification(tokenizer)(labelled)
    assert batch["labels"].shape == batch["input_ids"].shape
    assert (batch["labels"][1][3:] == -100).all()


# Errors.


@pytest.mark.parametrize(
    ("task", "arguments", "message"),
    [
        (None, {"text": 3}, "text must be a str or a list of them, got int"),
        (None, {"text": ["a", None]}, r"text\[1\] must be a str, got NoneType"),
        (None, {"text": "a", "text_pair": ["b"]}, "text_pair must be a str, got list"),
        (None, {"text": ["a"], "text_pair": ["b", "c"]}, "text_pair must have an item for each text, 1, got 2"),
        (None, {"text": ["a"], "entity_spans": [[], []]}, "entity_spans must have an item for each text, 1, got 2"),
        (None, {"text": ["a"], "entity_spans": 5}, "entity_spans must be a list with an item for each text, got int"),
        (None, {"text": "abc", "entity_spans": [(0, 4)]}, r"entity_spans must hold spans .* <= 3, .* got \(0, 4\)"),
        (None, {"text": ["a", "abc"], "entity_spans": [[], [(2, 1)]]}, r"entity_spans\[1\] must hold .* got \(2, 1\)"),
        (None, {"text": "abc", "entity_spans": [(1, 1)]}, r"entity_spans must hold spans .* got \(1, 1\)"),
        (None, {"text": "abc", "entity_spans": [(-1, 1)]}, r"entity_spans must hold spans .* got \(-1, 1\)"),
        (
            None,
            {"text": "abc", "entity_spans": [(0, 1.5)]},
            r"entity_spans must be a list of pairs .* got \[\(0, 1.5\)\]",
        ),
        (None, {"text": "abc", "entity_spans": (0, 1)}, r"entity_spans must be a list of pairs .* got \(0, 1\)"),
        (None, {"text": "abc", "entity_spans": [(0, 1, 2)]}, "entity_spans must be a list of pairs"),
        (None, {"text": "a b", "entity_spans": [(1, 2)]}, "entity_spans must hold spans of at least one token"),
        (None, {"text": "abc", "entities": ["A"]}, "entity_spans must be given with entities, got None"),
        (
            None,
            {"text": "abc", "entity_spans": [(0, 1)], "entities": ["A", "B"]},
            "entities must have a title .* 1, got 2",
        ),
        (
            None,
            {"text": "abc", "entity_spans": [(0, 1)], "entities": [3]},
            r"entities must be a list of titles, got \[3\]",
        ),
        (
            None,
            {"text": "abc", "entity_spans": [(0, 1)], "entities": "A"},
            "entities must be a list of titles, got 'A'",
        ),
        (
            None,
            {"text": ["a"], "entity_spans": [[(0, 1)]], "entities": [["A", "B"]]},
            r"entities\[0\] must have a title",
        ),
        (
            None,
            {"text": "a", "entity_spans_pair": [(0, 1)]},
            "text_pair must be given with entity_spans_pair, got None",
        ),
        (
            None,
            {"text": "a", "text_pair": "b", "entities_pair": ["A"]},
            "entity_spans_pair must be given with entities_pair",
        ),
        ("entity_classification", {"text": "a"}, "entity_spans must hold 1 for entity_classification, got 0"),
        (
            "entity_pair_classification",
            {"text": ["ab"], "entity_spans": [[(0, 1)]]},
            r"entity_spans\[0\] must hold 2 for",
        ),
        ("entity_span_classification", {"text": "a", "entity_spans": []}, "entity_spans must hold 1 or more for"),
        ("entity_classification", {"text": "a", "text_pair": "b"}, "text_pair must be None for task entity_class"),
        (
            "entity_classification",
            {"text": "a", "entities": ["A"], "entity_spans": [(0, 1)]},
            "entities must be None for",
        ),
        (None, {"text": "a", "padding": "most"}, "padding must be one of longest, max_length, do_not_pad, got 'most'"),
        (None, {"text": "a", "truncation": "most"}, "truncation must be one of longest_first, .* got 'most'"),
        (None, {"text": "a", "padding_side": "top"}, "padding_side must be one of right, left, got 'top'"),
        (None, {"text": "a", "return_tensors": "tf"}, "return_tensors must be one of pt, np, got 'tf'"),
        (None, {"text": "a", "truncation": True}, "max_length must be given, .* got None"),
        (None, {"text": "a", "padding": "max_length"}, "max_length must be given, .* got None"),
        (
            None,
            {"text": "a", "truncation": True, "max_length": 2},
            "max_length must be more than the 2 special tokens, got 2",
        ),
        (None, {"text": "a", "max_length": 0}, "max_length must be positive, got 0"),
        (None, {"text": "a", "max_length": 3.0}, "max_length must be an int, got 3.0"),
        (None, {"text": "a", "max_entity_length": 0}, "max_entity_length must be positive, got 0"),
        (None, {"text": "a", "pad_to_multiple_of": 0}, "pad_to_multiple_of must be positive, got 0"),
        (
            None,
            {"text": "a", "truncation": True, "padding": True, "max_length": 9, "pad_to_multiple_of": 8},
            "max_length must be a multiple of pad_to_multiple_of, 8, got 9",
        ),
        (
            None,
            {"text": ["a", "b"], "text_pair": ["c", TEXT], "truncation": "only_first", "max_length": 9},
            r"truncation must bring text\[1\] to max_length, 9, got only_first for 1 \+ \d+ tokens",
        ),
        (
            None,
            {"text": TEXT, "truncation": "only_second", "max_length": 5},
            r"truncation must bring text to max_length, 5, got only_second for \d+ \+ 0 tokens",
        ),
        (
            None,
            {"text": TEXT, "truncation": True, "max_length": 5, "stride": 3, "return_overflowing_tokens": True},
            "stride must be at least 0 and less than 3, .* got 3",
        ),
        (
            None,
            {"text": TEXT, "text_pair": TEXT, "truncation": True, "max_length": 9, "return_overflowing_tokens": True},
            "truncation must be only_first or only_second for windows of pairs, got longest_first",
        ),
        (
            None,
            {"text": ["a", "a in"], "return_tensors": "pt"},
            r"return_tensors must go with padding .* input_ids of lengths \[3, 4\]",
        ),
    ],
)
def test_errors(make, task, arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make(task=task)(**arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "ner"}, "task must be one of entity_classification, .* got 'ner'"),
        ({"padding_side": "top"}, "padding_side must be one of right, left, got 'top'"),
        ({"max_mention_length": 0}, "max_mention_length must be positive, got 0"),
        ({"model_max_length": "9"}, "model_max_length must be an int, got '9'"),
        ({"entity_mask2_token": "[MASK3]"}, r"entity_mask2_token must be in entity_vocab, got '\[MASK3\]'"),
        ({"cls_token": "[CLS]"}, r"cls_token must be in the vocabulary, got '\[CLS\]'"),
        ({"mask_token": "[MASK]"}, r"mask_token must be in the vocabulary, got '\[MASK\]'"),
        ({"special_tokens_in_text": ["<x>"]}, "special_tokens_in_text must be in the vocabulary, got '<x>'"),
    ],
)
def test_constructor_errors(make, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make(**options)


@pytest.mark.parametrize("option", ["add_prefix_space", "is_split_into_words", "verbose"])
def test_arguments_that_calls_do_not_take(plain, option):
    with pytest.raises(TypeError, match=option):
        plain("a", **{option: True})


# Size.

LOAD = """
import json, resource, sys, time
from luke_kernels.tokenizer import read_entity_vocab

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

before, begin = peak(), time.process_time()
vocab = read_entity_vocab(sys.argv[1])
print(json.dumps({"titles": len(vocab), "s": time.process_time() - begin, "mib": peak() - before}))
"""


@pytest.mark.parametrize("form", ["json", "tsv"])
def test_half_a_million_titles(tmp_path, form):
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(5, 14))) for _ in range(1000)]
    # Words of no Latin-1 letters take two bytes a character.
    pairs = itertools.product(["Łódź", *words], words[:500])
    titles = [
        "[PAD]",
        "[UNK]",
        "[MASK]",
        "[MASK2]",
        *(f"{a.capitalize()} {b}" for a, b in itertools.islice(pairs, 499_996)),
    ]
    assert 15 < sum(map(len, titles)) / len(titles) < 25
    path = tmp_path / f"entity_vocab.{form}"
    if form == "json":
        path.write_text(
            json.dumps({t: i for i, t in enumerate(titles)}, ensure_ascii=False, indent=2), encoding="utf-8"
        )
    else:
        path.write_text("".join(f"{title}\t1\n" for title in titles), encoding="utf-8")
    seconds = []
    for _ in range(3):
        run = subprocess.run([sys.executable, "-c", LOAD, str(path)], capture_output=True, text=True, check=True)
        result = json.loads(run.stdout)
        assert result["titles"] == 500_000
        assert result["mib"] < 150
        seconds.append(result["s"])
        if seconds[-1] < 1:
            break  # what else the machine does makes it slower, and nothing faster
    assert min(seconds) < 1


def test_token_types_of_pairs(wordpiece):
    """RoBERTa has one type, BERT two; of entities too."""
    arguments = {"text": "Ada met", "text_pair": "Ada", "entity_spans": [(0, 3)], "entity_spans_pair": [(0, 3)]}
    tokenizer = LukeTokenizer(wordpiece, TITLES, **BERT)
    encoding = tokenizer(**arguments, return_token_type_ids=True)
    separator = encoding["input_ids"].index(tokenizer.sep_token_id)
    length = len(encoding["input_ids"])
    assert encoding["token_type_ids"] == [0] * (separator + 1) + [1] * (length - separator - 1)
    assert encoding["entity_token_type_ids"] == [0, 1]
    assert not any(tokenizer("Ada met", return_token_type_ids=True)["token_type_ids"])
    roberta = LukeTokenizer(wordpiece, TITLES, **{**BERT, "pair_separators": 2})
    assert not any(roberta(**arguments, return_token_type_ids=True)["token_type_ids"])


def test_packing_takes_the_pad_of_the_tokenizer(wordpiece):
    tokenizer = LukeTokenizer(wordpiece, TITLES, **BERT)
    encodings = tokenizer(["Ada met Ada", "Ada"], entity_spans=[[(0, 3)], None])
    batch = PackedBatch.from_encodings(encodings)
    first = tokenizer.pad_token_id + 1
    lengths = [len(ids) for ids in encodings["input_ids"]]
    assert batch.position_ids.tolist() == [first + rank for length in lengths for rank in range(length)]
    assert batch.pad_token_id == tokenizer.pad_token_id


def test_what_else_transformers_has():
    tokenizer = LukeTokenizer.from_pretrained(BUNDLED)
    ids = tokenizer.encode("Ada met Charles")
    assert ids == tokenizer("Ada met Charles")["input_ids"]
    assert tokenizer.batch_decode([ids], skip_special_tokens=True) == ["Ada met Charles"]
    assert tokenizer.get_vocab()[tokenizer.mask_token] == tokenizer.mask_token_id
    assert len(tokenizer) == tokenizer.vocab_size + 2
