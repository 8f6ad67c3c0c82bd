"""LUKE's tokenizer: texts and the character spans of entities in them -> inputs of the model."""

import copy
import inspect
import json
import operator
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, pre_tokenizers, processors

from luke_kernels.entity_vocab import check_entity_vocab, read_entity_vocab
from luke_kernels.tokenizer.encoding import LukeEncoding, constant, pad_columns, to_lists, to_tensors
from luke_kernels.tokenizer.files import (
    find_folder,
    read_byte_level_bpe,
    read_stored_entity_vocab,
    read_tokenizer,
    stored_options,
    write_tokenizer,
    write_words,
)
from luke_kernels.tokenizer.mentions import NO_WORDS, Frame, Row, Span, Words, cut, make_rows, mark

# A small tokenizer that the package ships, for examples and tests.
BUNDLED = Path(__file__).parents[1] / "data/tokenizer"

# Spans a text must have: exactly so many, or None for any number from 1.
TASKS = {"entity_classification": 1, "entity_pair_classification": 2, "entity_span_classification": None}

_PADDINGS = ("longest", "max_length", "do_not_pad")
_TRUNCATIONS = ("longest_first", "only_first", "only_second", "do_not_truncate")
_SIDES = ("right", "left")
_TENSORS = ("pt", "np")
_WORD_SPECIALS = ("cls_token", "sep_token", "pad_token", "unk_token", "mask_token", "entity_token_1", "entity_token_2")
_ENTITY_SPECIALS = ("entity_unk_token", "entity_pad_token", "entity_mask_token", "entity_mask2_token")


class _Source(NamedTuple):
    """A text to tokenise, and its mentions in it."""

    text: str
    prefix: int  # how many characters the caller's text does not have
    spans: list[Span]
    entity_ids: list[int]
    spans_name: str


