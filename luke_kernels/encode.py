"""Texts -> vectors of their words and entities, in order, in packed batches of texts of similar length.

A thread reads and tokenises the next texts while the model runs on those before.
"""

import atexit
import math
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, pairwise, zip_longest
from queue import SimpleQueue
from threading import Event, Thread, current_thread
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TimeRemainingColumn
from rich.text import Text as Line
from torch import Tensor, nn

from luke_kernels.model import LukePreTrainedModel
from luke_kernels.packing import PackedBatch
from luke_kernels.tokenizer import LukeEncoding, LukeTokenizer

# Batches read ahead, so that texts of similar length go together: sdpa gains by it, the other backends lose nothing.
WINDOW_BATCHES = 4

# How long the thread that reads texts is waited for when no more are wanted: longer than a text takes to be tokenised.
# One that waits itself, for a pipe that is silent, say, is left to end with its text.
STOP_S = 1.0

Item = TypeVar("Item")

_END: Any = object()


class Text(NamedTuple):
    """A text to encode, as `LukeTokenizer` takes it; errors name it by `name`."""

    name: str
    text: str
    entity_spans: Any = None
    entities: Any = None


@dataclass(frozen=True, eq=False)
class TextVectors:
    """The vectors of a text: W words, E entities, of size C. Tensors are on the CPU and share no memory.

    Attributes:
        words: In the model's dtype, (W, C), special tokens included.
        entities: (E, C).
        offsets: The characters of each word in the text, int64 (W, 2), end excluded; (0, 0) for special tokens and
            markers.
        entity_span_indices: Which of the given spans each entity is, E of them, ascending.
        dropped_spans: The given spans that truncation dropped.
    """

    words: Tensor
    entities: Tensor
    offsets: Tensor
    entity_span_indices: list[int]
    dropped_spans: list[int]


def encode(
    model: LukePreTrainedModel,
    tokenizer: LukeTokenizer,
    texts: Iterable[str],
    entity_spans: Iterable[Any] | None = None,
    entities: Iterable[Any] | None = None,
    *,
    max_tokens: int = 8192,
    layer: int = -1,
    progress: bool = True,
    truncation: bool = False,
) -> Iterator[TextVectors]:
    """Encode texts: hidden states of their words and entities, equal up to rounding to those of each text alone.

    Texts are read as results are taken: it reads a window of texts, until it has 4 * `max_tokens` tokens, sorts them by
    length and packs them into batches. While the model runs on one window, a thread reads and tokenises the next one,
    and no further.

    Args:
        model: Any model of this package; its encoder runs in evaluation mode, without gradients, and is left as it was.
        tokenizer: The model's tokenizer.
        texts: Any iterable, including an endless one. It and the next two are read in a thread of their own.
        entity_spans: For each text its pairs (start, end) of characters, end excluded, or None.
        entities: For each text a title for each span, or None: [MASK].
        max_tokens: Most words and entities of a batch; a longer text makes a batch of its own.
        layer: The layer whose output is returned: 0 for the embeddings, up to num_hidden_layers; or from the end, -1
            for the last.
        progress: Whether to show a progress bar on stderr, if that is a terminal.
        truncation: Whether to cut texts longer than the model takes, and drop entities not wholly in what is left.

    Returns:
        `TextVectors` for each text, in order.

    Raises:
        ValueError, TypeError: at the call, an argument breaks its rule; while results are taken, a text is too long or
            refused by the tokenizer (it is named by its number from 0), or the iterables differ in length. What an
            iterable raises is raised too. Results of the windows before come first.
    """
    encoder = TextEncoder(model, tokenizer, max_tokens=max_tokens, layer=layer, truncation=truncation)
    columns: dict[str, Iterable[Any]] = {"texts": texts}
    columns |= {"entity_spans": entity_spans} if entity_spans is not None else {}
    columns |= {"entities": entities} if entities is not None else {}
    for name, column in columns.items():
        if isinstance(column, str) or not isinstance(column, Iterable):
            raise TypeError(f"{name} must be an iterable with an item for each text, got {type(column).__name__}")
        if isinstance(column, Sized) and isinstance(texts, Sized) and len(column) != len(texts):
            raise ValueError(f"{name} must have an item for each text, {len(texts)}, got {len(column)}")

    def results() -> Iterator[TextVectors]:
        with text_progress(len(texts) if isinstance(texts, Sized) else None, shown=progress) as advance:
            yield from encoder.encode(_in_step(columns), advance)

    return results()


