"""Mentions in texts and in their tokens: cutting, markers, truncation and windows. Knows no tokenizer."""

from collections.abc import Sequence
from typing import Any, NamedTuple

Span = tuple[int, int]  # start and end, end excluded, of characters or of tokens


class Words(NamedTuple):
    """The tokens of a text, and its mentions in them."""

    ids: list[int]
    offsets: list[Span]  # of characters, one per token; empty unless asked for
    spans: list[Span]
    entity_ids: list[int]


NO_WORDS = Words([], [], [], [])


class Frame(NamedTuple):
    """Number of special tokens before, between and after the texts of a row."""

    before: int
    between: int
    after: int

    def around(self, first: list[Any], second: list[Any], cls: Any, sep: Any) -> list[Any]:
        """Return a row: values of each text's tokens, with `cls` and `sep` for the special ones."""
        return [*[cls] * self.before, *first, *[sep] * self.between, *second, *[sep] * self.after]


class Row(NamedTuple):
    """The parts of a text and of its pair in a row."""

    first: Words
    second: Words
    span_indices: list[int]  # which mentions these are; those of the pair continue the numbering of those of the text
    dropped_spans: list[int]  # which ones are in no row

    def mentions(self, frame: Frame) -> list[Span]:
        """Return where the mentions are in the row."""
        at_second = frame.before + len(self.first.ids) + frame.between
        return [
            (start + at, end + at)
            for words, at in ((self.first, frame.before), (self.second, at_second))
            for start, end in words.spans
        ]


def cut(text: str, spans: Sequence[Span]) -> tuple[list[int], dict[int, int]]:
    """Cut a text at the boundaries of its mentions; a space before one goes to the piece after it.

    Returns:
        Where the pieces begin, and where the last one ends; how many pieces there are before each boundary.
    """
    cuts, pieces_before = [0], {}
    for boundary in sorted({boundary for span in spans for boundary in span}):
        at = boundary - 1 if boundary and text[boundary - 1] == " " else boundary
        if at != cuts[-1]:
            cuts.append(at)
        pieces_before[boundary] = len(cuts) - 1
    if cuts[-1] != len(text):
        cuts.append(len(text))
    return cuts, pieces_before


def mark(words: Words, markers: Sequence[int]) -> Words:
    """Set each mention between two of its marker, a mention within another one also within that one's markers.

    Returns:
        The tokens with markers, at offsets (0, 0); mentions include their markers.
    """
    # At one place first the closing markers, inner mentions before outer ones: later start, then later in order. Then
    # the opening ones, outer mentions before inner ones: later end, then earlier in order.
    edges = [
        edge
        for number, (start, end) in enumerate(words.spans)
        for edge in ((end, 0, -start, -number), (start, 1, -end, number))
    ]
    ids: list[int] = []
    offsets: list[Span] = []
    starts, ends = [0] * len(words.spans), [0] * len(words.spans)
    done = 0
    for at, opens, _, number in sorted(edges):
        ids += words.ids[done:at]
        offsets += words.offsets[done:at]
        done = at
        if opens:
            starts[number] = len(ids)
        ids.append(markers[abs(number)])
        offsets.append((0, 0))
        if not opens:
            ends[-number] = len(ids)
    ids += words.ids[done:]
    offsets += words.offsets[done:]
    return Words(ids, offsets, list(zip(starts, ends, strict=True)), words.entity_ids)


def make_rows(
    first: Words, second: Words, room: int | None, truncation: str, stride: int | None, max_entities: int
) -> list[Row]:
    """Lay a text and its pair into one row, or into windows.

    Args:
        room: How many tokens a row takes; None for all, and all mentions.
        truncation: `"longest_first"`, `"only_first"` or `"only_second"`.
        stride: None for one row; else so many rows as hold all tokens of the truncated text, sharing `stride` of them.
        max_entities: How many mentions a row takes of those that lie wholly in it.

    Returns:
        The rows, none where truncation cannot make them fit.

    Raises:
        ValueError: the stride is negative, or as long as a window.
    """
    windows = _windows(len(first.ids), len(second.ids), room, truncation, stride)
    inside = [_inside(first, second, window, None if room is None else max_entities, truncation) for window in windows]
    number = len(first.spans)
    indices = [[*ours, *(number + index for index in theirs)] for ours, theirs in inside]
    kept = {index for row in indices for index in row}
    dropped = [index for index in range(number + len(second.spans)) if index not in kept]
    return [
        Row(_part(first, window[0], ours), _part(second, window[1], theirs), row, dropped)
        for window, (ours, theirs), row in zip(windows, inside, indices, strict=True)
    ]


def _windows(first: int, second: int, room: int | None, truncation: str, stride: int | None) -> list[tuple[Span, Span]]:
    """Return which tokens of a text and of its pair each row has."""
    excess = 0 if room is None else first + second - room
    if excess <= 0:
        return [((0, first), (0, second))]
    kept = _shortened(first, second, excess, truncation)
    if kept is None:
        return []
    if stride is None:
        return [((0, kept[0]), (0, kept[1]))]
    if truncation == "only_second":
        return [((0, first), window) for window in _slide(second, kept[1], stride)]
    return [(window, (0, second)) for window in _slide(first, kept[0], stride)]


def _slide(length: int, size: int, stride: int) -> list[Span]:
    if not 0 <= stride < size:
        raise ValueError(f"stride must be at least 0 and less than {size}, the tokens of a window, got {stride}")
    return [(start, min(start + size, length)) for start in range(0, length - stride, size - stride)]


def _shortened(first: int, second: int, excess: int, truncation: str) -> tuple[int, int] | None:
    """Return what truncation leaves of the two lengths, None where what it shortens has no more than the excess."""
    if truncation == "only_first":
        return (first - excess, second) if first > excess else None
    if truncation == "only_second":
        return (first, second - excess) if second > excess else None
    # The longer one down to the other, then both alike; of an odd rest the pair loses one more.
    evened = min(abs(first - second), excess)
    half = (excess - evened) // 2
    rest = excess - evened - half
    return (first - evened - half, second - rest) if first > second else (first - half, second - evened - rest)


def _inside(
    first: Words, second: Words, window: tuple[Span, Span], max_entities: int | None, truncation: str
) -> tuple[list[int], list[int]]:
    """Return which mentions of a text and of its pair lie wholly in a window, as many as it may have."""
    ours, theirs = (
        [index for index, (start, end) in enumerate(words.spans) if begin <= start and end <= stop]
        for words, (begin, stop) in zip((first, second), window, strict=True)
    )
    excess = 0 if max_entities is None else len(ours) + len(theirs) - max_entities
    kept = _shortened(len(ours), len(theirs), excess, truncation) if excess > 0 else None
    return (ours[: kept[0]], theirs[: kept[1]]) if kept else (ours, theirs)


def _part(words: Words, window: Span, indices: list[int]) -> Words:
    begin, stop = window
    return Words(
        words.ids[begin:stop],
        words.offsets[begin:stop],
        [(words.spans[index][0] - begin, words.spans[index][1] - begin) for index in indices],
        [words.entity_ids[index] for index in indices],
    )
