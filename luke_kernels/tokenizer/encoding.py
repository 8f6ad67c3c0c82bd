"""What a tokenizer returns: columns of rows, padded, as lists, arrays or tensors."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


class LukeEncoding(dict[str, Any]):
    """Inputs of LUKE by name, for `model(**encoding)`; also attributes, `encoding.input_ids`.

    Attributes:
        entity_span_indices: For each row, which of the caller's spans its entities are, in order, without padding. The
            spans of a text are numbered from 0, those of its pair continue the numbering.
        dropped_spans: For each row, the spans that truncation left in no row of the same text.
        sequence_ids: For each row and token, 0 for `text` and its markers, 1 for `text_pair`, None for special tokens
            and padding; None altogether without `return_offsets_mapping`.

    All three have one list per row, also for a single text; in what `pad` returns they are None. `pad_token_id` is the
    tokenizer's: `PackedBatch.from_encodings` counts positions by it.
    """

    pad_token_id: int

    entity_span_indices: list[list[int]] | None = None
    dropped_spans: list[list[int]] | None = None
    sequence_ids: list[list[int | None]] | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}") from None

    def to(self, device: torch.device | str) -> "LukeEncoding":
        """Move the tensors to a device, in place, and return the encoding."""
        self.update({key: value.to(device) for key, value in self.items() if isinstance(value, torch.Tensor)})
        return self


def constant(rows: list[list[Any]], value: int) -> list[list[int]]:
    """Return rows of the same lengths that hold one value."""
    return [[value] * len(row) for row in rows]


def pad_columns(
    columns: dict[str, list[Any]],
    fills: Mapping[str, Any],
    ids: str,
    padding: str,
    least: int | None,
    multiple: int | None,
    side: str,
) -> list[int]:
    """Pad the rows of columns, in place.

    Args:
        columns: Rows by name.
        fills: What the columns that are padded are padded with, by name.
        ids: The column whose rows tell the lengths; may be missing.
        padding: `"longest"`, `"max_length"` for at least `least`, or `"do_not_pad"`.
        multiple: The length is rounded up to a multiple of it.
        side: `"right"` or `"left"`.

    Returns:
        By how much each row was padded.
    """
    lengths = [len(row) for row in columns.get(ids, ())]
    if padding == "do_not_pad":
        return [0] * len(lengths)
    size = max([*lengths, least or 0] if padding == "max_length" else lengths, default=0)
    size += -size % (multiple or 1)
    missing = [size - length for length in lengths]
    for key in columns.keys() & fills.keys():
        rows = zip(columns[key], missing, strict=True)
        if side == "right":
            columns[key] = [[*row, *[fills[key]] * number] for row, number in rows]
        else:
            columns[key] = [[*[fills[key]] * number, *row] for row, number in rows]
    return missing


def to_lists(columns: Mapping[str, Any]) -> tuple[dict[str, Any], str | None]:
    """Return columns of arrays or tensors, or of lists of them, as lists; and the kind `input_ids` were of."""
    kinds = {key: _kind(column) for key, column in columns.items()}
    lists = {
        key: column
        if kinds[key] is None
        else [row.tolist() for row in column]
        if isinstance(column, (list, tuple))
        else column.tolist()
        for key, column in columns.items()
    }
    return lists, kinds["input_ids"]


def to_tensors(columns: dict[str, Any], kind: str | None, inner: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Return columns as they are (None), as arrays (`"np"`) or tensors (`"pt"`).

    Args:
        inner: The dimensions of the items of a column, which show in none without items.

    Raises:
        ValueError: rows of a column differ in length.
    """
    if kind is None:
        return columns
    tensors: dict[str, Any] = {}
    for key, column in columns.items():
        try:
            array = np.array(column)
        except ValueError:
            lengths = sorted({len(row) for row in column})
            raise ValueError(
                f"return_tensors must go with padding where rows differ in length, got {key} of lengths {lengths}"
            ) from None
        if array.size == 0:
            array = np.zeros((*array.shape[:1], 0, *inner.get(key, ())), dtype=np.int64)
        if kind == "np":
            tensors[key] = array
        else:
            tensor = torch.from_numpy(array)
            tensors[key] = tensor.to(torch.get_default_dtype()) if tensor.is_floating_point() else tensor
    return tensors


def _kind(column: Any) -> str | None:
    sample = column[0] if isinstance(column, (list, tuple)) and column else column
    return "pt" if isinstance(sample, torch.Tensor) else "np" if isinstance(sample, np.ndarray) else None