def _in_step(columns: dict[str, Iterable[Any]]) -> Iterator[Text]:
    for number, items in enumerate(zip_longest(*columns.values(), fillvalue=_END)):
        row = dict(zip(columns, items, strict=True))
        for name, item in row.items():
            if item is _END and row["texts"] is not _END:
                raise ValueError(f"{name} must have an item for each text, got only {number}")
            if item is not _END and row["texts"] is _END:
                raise ValueError(f"{name} must have an item for each text, {number}, got more")
        yield Text(f"text {number}", row["texts"], row.get("entity_spans"), row.get("entities"))


class TextEncoder:
    """What `encode` does, for texts with names; arguments as there."""

    def __init__(
        self,
        model: LukePreTrainedModel,
        tokenizer: LukeTokenizer,
        *,
        max_tokens: int = 8192,
        layer: int = -1,
        truncation: bool = False,
    ):
        if not isinstance(model, LukePreTrainedModel):
            raise TypeError(
                "model must be one of luke_kernels, which LukeModel.from_pretrained makes of any checkpoint of LUKE, "
                f"got {type(model).__module__}.{type(model).__name__}"
            )
        if not isinstance(tokenizer, LukeTokenizer):
            raise TypeError(
                "tokenizer must be a LukeTokenizer of luke_kernels, "
                f"got {type(tokenizer).__module__}.{type(tokenizer).__name__}"
            )
        config = model.config
        if len(tokenizer) > config.vocab_size:
            raise ValueError(
                f"tokenizer must have at most the {config.vocab_size} words of the model (vocab_size), "
                f"got {len(tokenizer)}, another model's"
            )
        for name, value in (("max_tokens", max_tokens), ("layer", layer)):
            if type(value) is not int:
                raise TypeError(f"{name} must be an int, got {value!r}")
        if max_tokens < 1:
            raise ValueError(f"max_tokens must be positive, got {max_tokens}")
        last = config.num_hidden_layers
        if not -last - 1 <= layer <= last:
            raise ValueError(f"layer must lie in [{-last - 1}, {last}] for a model of {last} layers, got {layer}")
        self.model, self.tokenizer = model.encoder_model, tokenizer
        self.max_tokens, self.truncation = max_tokens, truncation
        self.layer = layer if layer >= 0 else last + 1 + layer

    def encode(
        self, texts: Iterable[Text], advance: Callable[[int], None], block_size: int | None = None
    ) -> Generator[TextVectors, None, None]:
        """Yield the vectors of texts in order; `advance` is called with the number of texts of each batch.

        Where `block_size` is given, no batch holds texts of two blocks of so many texts.
        """
        stopped = Event()
        with _made_ahead(self._windows(texts, block_size, stopped), stopped) as windows:
            for window in windows:
                vectors: dict[int, TextVectors] = {}
                for batch, results in self._run(window):
                    vectors |= zip(batch.indices, results, strict=True)
                    advance(len(batch.indices))
                for index in range(len(vectors)):
                    yield vectors.pop(index)

    def _windows(self, texts: Iterable[Text], block_size: int | None, stopped: Event) -> Iterator[list["_Batch"]]:
        window: list[LukeEncoding] = []
        num_tokens = 0
        for number, text in enumerate(texts, 1):
            if stopped.is_set():
                return
            window.append(self._tokenize(text))
            num_tokens += _num_tokens(window[-1])
            if num_tokens >= WINDOW_BATCHES * self.max_tokens or (block_size and number % block_size == 0):
                batches, window, num_tokens = list(self._batches(window)), [], 0
                yield batches
        if window:
            yield list(self._batches(window))

    def _tokenize(self, text: Text) -> LukeEncoding:
        limit = self.model.config.max_words
        if not isinstance(text.text, str):
            raise TypeError(f"{text.name}: text must be a str, got {type(text.text).__name__}")
        try:
            encoding = self.tokenizer(
                text.text,
                entity_spans=text.entity_spans,
                entities=text.entities,
                truncation=self.truncation,
                max_length=limit,
                max_entity_length=2**31,  # all that are whole: the model takes any number
                return_attention_mask=False,
                return_offsets_mapping=True,
            )
        except TypeError as error:
            raise TypeError(f"{text.name}: {error}") from error
        except ValueError as error:
            raise ValueError(f"{text.name}: {error}") from error
        if len(encoding["input_ids"]) > limit:
            raise ValueError(
                f"{text.name}: text must have at most {limit} tokens, those of the model, or be cut with "
                f"truncation=True (--truncation), got {len(encoding['input_ids'])}"
            )
        entities = self.model.config.entity_vocab_size
        largest = max(encoding.get("entity_ids", ()), default=-1)
        if largest >= entities:
            raise ValueError(
                f"{text.name}: entities must have ids below the {entities} of the model (entity_vocab_size), "
                f"got {largest} from the tokenizer, which is another model's"
            )
        return encoding

    def _batches(self, window: list[LukeEncoding]) -> Iterator["_Batch"]:
        """Pack encodings of similar length, the longest first: what takes too much memory fails at once."""
        sizes = [_num_tokens(encoding) for encoding in window]
        batch: list[int] = []
        num_tokens = 0
        for index in sorted(range(len(window)), key=sizes.__getitem__, reverse=True):
            if batch and num_tokens + sizes[index] > self.max_tokens:
                yield _pack(window, batch)
                batch, num_tokens = [], 0
            batch.append(index)
            num_tokens += sizes[index]
        yield _pack(window, batch)

    def _run(self, window: list["_Batch"]) -> Iterator[tuple["_Batch", Iterator[TextVectors]]]:
        # In pairs, so that each batch is launched before the one before is waited for: a GPU is kept busy.
        for (batch, states, copied), _ in pairwise(chain(map(self._launch, window), (_END,))):
            if copied is not None:
                copied.synchronize()
            yield batch, _vectors(batch, states)

    def _launch(self, batch: "_Batch") -> tuple["_Batch", list[Tensor], torch.cuda.Event | None]:
        """Run the model on a batch; return it, its states on the CPU, and the event after which they are there."""
        device = self.model.device
        on_gpu = device.type == "cuda"
        with torch.no_grad(), _evaluating(self.model):
            encoded = self.model.encode(
                batch.packed.to(device, non_blocking=on_gpu),
                num_layers=self.layer,
                output_attentions=False,
                output_hidden_states=False,
            )
        # From a GPU into page-locked memory, which torch takes for what does not block.
        states = [states.to("cpu", non_blocking=on_gpu) for states in (encoded.words, encoded.entities)]
        return batch, states, torch.cuda.current_stream(device).record_event() if on_gpu else None