class LukeTokenizer:
    """Turn texts and the character spans of entities in them into inputs of LUKE.

    A text is cut at every boundary of a span and its pieces are tokenised apart, so that mentions are whole tokens; a
    space before a boundary goes to the piece after it. Of `tokenizer`, which stays as it is, the normaliser,
    pre-tokeniser, model and added tokens are used, and never truncation, padding and post-processor. Markers it lacks
    are added after its vocabulary. In texts only the mask token is special, and takes in white space on its left;
    every other special token is text, unless `special_tokens_in_text` names it.

    Args:
        tokenizer: Any `tokenizers.Tokenizer`, say of byte-level BPE or WordPiece.
        entity_vocab: Ids by title; not copied.
        task: None, or what is to be classified: `"entity_classification"` wraps 1 mention in `entity_token_1`,
            `"entity_pair_classification"` wraps 2, the second in `entity_token_2`; `"entity_span_classification"` takes
            1 or more as they are. All entities are then [MASK], the second of a pair [MASK2].
        max_entity_length: Most entities of a row under truncation; 1 and 2 for the first two tasks.
        max_mention_length: M, the most positions of a mention.
        entity_token_1, entity_token_2: Markers of mentions.
        entity_unk_token, entity_pad_token, entity_mask_token, entity_mask2_token: Special titles, in `entity_vocab`.
        cls_token, sep_token, pad_token, unk_token, mask_token: Special tokens, in the vocabulary.
        add_prefix_space: Whether a text that starts with a word gets a space before it.
        padding_side: `"right"` or `"left"`.
        model_max_length: The `max_length` of calls that give none.
        special_tokens_in_text: Tokens that are special in texts, besides the mask token.
        pair_separators: Number of `sep_token` between the texts of a pair, 2 for RoBERTa and 1 for BERT.

    Raises:
        ValueError, TypeError: the task is unknown, a length not positive, a special token or title not in its
            vocabulary, `entity_vocab` no dict of titles and ids.

    Source: Yamada et al. 2020, "LUKE", sections 3.1 and 4.
    """

    model_input_names: ClassVar[list[str]] = ["input_ids", "attention_mask"]

    def __init__(
        self,
        tokenizer: Tokenizer,
        entity_vocab: dict[str, int],
        *,
        task: str | None = None,
        max_entity_length: int = 32,
        max_mention_length: int = 30,
        entity_token_1: str = "<ent>",
        entity_token_2: str = "<ent2>",
        entity_unk_token: str = "[UNK]",
        entity_pad_token: str = "[PAD]",
        entity_mask_token: str = "[MASK]",
        entity_mask2_token: str = "[MASK2]",
        cls_token: str = "<s>",
        sep_token: str = "</s>",
        pad_token: str = "<pad>",
        unk_token: str = "<unk>",
        mask_token: str = "<mask>",
        add_prefix_space: bool = False,
        padding_side: str = "right",
        model_max_length: int | None = None,
        special_tokens_in_text: Sequence[str] = (),
        pair_separators: int = 2,
    ):
        if not isinstance(tokenizer, Tokenizer):
            raise TypeError(f"tokenizer must be a tokenizers.Tokenizer, got {type(tokenizer).__name__}")
        if task is not None:
            _check_choice("task", task, tuple(TASKS))
        _check_choice("padding_side", padding_side, _SIDES)
        _check_positive("max_entity_length", max_entity_length)
        _check_positive("max_mention_length", max_mention_length)
        _check_positive("pair_separators", pair_separators)
        if model_max_length is not None:
            _check_positive("model_max_length", model_max_length)
        self.task, self.max_mention_length = task, max_mention_length
        self.max_entity_length = max_entity_length if task is None else TASKS[task] or max_entity_length
        self.entity_token_1, self.entity_token_2 = entity_token_1, entity_token_2
        self.entity_unk_token, self.entity_pad_token = entity_unk_token, entity_pad_token
        self.entity_mask_token, self.entity_mask2_token = entity_mask_token, entity_mask2_token
        self.cls_token, self.sep_token, self.pad_token = cls_token, sep_token, pad_token
        self.unk_token, self.mask_token = unk_token, mask_token
        self.add_prefix_space, self.padding_side = add_prefix_space, padding_side
        self.model_max_length, self.pair_separators = model_max_length, pair_separators
        self.special_tokens_in_text = tuple(special_tokens_in_text)

        self._tokenizer = self._own(tokenizer)
        self.cls_token_id, self.sep_token_id = self._special_id("cls_token"), self._special_id("sep_token")
        self.pad_token_id, self.unk_token_id = self._special_id("pad_token"), self._special_id("unk_token")
        self.mask_token_id = self._special_id("mask_token")
        self.entity_token_1_id = self._special_id("entity_token_1")
        self.entity_token_2_id = self._special_id("entity_token_2")

        self.entity_vocab = check_entity_vocab(entity_vocab)
        self._titles: dict[int, str] | None = None
        self.entity_unk_token_id = self._special_entity_id("entity_unk_token")
        self.entity_pad_token_id = self._special_entity_id("entity_pad_token")
        self.entity_mask_token_id = self._special_entity_id("entity_mask_token")
        self.entity_mask2_token_id = self._special_entity_id("entity_mask2_token")

    @classmethod
    def from_files(
        cls, vocab: str | Path, merges: str | Path, entity_vocab: str | Path | dict[str, int], **options: Any
    ) -> "LukeTokenizer":
        """Make a tokenizer of RoBERTa's byte-level BPE.

        Args:
            vocab: JSON file of tokens and their ids.
            merges: File of merges, two tokens per line, the first merge first.
            entity_vocab: Ids by title, or a file as `luke_kernels.tokenizer.read_entity_vocab` takes it.
            options: Keyword arguments of `LukeTokenizer`.

        Raises:
            ValueError, TypeError: a file is malformed, named with its line; an option is refused.
        """
        if not isinstance(entity_vocab, dict):
            entity_vocab = read_entity_vocab(entity_vocab)
        return cls(read_byte_level_bpe(Path(vocab), Path(merges)), entity_vocab, **options)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        **options: Any,
    ) -> "LukeTokenizer":
        """Load a tokenizer from a folder or the Hugging Face hub.

        Args:
            name_or_path: A folder, or the name of a repository of the hub. There are `vocab.json` and `merges.txt`, or
                `tokenizer.json`; the entities in `entity_vocab.json`, `.tsv`, `.jsonl` or `tokenizer_config.json`; the
                settings in `tokenizer_config.json`, `special_tokens_map.json` and `added_tokens.json`, if at all.
            revision, token, cache_dir, local_files_only: As in `huggingface_hub.snapshot_download`.
            options: Keyword arguments of `LukeTokenizer`, instead of what is stored; `entity_vocab` also as a file.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError, TypeError: a file is malformed, an option is refused.
            NotImplementedError: the tokenizer is mLUKE's, which is not supported yet.
        """
        folder = find_folder(
            name_or_path, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
        )
        tokenizer, settings = read_tokenizer(folder)
        entity_vocab = options.pop("entity_vocab", None)
        if entity_vocab is None:
            entity_vocab = read_stored_entity_vocab(folder, settings)
        elif not isinstance(entity_vocab, dict):
            entity_vocab = read_entity_vocab(entity_vocab)
        return cls(tokenizer, entity_vocab, **{**stored_options(settings, _OPTIONS), **options})

    def save_pretrained(self, folder: str | Path) -> None:
        """Save into a folder, for `from_pretrained` and for the LukeTokenizer of transformers 4 and 5.

        RoBERTa's byte-level BPE becomes `vocab.json` and `merges.txt`; anything else becomes `tokenizer.json`, which
        LukeTokenizer of transformers does not read. Files are written aside and renamed; those of another tokenizer in
        the folder are removed.
        """
        state = self._state()
        settings = {
            "tokenizer_class": "LukeTokenizer",
            **{name: getattr(self, name) for name in _OPTIONS if getattr(self, name) not in (None, ())},
            "bos_token": self.cls_token,
            "eos_token": self.sep_token,
            "additional_special_tokens": [self.entity_token_1, self.entity_token_2],
            "added_tokens_decoder": {str(token.pop("id")): token for token in map(dict, state["added_tokens"])},
            "clean_up_tokenization_spaces": False,
        }
        write_tokenizer(Path(folder), self._tokenizer, state, settings, self.entity_vocab)

    def save_words(self, folder: str | Path) -> None:
        """Save the tokenizer of words alone, without the markers after them, for AutoTokenizer of transformers.

        Ids, token types and offsets are those of RoBERTa's or BERT's tokenizer. Files are written as by
        `save_pretrained`; an entity vocabulary in the folder stays.

        Args:
            folder: Where; made if missing.

        Raises:
            OSError: a file cannot be written.
        """
        state = self._state()
        added, markers = state["added_tokens"], (self.entity_token_1, self.entity_token_2)
        while added and added[-1]["content"] in markers:
            del added[-1]
        is_byte_level = (state["pre_tokenizer"] or {}).get("type") == "ByteLevel"
        if is_byte_level:
            state["pre_tokenizer"]["add_prefix_space"] = self.add_prefix_space
        first, sep, types = f"{self.cls_token} $A {self.sep_token}", self.sep_token, int(self.pair_separators == 1)
        for token in added:
            # BERT's mask has no part in the space before it, which is no token either.
            token["lstrip"] &= not types
        words = Tokenizer.from_str(json.dumps(state))
        template = processors.TemplateProcessing(
            single=first,
            pair=f"{first}{f' {sep}' * (self.pair_separators - 1)} $B:{types} {sep}:{types}",
            special_tokens=[(self.cls_token, self.cls_token_id), (sep, self.sep_token_id)],
        )
        # As RobertaProcessing: offsets leave out the space that a word's first token starts with.
        trim = processors.ByteLevel(add_prefix_space=self.add_prefix_space, trim_offsets=True)
        words.post_processor = processors.Sequence([trim, template]) if is_byte_level else template
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **{name: getattr(self, name) for name in _WORD_SPECIALS if getattr(self, name) not in markers},
            "bos_token": self.cls_token,
            "eos_token": sep,
            "padding_side": self.padding_side,
            "model_input_names": [*self.model_input_names, *(["token_type_ids"] if types else [])],
            "clean_up_tokenization_spaces": False,
        }
        if self.model_max_length is not None:
            settings["model_max_length"] = self.model_max_length
        write_words(Path(folder), words, settings)

    def _state(self) -> dict[str, Any]:
        """Return what the tokenizer of words is as tokenizer.json, with special tokens marked as such."""
        state = json.loads(self._tokenizer.to_str())
        specials = {getattr(self, name) for name in _WORD_SPECIALS}
        for token in state["added_tokens"]:
            token["special"] |= token["content"] in specials or token["content"] in self.special_tokens_in_text
        return state

    def __call__(
        self,
        text: str | Sequence[str],
        text_pair: str | Sequence[str] | None = None,
        entity_spans: Sequence[Any] | None = None,
        entity_spans_pair: Sequence[Any] | None = None,
        entities: Sequence[Any] | None = None,
        entities_pair: Sequence[Any] | None = None,
        *,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        max_entity_length: int | None = None,
        stride: int = 0,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: str | None = None,
        return_token_type_ids: bool | None = None,
        return_attention_mask: bool | None = None,
        return_overflowing_tokens: bool = False,
        return_special_tokens_mask: bool = False,
        return_offsets_mapping: bool = False,
        return_length: bool = False,
    ) -> LukeEncoding:
        """Encode a text, a pair of texts, or a batch of B of either.

        The whole batch is tokenised in one call. Rows are `<s> text </s>` and `<s> text </s></s> text_pair </s>`.

        Args:
            text: A text, or a list of them.
            text_pair: The second text, or a list of them; none with a task.
            entity_spans: Pairs (start, end) of characters of the text, end excluded, in any order; for a batch one list
                per text. None or [] where there are none.
            entity_spans_pair: The same for `text_pair`.
            entities: Titles, one a span, unknown ones become [UNK]; None makes all [MASK]. None with a task.
            entities_pair: The same for `text_pair`.
            add_special_tokens: Whether rows have `cls_token` and `sep_token`.
            padding: True or `"longest"` pads words and entities to the longest row; `"max_length"` pads words to
                `max_length` and entities to `max_entity_length`, or to the longest row where that is longer; False or
                `"do_not_pad"`.
            truncation: True or `"longest_first"` shortens the longer text of a pair first; `"only_first"` and
                `"only_second"` shorten that one; False or `"do_not_truncate"`. None is True where `max_length` is given
                and padding is not. Mentions no longer whole are dropped, then entities beyond `max_entity_length`.
            max_length: Tokens of a row, special ones included; default `model_max_length`.
            max_entity_length: Entities of a row; default that of the tokenizer.
            stride: Tokens that consecutive windows share.
            pad_to_multiple_of: Of what the padded numbers of words and entities are multiples.
            padding_side: Default that of the tokenizer. Padding on the left shifts the start and end positions, which
                index the row; it does not shift `entity_position_ids`, which as those of words count tokens only.
            return_tensors: `"pt"`, `"np"`, or None for lists.
            return_token_type_ids: Whether to return token types: all 0, but 1 for `text_pair` with
                `pair_separators=1`, as for BERT.
            return_attention_mask: Whether to return masks; default True.
            return_overflowing_tokens: Whether truncation makes windows: rows that together hold the whole text, each
                with the entities wholly in it. Of a pair the truncated text slides, the other one stays whole.
            return_special_tokens_mask: Whether to return 1 for special tokens and padding, 0 elsewhere.
            return_offsets_mapping: Whether to return where each token stands in its text.
            return_length: Whether to return the number of tokens of each row, padding not counted.

        Returns:
            Lists, of a single text without their first dimension unless there are windows; or int64 tensors. W words,
            E entities, M positions of a mention.
            Always `input_ids` (B, W), and `attention_mask` (B, W).
            Where spans are given `entity_ids`, `entity_attention_mask` (B, E) and `entity_position_ids` (B, E, M), -1
            after the last; for entity_span_classification also the first and the last token of each mention,
            `entity_start_positions` and `entity_end_positions` (B, E).
            Where asked for `token_type_ids`, `special_tokens_mask` (B, W), `entity_token_type_ids` (B, E),
            `offset_mapping` (B, W, 2), (0, 0) for special tokens and markers, `length` and, for windows,
            `overflow_to_sample_mapping` (B,), which text a row is of.

        Raises:
            ValueError, TypeError: an argument breaks its rule; of a batch the message names which text.
        """
        if not isinstance(text, (str, list, tuple)):
            raise TypeError(f"text must be a str or a list of them, got {type(text).__name__}")
        batched, pair = not isinstance(text, str), text_pair is not None
        padding, truncation, max_length = self._strategies(padding, truncation, max_length, pad_to_multiple_of)
        if max_entity_length is None:
            max_entity_length = self.max_entity_length
        _check_positive("max_entity_length", max_entity_length)
        side = _check_choice("padding_side", padding_side or self.padding_side, _SIDES)
        if return_tensors is not None:
            return_tensors = _check_choice("return_tensors", return_tensors, _TENSORS)
        if return_overflowing_tokens and pair and truncation == "longest_first":
            raise ValueError(f"truncation must be only_first or only_second for windows of pairs, got {truncation}")
        self._check_given(text_pair, entity_spans, entity_spans_pair, entities, entities_pair)
        frame = Frame(1, self.pair_separators if pair else 0, 1) if add_special_tokens else Frame(0, 0, 0)
        room = max_length - sum(frame) if truncation != "do_not_truncate" and max_length is not None else None
        if room is not None and room < 1:
            raise ValueError(f"max_length must be more than the {sum(frame)} special tokens, got {max_length}")

        size = len(text) if batched else 1
        sources = self._sources("", batched, size, text, entity_spans, entities)
        if pair:
            sources += self._sources("_pair", batched, size, text_pair, entity_spans_pair, entities_pair)
        words = self._tokenize(sources, return_offsets_mapping)
        rows: list[Row] = []
        samples: list[int] = []
        for sample, first in enumerate(words[:size]):
            second = words[size + sample] if pair else NO_WORDS
            own = make_rows(
                first, second, room, truncation, stride if return_overflowing_tokens else None, max_entity_length
            )
            if not own:
                raise ValueError(
                    f"truncation must bring {f'text[{sample}]' if batched else 'text'} to max_length, {max_length}, "
                    f"got {truncation} for {len(first.ids)} + {len(second.ids)} tokens"
                )
            rows += own
            samples += [sample] * len(own)

        columns: dict[str, Any] = {
            "input_ids": [
                frame.around(row.first.ids, row.second.ids, self.cls_token_id, self.sep_token_id) for row in rows
            ]
        }
        sizes = [(len(row.first.ids), len(row.second.ids)) for row in rows]
        if return_special_tokens_mask:
            columns["special_tokens_mask"] = [frame.around([0] * n, [0] * m, 1, 1) for n, m in sizes]
        if return_offsets_mapping:
            columns["sequence_ids"] = [frame.around([0] * n, [1] * m, None, None) for n, m in sizes]
            columns["offset_mapping"] = [
                frame.around(row.first.offsets, row.second.offsets, (0, 0), (0, 0)) for row in rows
            ]
        if entity_spans is not None or entity_spans_pair is not None:
            mentions = [row.mentions(frame) for row in rows]
            columns["entity_ids"] = [row.first.entity_ids + row.second.entity_ids for row in rows]
            columns["entity_position_ids"] = [[self._positions(*span) for span in spans] for spans in mentions]
            if self.task == "entity_span_classification":
                columns["entity_start_positions"] = [[start for start, _ in spans] for spans in mentions]
                columns["entity_end_positions"] = [[end - 1 for _, end in spans] for spans in mentions]
        if return_token_type_ids:
            # RoBERTa's pairs, which two separators part, are of one type; BERT's of two.
            type_of_pair = int(pair and self.pair_separators == 1)
            columns["token_type_ids"] = [
                [0] * (frame.before + n + frame.between) + [type_of_pair] * (m + frame.after) for n, m in sizes
            ]
            if "entity_ids" in columns:
                columns["entity_token_type_ids"] = [
                    [0] * len(row.first.entity_ids) + [type_of_pair] * len(row.second.entity_ids) for row in rows
                ]
        if return_length:
            columns["length"] = [len(row) for row in columns["input_ids"]]
        if return_overflowing_tokens:
            columns["overflow_to_sample_mapping"] = samples
        masks = return_attention_mask is not False
        self._pad(columns, masks, padding, max_length, max_entity_length, pad_to_multiple_of, side)
        sequence_ids = columns.pop("sequence_ids", None)
        if not (batched or return_overflowing_tokens or return_tensors):
            columns = {key: column[0] for key, column in columns.items()}
        encoding = LukeEncoding(to_tensors(columns, return_tensors, self._inner))
        encoding.entity_span_indices = [row.span_indices for row in rows]
        encoding.dropped_spans = [row.dropped_spans for row in rows]
        encoding.sequence_ids = sequence_ids
        encoding.pad_token_id = self.pad_token_id
        return encoding

    def encode(self, text: str | Sequence[str], *args: Any, **kwargs: Any) -> Any:
        """Return `input_ids` of a call."""
        return self(text, *args, **kwargs)["input_ids"]

    def pad(
        self,
        encodings: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        padding: bool | str = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = None,
        padding_side: str | None = None,
    ) -> LukeEncoding:
        """Pad encodings to one length, as collators ask for.

        Args:
            encodings: Encodings of single texts, or one of a batch or of a single text; of lists, arrays or tensors.
            padding, max_length, pad_to_multiple_of, return_attention_mask, padding_side: As in a call.
            return_tensors: As in a call; None returns what `input_ids` are, lists, arrays or tensors.

        Returns:
            The encoding of the batch. Missing masks are added; what is neither of words nor of entities stays as it is.

        Raises:
            ValueError, TypeError: `input_ids` are missing, the encodings differ in keys, an argument breaks its rule.
        """
        padding, _, max_length = self._strategies(padding, False, max_length, pad_to_multiple_of)
        side = _check_choice("padding_side", padding_side or self.padding_side, _SIDES)
        if return_tensors is not None:
            return_tensors = _check_choice("return_tensors", return_tensors, _TENSORS)
        if not isinstance(encodings, Mapping):
            if any(encoding.keys() != encodings[0].keys() for encoding in encodings):
                raise ValueError(f"encodings must have the same keys, got {[list(encoding) for encoding in encodings]}")
            encodings = {key: [encoding[key] for encoding in encodings] for key in (encodings[0] if encodings else ())}
        if "input_ids" not in encodings:
            raise ValueError(f"encodings must have input_ids, got {list(encodings)}")
        columns, kind = to_lists(encodings)
        single = bool(columns["input_ids"]) and not isinstance(columns["input_ids"][0], (list, tuple))
        if single:
            columns = {key: [value] for key, value in columns.items()}
        masks = return_attention_mask is not False
        self._pad(columns, masks, padding, max_length, self.max_entity_length, pad_to_multiple_of, side)
        if single:
            columns = {key: column[0] for key, column in columns.items()}
        encoding = LukeEncoding(to_tensors(columns, return_tensors or kind, self._inner))
        encoding.pad_token_id = self.pad_token_id
        return encoding

    def tokenize(self, text: str) -> list[str]:
        """Return the tokens of a text, without special tokens around it."""
        return self.convert_ids_to_tokens(self._tokenizer.encode(self._prefixed(text), add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int] | torch.Tensor | np.ndarray, skip_special_tokens: bool = False) -> str:
        """Return the text of token ids (W,), with or without special tokens and markers."""
        ids = [operator.index(index) for index in ids]
        if skip_special_tokens:
            specials = {getattr(self, f"{name}_id") for name in _WORD_SPECIALS}
            ids = [index for index in ids if index not in specials]
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> Any:
        """Return the id of a token, or the list of those of several; of unknown tokens `unk_token_id`."""
        if isinstance(tokens, str):
            index = self._tokenizer.token_to_id(tokens)
            return self.unk_token_id if index is None else index
        return [self.convert_tokens_to_ids(token) for token in tokens]

    def convert_ids_to_tokens(self, ids: int | Sequence[int]) -> Any:
        """Return the token of an id, or the list of those of several; None where the vocabulary has none."""
        if isinstance(ids, int):
            return self._tokenizer.id_to_token(ids)
        return [self._tokenizer.id_to_token(operator.index(index)) for index in ids]

    def batch_decode(self, rows: Sequence[Sequence[int]], skip_special_tokens: bool = False) -> list[str]:
        """Return the texts of several rows of ids."""
        return [self.decode(row, skip_special_tokens=skip_special_tokens) for row in rows]

    def get_vocab(self) -> dict[str, int]:
        """Return the ids of all tokens, markers included."""
        return self._tokenizer.get_vocab()

    @property
    def vocab_size(self) -> int:
        """The number of tokens without what was added to the vocabulary, as in transformers; `len` counts all."""
        return self._tokenizer.get_vocab_size(with_added_tokens=False)

    def entity_id(self, title: str) -> int:
        """Return the id of an entity, `entity_unk_token_id` of one that is not in the vocabulary."""
        return self.entity_vocab.get(title, self.entity_unk_token_id)

    def entity_title(self, index: int) -> str | None:
        """Return the title of an entity, the first of several, None where the vocabulary has none."""
        if self._titles is None:
            self._titles = {index: title for title, index in reversed(self.entity_vocab.items())}
        return self._titles.get(index)

    def __len__(self) -> int:
        """Return the size of the vocabulary of words, markers included."""
        return self._tokenizer.get_vocab_size()

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({len(self)} tokens, {len(self.entity_vocab)} titles, task={self.task!r}, "
            f"max_entity_length={self.max_entity_length}, max_mention_length={self.max_mention_length})"
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # Not part of what a Tokenizer pickles.
        self._tokenizer.encode_special_tokens = True

    def _own(self, tokenizer: Tokenizer) -> Tokenizer:
        """Return a tokenizer of the same model, with markers, and with those tokens special in texts that shall be."""
        own = Tokenizer(tokenizer.model)
        own.normalizer, own.decoder = tokenizer.normalizer, tokenizer.decoder
        own.pre_tokenizer = splitter = copy.deepcopy(tokenizer.pre_tokenizer)
        parts: Any = splitter if isinstance(splitter, pre_tokenizers.Sequence) else [splitter]
        for part in parts:
            if hasattr(part, "add_prefix_space"):
                # Else every piece of a text gets one.
                part.add_prefix_space = False
        # Of added tokens those marked special are then text like any, the others are found in it.
        own.encode_special_tokens = True
        specials = {getattr(self, name) for name in _WORD_SPECIALS}
        titles = {getattr(self, name) for name in _ENTITY_SPECIALS} - specials
        in_text = {self.mask_token, *self.special_tokens_in_text}
        added = sorted(tokenizer.get_added_tokens_decoder().items())
        # transformers 5 adds the special titles to the words, under ids that no model has embeddings of.
        while added and added[-1][1].content in titles and added[-1][0] >= own.get_vocab_size():
            del added[-1]
        own.add_tokens(
            [self._special_token(token.content) if token.content in specials | in_text else token for _, token in added]
        )
        own.add_tokens([self._special_token(marker) for marker in (self.entity_token_1, self.entity_token_2)])
        for name in self.special_tokens_in_text:
            if own.token_to_id(name) is None:
                raise ValueError(f"special_tokens_in_text must be in the vocabulary, got {name!r}")
        own.add_tokens([self._special_token(name) for name in sorted(in_text) if own.token_to_id(name) is not None])
        return own

    def _special_token(self, token: str) -> AddedToken:
        is_mask = token == self.mask_token
        is_text = not is_mask and token not in self.special_tokens_in_text
        return AddedToken(token, lstrip=is_mask, normalized=False, special=is_text)

    def _special_id(self, name: str) -> int:
        index = self._tokenizer.token_to_id(getattr(self, name))
        if index is None:
            raise ValueError(f"{name} must be in the vocabulary, got {getattr(self, name)!r}")
        return index

    def _special_entity_id(self, name: str) -> int:
        title = getattr(self, name)
        if title not in self.entity_vocab:
            raise ValueError(f"{name} must be in entity_vocab, got {title!r}")
        return self.entity_vocab[title]

    def _strategies(
        self, padding: bool | str, truncation: bool | str | None, max_length: int | None, multiple: int | None
    ) -> tuple[str, str, int | None]:
        """Return padding, truncation and max_length by their names, the length given where one of them needs it."""
        if truncation is None:
            truncation = max_length is not None and padding in (False, "do_not_pad")
        if isinstance(padding, bool):
            padding = "longest" if padding else "do_not_pad"
        if isinstance(truncation, bool):
            truncation = "longest_first" if truncation else "do_not_truncate"
        padding = _check_choice("padding", padding, _PADDINGS)
        truncation = _check_choice("truncation", truncation, _TRUNCATIONS)
        max_length = self.model_max_length if max_length is None else max_length
        truncates = truncation != "do_not_truncate"
        if max_length is not None:
            _check_positive("max_length", max_length)
        elif truncates or padding == "max_length":
            raise ValueError(
                f"max_length must be given, or model_max_length to the tokenizer, for truncation {truncation} "
                f"and padding {padding}, got None"
            )
        if multiple is not None:
            _check_positive("pad_to_multiple_of", multiple)
            if truncates and padding != "do_not_pad" and max_length is not None and max_length % multiple:
                raise ValueError(f"max_length must be a multiple of pad_to_multiple_of, {multiple}, got {max_length}")
        return padding, truncation, max_length

    def _check_given(self, text_pair: Any, spans: Any, spans_pair: Any, titles: Any, titles_pair: Any) -> None:
        """Check that what was given is given with what it needs, and that the task has a use for it."""
        for name, value, needed, other in (
            ("entities", titles, "entity_spans", spans),
            ("entities_pair", titles_pair, "entity_spans_pair", spans_pair),
            ("entity_spans_pair", spans_pair, "text_pair", text_pair),
        ):
            if value is not None and other is None:
                raise ValueError(f"{needed} must be given with {name}, got None")
        for name, value in (("text_pair", text_pair), ("entities", titles)):
            if value is not None and self.task is not None:
                raise ValueError(f"{name} must be None for task {self.task}, got a {type(value).__name__}")

    def _sources(self, suffix: str, batched: bool, size: int, texts: Any, spans: Any, titles: Any) -> list[_Source]:
        """Check the texts of a batch, or a single text as a batch of 1, with their spans and titles."""
        columns = {f"text{suffix}": texts, f"entity_spans{suffix}": spans, f"entities{suffix}": titles}
        if not batched:
            return [self._source(*columns, *columns.values())]
        for name, column in columns.items():
            if column is None:
                columns[name] = [None] * size
            elif not isinstance(column, (list, tuple)):
                raise TypeError(f"{name} must be a list with an item for each text, got {type(column).__name__}")
            elif len(column) != size:
                raise ValueError(f"{name} must have an item for each text, {size}, got {len(column)}")
        return [
            self._source(*(f"{name}[{index}]" for name in columns), *items)
            for index, items in enumerate(zip(*columns.values(), strict=True))
        ]

    def _source(self, text_name: str, spans_name: str, titles_name: str, text: Any, spans: Any, titles: Any) -> _Source:
        if not isinstance(text, str):
            raise TypeError(f"{text_name} must be a str, got {type(text).__name__}")
        checked = _check_spans(spans_name, [] if spans is None else spans, len(text))
        if self.task is not None and len(checked) != (TASKS[self.task] or max(len(checked), 1)):
            number = TASKS[self.task] or "1 or more"
            raise ValueError(f"{spans_name} must hold {number} for {self.task}, got {len(checked)}")
        if titles is None:
            entity_ids = [self.entity_mask_token_id] * len(checked)
            if self.task == "entity_pair_classification":
                entity_ids[1] = self.entity_mask2_token_id
        elif not isinstance(titles, (list, tuple)) or not all(isinstance(title, str) for title in titles):
            raise TypeError(f"{titles_name} must be a list of titles, got {titles!r}")
        elif len(titles) != len(checked):
            raise ValueError(f"{titles_name} must have a title for each span, {len(checked)}, got {len(titles)}")
        else:
            entity_ids = [self.entity_vocab.get(title, self.entity_unk_token_id) for title in titles]
        prefixed = self._prefixed(text)
        prefix = len(prefixed) - len(text)
        return _Source(prefixed, prefix, [(a + prefix, b + prefix) for a, b in checked], entity_ids, spans_name)

    def _prefixed(self, text: str) -> str:
        return f" {text}" if self.add_prefix_space and text and not text[0].isspace() else text

    def _tokenize(self, sources: list[_Source], with_offsets: bool) -> list[Words]:
        """Tokenise all pieces of all texts in one call, and set the markers of the task."""
        cuts = [cut(source.text, source.spans) for source in sources]
        pieces = [
            source.text[start:end]
            for source, (bounds, _) in zip(sources, cuts, strict=True)
            for start, end in pairwise(bounds)
        ]
        encode = self._tokenizer.encode_batch if with_offsets else self._tokenizer.encode_batch_fast
        encodings = iter(encode(pieces, add_special_tokens=False))
        markers = {
            "entity_classification": [self.entity_token_1_id],
            "entity_pair_classification": [self.entity_token_1_id, self.entity_token_2_id],
        }.get(self.task or "")
        texts = []
        for source, (bounds, pieces_before) in zip(sources, cuts, strict=True):
            ids: list[int] = []
            offsets: list[Span] = []
            tokens_before = [0]
            for begin in bounds[:-1]:
                encoding = next(encodings)
                ids += encoding.ids
                tokens_before.append(len(ids))
                if with_offsets:
                    offsets += [_offset(source, begin + start, begin + end) for start, end in encoding.offsets]
            spans = [
                (tokens_before[pieces_before[start]], tokens_before[pieces_before[end]]) for start, end in source.spans
            ]
            for index, (start, end) in enumerate(spans):
                if start == end:
                    raise ValueError(
                        f"{source.spans_name} must hold spans of at least one token, got the span {index} of "
                        f"{source.text[slice(*source.spans[index])]!r}"
                    )
            words = Words(ids, offsets, spans, source.entity_ids)
            texts.append(mark(words, markers) if markers else words)
        return texts

    def _positions(self, start: int, end: int) -> list[int]:
        size = self.max_mention_length
        return [*range(start, min(end, start + size)), *[-1] * (size - (end - start))]

    def _pad(
        self,
        columns: dict[str, Any],
        masks: bool,
        padding: str,
        max_length: int | None,
        max_entity_length: int,
        multiple: int | None,
        side: str,
    ) -> None:
        """Pad the columns of words and those of entities, in place; with `masks`, those that are missing are added."""
        for ids, mask in (("input_ids", "attention_mask"), ("entity_ids", "entity_attention_mask")):
            if masks and ids in columns and mask not in columns:
                columns[mask] = constant(columns[ids], 1)
        words = {
            "input_ids": self.pad_token_id,
            "attention_mask": 0,
            "token_type_ids": 0,
            "special_tokens_mask": 1,
            "offset_mapping": (0, 0),
            "sequence_ids": None,
        }
        entities = {
            "entity_ids": self.entity_pad_token_id,
            "entity_attention_mask": 0,
            "entity_token_type_ids": 0,
            "entity_position_ids": [-1] * self.max_mention_length,
            "entity_start_positions": 0,
            "entity_end_positions": 0,
        }
        missing = pad_columns(columns, words, "input_ids", padding, max_length, multiple, side)
        if side == "left":
            for key in columns.keys() & {"entity_start_positions", "entity_end_positions"}:
                columns[key] = [[at + number for at in row] for row, number in zip(columns[key], missing, strict=True)]
        pad_columns(columns, entities, "entity_ids", padding, max_entity_length, multiple, side)

    @property
    def _inner(self) -> dict[str, tuple[int, ...]]:
        return {"entity_position_ids": (self.max_mention_length,), "offset_mapping": (2,)}


def _offset(source: _Source, start: int, end: int) -> Span:
    """Return a token's span in the caller's text, without the space that byte-level tokens of words start with."""
    token = source.text[start:end]
    return start + len(token) - len(token.lstrip(" ")) - source.prefix, end - source.prefix


def _check_spans(name: str, spans: Any, length: int) -> list[Span]:
    checked = []
    try:
        for start, end in spans:
            checked.append((operator.index(start), operator.index(end)))
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a list of pairs (start, end) of ints, got {spans!r}") from None
    for start, end in checked:
        if not 0 <= start < end <= length:
            raise ValueError(
                f"{name} must hold spans with 0 <= start < end <= {length}, the length of the text, got {(start, end)}"
            )
    return checked


def _check_choice(name: str, value: Any, choices: Sequence[str]) -> str:
    for choice in choices:
        if value == choice:
            return choice
    raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def _check_positive(name: str, value: Any) -> None:
    if type(value) is not int:
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be positive, got {value}")


_OPTIONS = tuple(
    name
    for name, parameter in inspect.signature(LukeTokenizer).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY
)
