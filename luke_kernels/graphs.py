"""The encoder's layers in inference on a GPU: small batches as CUDA graphs, which launch all kernels at once."""

from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from luke_kernels.ops.backends import choose
from luke_kernels.ops.layout import Layout
from luke_kernels.plain import PlainLayers

# Beyond so many tokens kernels take longer than their launches, and graphs gain nothing.
MAX_TOKENS = 4096
# Graphs share their memory but for inputs and outputs; the one not used for longest goes first.
MAX_GRAPHS = 64
# A capture takes as long as many calls: sizes that come once are not worth it.
CAPTURE_AT = 2
WARM_UP = 2  # calls before the capture, in which kernels are compiled and workspaces taken


class Bucket(NamedTuple):
    """Sizes that a graph was captured for, at least those of the batches it runs on."""

    words: int
    entities: int
    sequences: int
    max_words: int
    max_entities: int
    num_layers: int


class GraphedLayers:
    """Graphs of layers, each captured when the first batch of its size comes.

    Batches are laid into buffers of rounded sizes, whose other rows are in no sequence: a graph serves many lengths.

    Args:
        layers: `model.Layer`s on one GPU, in evaluation mode. Graphs read their weights where they lie.

    Raises:
        ValueError: the attention runs on a backend that waits for the device, or a module is not plain.
    """

    def __init__(self, layers: Sequence[Any]):
        self._plain = PlainLayers(layers, new_values_count=False)
        self.weights = self._plain.weights
        for layer in layers:
            attention = layer.attention["self"]
            weight, head_dim = attention.query.weight, attention.hidden_size // attention.num_heads
            backend = choose(attention.backend, weight.device, weight.dtype, head_dim)
            if backend not in ("triton", "cuda"):
                raise ValueError(f"backend must be triton or cuda to be captured in CUDA graphs, got {backend!r}")
        self.layers = list(layers)
        self._graphs: OrderedDict[Bucket, _Graph] = OrderedDict()
        self._seen: Counter[Bucket] = Counter()
        self._capturing = Capturing(self.weights[0].device)
        self._lock = Lock()

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """A copy of a model, or one that was pickled, has other weights and is not optimized."""
        return type(None), ()

    def check(self) -> None:
        """Refuse weights that lie elsewhere than when graphs were made; new values are read."""
        self._plain.check()

    def choose(self, num_layers: int | None, one_by_one: bool) -> list[Callable[..., Tensor]]:
        """Return what runs the first layers in turn, each as a `model.Layer` is called; as one, unless asked."""
        layers = self.layers[:num_layers]
        return list(layers) if one_by_one or not layers else [partial(self._run, layers)]

    def _run(
        self, layers: list[nn.Module], hidden: Tensor, num_words: int, layout: Layout, rows: Tensor | None = None
    ) -> Tensor:
        if not 0 < len(hidden) <= MAX_TOKENS or torch.cuda.is_current_stream_capturing():
            return _run_layers(layers, hidden, num_words, layout, rows)
        words, entities = _rounded(num_words), _rounded(len(hidden) - num_words)
        longest = min(_power(layout.max_words), words), min(_power(layout.max_entities), entities)
        bucket = Bucket(words, entities, _power(layout.batch_size), *longest, len(layers))
        with self._lock:
            graph = self._graphs.get(bucket)
            if graph is None:
                self._seen[bucket] += 1
                if self._seen[bucket] < CAPTURE_AT:
                    return _run_layers(layers, hidden, num_words, layout, rows)
                if len(self._graphs) == MAX_GRAPHS:
                    self._graphs.popitem(last=False)
                # Buffers made in inference mode could not be written to outside it.
                with torch.inference_mode(False), torch.no_grad():
                    graph = self._graphs[bucket] = _Graph(bucket, layers, hidden, self._capturing)
            self._graphs.move_to_end(bucket)
            # Buffers and memory are shared: a call on another stream must wait for the last one.
            self._capturing.wait()
            result = graph.replay(hidden, num_words, layout)
            self._capturing.done()
        return result if rows is None else result.index_select(0, rows)


class _Graph:
    def __init__(self, bucket: Bucket, layers: list[nn.Module], like: Tensor, capturing: "Capturing"):
        self.bucket = bucket
        self.hidden = like.new_zeros(bucket.words + bucket.entities, like.shape[1])
        # Offsets and lengths of words, then of entities.
        self.places = torch.zeros(4, bucket.sequences, dtype=torch.int32, device=like.device)
        word_offsets, word_lengths, entity_offsets, entity_lengths = self.places
        layout = Layout(
            *(word_offsets, word_lengths, entity_offsets, entity_lengths),
            *(bucket.sequences, bucket.max_words, bucket.max_entities),
            covers_rows=False,
        )
        run = partial(_run_layers, layers, self.hidden, bucket.words, layout)
        self._replay, self.result = capturing.capture(run)

    def replay(self, hidden: Tensor, num_words: int, layout: Layout) -> Tensor:
        """Run on a batch no larger than the bucket; return a copy of its rows."""
        num_entities = len(hidden) - num_words
        places = torch.stack(layout[:4])  # type: ignore[arg-type]
        self.places.zero_()
        self.places[:, : layout.batch_size].copy_(places)
        words, entities = self._parts(self.hidden, num_words, num_entities)
        words.copy_(hidden[:num_words])
        entities.copy_(hidden[num_words:])
        self._replay()
        return torch.cat(self._parts(self.result, num_words, num_entities))

    def _parts(self, buffer: Tensor, num_words: int, num_entities: int) -> tuple[Tensor, Tensor]:
        return buffer[:num_words], buffer[self.bucket.words :][:num_entities]


def _run_layers(
    layers: list[nn.Module], hidden: Tensor, num_words: int, layout: Layout, rows: Tensor | None = None
) -> Tensor:
    for layer in layers[:-1]:
        hidden = layer(hidden, num_words, layout)
    return layers[-1](hidden, num_words, layout, rows)


class Capturing:
    """Captures functions as CUDA graphs, which share their memory, and keeps calls on it apart."""

    def __init__(self, device: torch.device):
        self.device = device
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None
        self._last: torch.cuda.Event | None = None

    def capture(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Return what replays a function, and the result that it fills."""
        device = self.device
        with torch.cuda.device(device):
            if self._stream is None:
                self._stream = torch.cuda.Stream(device)
            graph = torch.cuda.CUDAGraph()
            self._stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(self._stream):
                for _ in range(WARM_UP):
                    run()
            torch.cuda.current_stream(device).wait_stream(self._stream)
            # Other threads, such as those that load data, go on meanwhile.
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                result = run()
        self._pool = graph.pool()
        return graph.replay, result

    def wait(self) -> None:
        """Let the stream wait for what was done before on another."""
        if self._last is not None:
            self._last.wait(torch.cuda.current_stream(self.device))

    def done(self) -> None:
        """Note the end of what is on the stream."""
        self._last = torch.cuda.current_stream(self.device).record_event()


def _rounded(count: int) -> int:
    """Round up to a multiple of an eighth of the power of two below, and of 16: past 128 an eighth too many at most."""
    step = 1 << max((count - 1).bit_length() - 4, 4)
    return -(-count // step) * step


def _power(count: int) -> int:
    """Round up to a power of two: what lies between costs blocks of threads that end at once."""
    return 1 << (count - 1).bit_length() if count else 0