class _Batch(NamedTuple):
    """Texts of a window that go together: their places in it, and what stands beside the states in their vectors."""

    indices: list[int]
    packed: PackedBatch
    offsets: list[Tensor]
    entity_span_indices: list[list[int]]
    dropped_spans: list[list[int]]


def _pack(window: list[LukeEncoding], indices: list[int]) -> _Batch:
    encodings = [window[index] for index in indices]
    return _Batch(
        indices,
        PackedBatch.from_encodings(encodings),
        # Through numpy, which takes a third of torch's time for lists.
        [torch.from_numpy(np.array(encoding["offset_mapping"], dtype=np.int64)) for encoding in encodings],
        [spans for encoding in encodings for spans in encoding.entity_span_indices or ()],
        [spans for encoding in encodings for spans in encoding.dropped_spans or ()],
    )


def _vectors(batch: _Batch, states: list[Tensor]) -> Iterator[TextVectors]:
    lengths = batch.packed.lengths
    cumulative = (lengths.cu_words, lengths.cu_entities)
    parts = (of_kind.split(cu.diff().tolist()) for of_kind, cu in zip(states, cumulative, strict=True))
    # Clones: one text's vectors do not keep those of the batch.
    for words, entities, *about in zip(
        *parts, batch.offsets, batch.entity_span_indices, batch.dropped_spans, strict=True
    ):
        yield TextVectors(words.clone(), entities.clone(), *about)


@contextmanager
def _made_ahead(items: Iterator[Item], stopped: Event) -> Iterator[Iterator[Item]]:
    """Give the items of an iterator, each made in a thread while the one before is in use.

    At the end, whatever ends it, `stopped` is set, which the iterator must heed.
    """
    asked: SimpleQueue[bool] = SimpleQueue()
    made: SimpleQueue[tuple[Item, BaseException | None]] = SimpleQueue()
    process = os.getpid()

    def make() -> None:
        while asked.get():
            try:
                made.put((next(items, _END), None))
            except BaseException as error:  # the caller's, of whatever kind
                made.put((_END, error))

    def take() -> Iterator[Item]:
        while True:
            if os.getpid() != process:  # the thread is not in a fork: it would be waited for without end
                raise RuntimeError("results must be taken in one process, got a fork of it")
            item, error = made.get()
            if error is not None:
                try:
                    raise error
                finally:
                    del error  # which refers to this frame, and so to itself
            if item is _END:
                return
            asked.put(True)
            yield item

    def stop() -> None:
        stopped.set()
        asked.put(False)
        # The garbage collector may end a generator in any thread.
        if thread is not current_thread():
            thread.join(STOP_S)

    # A daemon: one that waits for texts must not keep the interpreter from its end.
    thread = Thread(target=make, name="luke_kernels.encode", daemon=True)
    thread.start()
    try:
        # One that runs code of others must have ended before it, or the interpreter ends with an abort.
        atexit.register(stop)
        asked.put(True)
        yield take()
    finally:
        atexit.unregister(stop)
        stop()


def _num_tokens(encoding: LukeEncoding) -> int:
    return len(encoding["input_ids"]) + len(encoding.get("entity_ids", ()))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def choose_device(name: str) -> torch.device:
    """Return the device of a name: cpu, cuda, or auto for the GPU where torch sees one.

    Raises:
        ValueError: another name is given, or cuda where torch sees no GPU.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    elif name != "cpu" and not (name == "cuda" and torch.cuda.is_available()):
        raise ValueError(f"device must be auto, cpu, or cuda where torch sees a GPU, got {name!r}")
    return torch.device(name)


@contextmanager
def text_progress(total: int | None, done: int = 0, *, shown: bool = True) -> Iterator[Callable[[int], None]]:
    """Show texts done, their rate and the time left on stderr if that is a terminal; give what advances the bar."""
    console = Console(stderr=True)
    bar = Progress(
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(),
        console=console,
        disable=not (shown and console.is_terminal),
        # Batches of long texts take many times as long as those of short ones: their overall mean is the best guess.
        speed_estimate_period=math.inf,
        # What the caller prints meanwhile is left alone.
        redirect_stdout=False,
        redirect_stderr=False,
    )
    with bar:
        task = bar.add_task("", total=total, completed=done)
        bar.advance(task, 0)  # when it began: a rate after the first batch
        yield lambda number: bar.advance(task, number)


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Line:
        speed = task.finished_speed or task.speed
        return Line("" if speed is None else f"{speed:.1f} texts/s")
