"""Texts to vectors: as of each text alone, in order, read as they are taken; files of them, and their resuming."""

import contextlib
import ctypes
import errno
import fcntl
import functools
import gc
import gzip
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings

import pytest
import torch
from luke_cases import build
from rich.console import Console
from safetensors.torch import load_file, save_file

from luke_kernels import LukeForTokenClassification, LukeModel, LukeTokenizer, encode, vector_files
from luke_kernels.demo import sentences
from luke_kernels.encode import TextVectors
from luke_kernels.ops.backends import cpu_kernels_missing
from luke_kernels.tokenizer import BUNDLED
from luke_kernels.vector_files import JsonLines, Shards, encode_file

TOKENIZER = LukeTokenizer.from_pretrained(BUNDLED)
SIZES = {"vocab_size": len(TOKENIZER), "entity_vocab_size": len(TOKENIZER.entity_vocab), "max_position_embeddings": 60}

SENTENCES = sentences()
# Ragged, one twice, one without spans, one without a word, one title unknown.
TEXTS = [s["text"] for s in SENTENCES[:6]] + [SENTENCES[1]["text"], "It rains.", ""]
SPANS = [[(e["start"], e["end"]) for e in s["entities"]] for s in SENTENCES[:6]] + [[(0, 3), (0, 1)], None, []]
TITLES = [None, *([e["title"] for e in s["entities"]] for s in SENTENCES[1:6]), ["No such title", "[MASK]"], None, []]


def model(cls=LukeModel, **options):
    return build(cls, **{**SIZES, **options})


def alone(luke, text, spans, titles, layer):
    """Words (W, C) and entities (E, C) of one text."""
    inputs = TOKENIZER(text, entity_spans=spans, entities=titles, return_tensors="pt")
    with torch.no_grad():
        outputs = luke(**inputs, output_hidden_states=True)
    none = outputs.last_hidden_state.new_zeros(0, luke.config.hidden_size)
    states = outputs.entity_hidden_states
    return outputs.hidden_states[layer][0], none if states is None else states[layer][0]


@pytest.mark.parametrize("max_tokens", [1, 50, 8192])
@pytest.mark.parametrize("layer", [-3, 0, 1, 2, -1])
def test_equal_to_each_text_alone(max_tokens, layer):
    luke = model()
    results = list(encode(luke, TOKENIZER, TEXTS, SPANS, TITLES, max_tokens=max_tokens, layer=layer))
    assert len(results) == len(TEXTS)
    for result, *given in zip(results, TEXTS, SPANS, TITLES, strict=True):
        words, entities = alone(luke, *given, layer)
        torch.testing.assert_close(result.words, words)
        torch.testing.assert_close(result.entities, entities)
        assert result.entity_span_indices == list(range(len(given[1] or [])))
        assert result.dropped_spans == []


def test_bfloat16():
    exact, luke = model(), model(dtype=torch.bfloat16)
    exact.load_state_dict(luke.state_dict())
    for result, *given in zip(encode(luke, TOKENIZER, TEXTS, SPANS, TITLES), TEXTS, SPANS, TITLES, strict=True):
        assert result.words.dtype == result.entities.dtype == torch.bfloat16
        of_one, truth = (torch.cat(alone(m, *given, -1)).double() for m in (luke, exact))
        error = (torch.cat([result.words, result.entities]).double() - truth).abs().max()
        assert error <= 2 * (of_one - truth).abs().max()


def test_of_a_head_its_encoder_runs():
    head = model(LukeForTokenClassification)
    for ours, its in zip(encode(head, TOKENIZER, TEXTS), encode(head.luke, TOKENIZER, TEXTS), strict=True):
        assert torch.equal(ours.words, its.words)


def test_offsets():
    result = next(encode(model(), TOKENIZER, ["Ada met Zoë."], [[(0, 3), (8, 11)]]))
    assert result.offsets.dtype == torch.int64
    assert result.offsets.shape == (len(result.words), 2)
    spans = result.offsets.tolist()
    assert spans[0] == spans[-1] == [0, 0]
    assert max(end for _, end in spans) == len("Ada met Zoë.")
    assert [spans[1][0], next(end for _, end in spans if end >= 3)] == [0, 3]


def test_batches(monkeypatch):
    """The longest texts first, as many as fit; one that is longer than a batch alone."""
    sizes, run = [], LukeModel.encode

    def spy(self, batch, **options):
        sizes.append((batch.lengths.cu_words.diff() + batch.lengths.cu_entities.diff()).tolist())
        return run(self, batch, **options)

    monkeypatch.setattr(LukeModel, "encode", spy)
    texts = ["Ada" + " met" * number for number in (3, 40, 1, 5, 2, 9)]
    list(encode(model(), TOKENIZER, texts, [None, None, None, None, None, [(0, 3)]], max_tokens=25))
    assert sizes == [[44], [14, 9], [7, 6, 5]]


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_an_inner_layer_costs_no_more_than_it_must(layer):
    luke, calls = model(), []
    for number, module in enumerate(luke.encoder["layer"]):
        module.register_forward_hook(lambda *_, number=number: calls.append(number))
    list(encode(luke, TOKENIZER, ["Ada"], layer=layer))
    assert calls == list(range(layer))


@pytest.mark.parametrize("number", [-1, 3])
def test_layers_that_do_not_exist(number):
    with pytest.raises(ValueError, match=rf"^num_layers must lie in \[0, 2\], got {number}$"):
        model().encode(torch.tensor([[5, 6]]), num_layers=number)


def test_texts_are_read_as_results_are_taken():
    read = []

    def endless():
        for text in itertools.cycle(TEXTS[:6]):
            read.append(text)
            yield text

    results = encode(model(), TOKENIZER, endless(), itertools.cycle(SPANS[:6]), max_tokens=40)
    assert read == []
    for taken in range(1, 40):
        next(results)
        # Two windows, each full with its last text, and a text that was read when it was known that no more are wanted.
        ahead = [len(TOKENIZER(text)["input_ids"]) for text in read[taken:]]
        assert sum(ahead) < 2 * (4 * 40 + max(ahead)) + max(ahead)
    results.close()
    assert len(read) < 80


# How long something is waited for that, unless the code is broken, comes.
PATIENCE_S = 60


@pytest.fixture
def overlapping(monkeypatch):
    """Make each run of the model last until the text that many places further is tokenised; give those of no avail."""
    tokenised, late = {text: threading.Event() for text in TEXTS}, []
    run, tokenise = LukeModel.encode, LukeTokenizer.__call__

    def install(awaited):
        def slow_run(self, batch, **options):
            text = next(awaited, None)
            if text is not None and not tokenised[text].wait(PATIENCE_S):
                late.append(text)
            return run(self, batch, **options)

        monkeypatch.setattr(LukeModel, "encode", slow_run)
        return late

    def spy(self, text, **options):
        encoding = tokenise(self, text, **options)
        tokenised[text].set()
        return encoding

    monkeypatch.setattr(LukeTokenizer, "__call__", spy)
    return install


def test_the_next_texts_are_tokenised_while_the_model_runs(overlapping):
    late = overlapping(iter(TEXTS[1:4]))
    assert len(list(encode(model(), TOKENIZER, TEXTS[:4], max_tokens=1))) == 4
    assert late == []


def test_nothing_is_read_while_a_window_waits():
    """Of windows of a text one is in use and one waits, however long."""
    third = threading.Event()

    def endless():
        yield from TEXTS[:2]
        third.set()
        yield from itertools.repeat(TEXTS[2])

    with contextlib.closing(encode(model(), TOKENIZER, endless(), max_tokens=1)) as results:
        next(results)
        assert not third.wait(0.2)
        next(results)
        assert third.wait(PATIENCE_S)


def readers():
    return [thread for thread in threading.enumerate() if thread.name == "luke_kernels.encode"]


def closed(results):
    results.close()


def exhausted(results):
    assert len(list(itertools.islice(results, 30))) == 30
    with pytest.raises(TypeError, match=r"^text 33: "):
        list(results)


def left_by_an_error(results):
    with pytest.raises(ZeroDivisionError):  # noqa: PT012
        for _ in results:
            1 / 0  # noqa: B018


def interrupted(results):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LukeModel, "encode", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            list(results)


@pytest.mark.parametrize("leave", [closed, exhausted, left_by_an_error, interrupted])
def test_the_thread_ends_with_who_takes(leave):
    texts = itertools.chain(TEXTS[:3] * 11, [None], itertools.cycle(TEXTS))
    results = encode(model(), TOKENIZER, texts, max_tokens=1)
    assert readers() == []
    next(results)
    (reader,) = readers()
    leave(results)
    del results
    assert readers() == []
    assert not reader.is_alive()


def test_a_thread_that_waits_for_texts_is_left(monkeypatch):
    """It takes no further text, though its window is not full."""
    monkeypatch.setattr(sys.modules["luke_kernels.encode"], "STOP_S", 0.05)
    comes, read = threading.Event(), []

    def texts():
        yield "Ada met Charles in London."
        comes.wait()
        for number in range(9):
            read.append(number)
            yield "A"

    assert 2 * len(TOKENIZER("A")["input_ids"]) <= 8 <= len(TOKENIZER("Ada met Charles in London.")["input_ids"])
    results = encode(model(), TOKENIZER, texts(), max_tokens=2)
    next(results)
    (reader,) = readers()
    began = time.monotonic()
    results.close()
    assert time.monotonic() - began < PATIENCE_S
    assert reader.is_alive()
    comes.set()
    reader.join(PATIENCE_S)
    assert not reader.is_alive()
    assert read == [0]


def test_the_garbage_collector_ends_it_in_any_thread():
    """Even in that which reads: what is wrong there, unraisable, is an error of the test."""
    collect, collected = threading.Event(), threading.Event()

    def texts():
        yield "Ada"
        collect.wait(PATIENCE_S)
        gc.collect()
        collected.set()
        yield from itertools.repeat("Bob")

    cycle = [encode(model(), TOKENIZER, texts(), max_tokens=1)]
    cycle.append(cycle)
    next(cycle[0])
    (reader,) = readers()
    gc.disable()
    try:
        del cycle
        collect.set()
        assert collected.wait(PATIENCE_S)
    finally:
        gc.enable()
    reader.join(PATIENCE_S)
    assert not reader.is_alive()


class TextsEnd(BaseException):
    pass


@pytest.mark.parametrize("error", [TextsEnd, ValueError, KeyboardInterrupt, SystemExit])
def test_what_texts_raise_comes_in_its_place(error):
    """As it is, with where it comes from, after the results of the windows before."""

    def texts():
        yield from ("Ada", "Bob")
        raise error("of the texts")

    results = encode(model(), TOKENIZER, texts(), max_tokens=1)
    next(results)
    next(results)
    with pytest.raises(error, match=r"^of the texts$") as caught:
        next(results)
    assert caught.traceback[-1].name == "texts"
    assert list(results) == readers() == []


def test_texts_that_compute(monkeypatch):
    """Texts made by torch, by another model even, while this one runs."""
    luke, other = model(), model()

    def texts(vectors):
        for each in vectors:
            number = torch.matmul(each.words, torch.ones_like(each.words).T).sum()
            yield f"Ada met {int(number * 1000)}."

    written = list(texts(encode(other, TOKENIZER, TEXTS, max_tokens=10)))
    nested = encode(luke, TOKENIZER, texts(encode(other, TOKENIZER, TEXTS, max_tokens=10)), max_tokens=10)
    for ours, its in zip(nested, encode(luke, TOKENIZER, written, max_tokens=10), strict=True):
        assert torch.equal(ours.words, its.words)


def test_results_are_not_taken_in_a_fork():
    """Its thread is not there: an error, where else it would wait without end."""
    results = encode(model(), TOKENIZER, itertools.cycle(TEXTS), max_tokens=1)
    next(results)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of later Pythons: forking with threads
        child = os.fork()
    if child == 0:
        try:
            next(results)
        except RuntimeError as error:
            os._exit(str(error) == "results must be taken in one process, got a fork of it")
        finally:
            os._exit(0)
    deadline = time.monotonic() + PATIENCE_S
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.02)
    assert os.waitstatus_to_exitcode(ended[1]) == 1
    next(results)
    results.close()


@pytest.mark.parametrize(
    ("texts", "max_tokens"),
    [
        ("(f'Ada met {torch.randn(300, 300).mm(torch.randn(300, 300)).norm()}.' for _ in itertools.count())", 1000),
        ("itertools.chain(['Ada'], iter(threading.Event().wait, None))", 1),
    ],
    ids=["at work", "waiting"],
)
def test_the_interpreter_ends_with_results_left(tmp_path, texts, max_tokens):
    """While the thread is at work in torch, where it must not be ended, or waits for a text."""
    script = f"""
import itertools, threading, torch
from luke_kernels import LukeConfig, LukeModel, LukeTokenizer, encode
from luke_kernels.tokenizer import BUNDLED
tokenizer = LukeTokenizer.from_pretrained(BUNDLED)
config = LukeConfig(vocab_size=len(tokenizer), hidden_size=64, num_attention_heads=1, num_hidden_layers=1)
results = encode(LukeModel(config), tokenizer, {texts}, max_tokens={max_tokens})
print(len(next(results).words))
"""
    command = [sys.executable, "-c", script]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=PATIENCE_S, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert int(ended.stdout) > 2


def test_no_texts():
    assert list(encode(model(), TOKENIZER, [])) == []
    assert list(encode(model(), TOKENIZER, iter([]), iter([]), iter([]))) == []


def test_the_model_is_left_as_it_was():
    luke = model(hidden_dropout_prob=0.5).train()
    luke.embeddings.eval()
    modes = [module.training for module in luke.modules()]
    results = encode(luke, TOKENIZER, TEXTS, max_tokens=1)
    first = next(results)
    assert [module.training for module in luke.modules()] == modes
    assert torch.is_grad_enabled()
    rest = list(results)
    luke.eval()
    for ours, its in zip([first, *rest], encode(luke, TOKENIZER, TEXTS, max_tokens=1), strict=True):
        assert torch.equal(ours.words, its.words)
    # Neither inference tensors nor parts of a graph: they may be trained on.
    assert not first.words.requires_grad
    (first.words * torch.ones(1, dtype=first.words.dtype, requires_grad=True)).sum().backward()


def test_the_model_is_left_as_it_was_by_an_error():
    def fail(*_):
        raise RuntimeError("in the model")

    luke = model().train()
    luke.encoder["layer"][0].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="in the model"):
        next(encode(luke, TOKENIZER, TEXTS))
    assert all(module.training for module in luke.modules())


def test_a_tokenizer_of_another_model():
    with pytest.raises(
        ValueError, match=r"^tokenizer must have at most the 99 words of the model .*, got 4002, another model's$"
    ):
        encode(model(vocab_size=99), TOKENIZER, TEXTS)
    luke = model(entity_vocab_size=5)
    assert len(list(encode(luke, TOKENIZER, TEXTS, SPANS))) == len(TEXTS)  # [MASK] it has
    title = max(TOKENIZER.entity_vocab, key=TOKENIZER.entity_vocab.get)
    with pytest.raises(ValueError, match=r"^text 1: entities must have ids below the 5 of the model .*, got 65 from"):
        list(encode(luke, TOKENIZER, ["Ada", "Bob"], [None, [(0, 3)]], [None, [title]]))


def test_results_have_memory_of_their_own():
    for result in encode(model(), TOKENIZER, TEXTS, SPANS):
        for states in (result.words, result.entities):
            assert states.untyped_storage().nbytes() == states.numel() * 8


LONG = "Ada met Charles in London. " * 12


def test_long_texts():
    count = len(TOKENIZER(LONG)["input_ids"])
    assert count > 58
    with pytest.raises(ValueError, match=rf"^text 1: text must have at most 58 tokens.*truncation=True.*got {count}$"):
        list(encode(model(), TOKENIZER, ["Ada", LONG]))


def test_truncation():
    luke = model()
    starts = range(0, len(LONG), 27)
    spans = [*reversed([(start, start + 3) for start in starts]), *[(0, 3)] * 40]
    result, short = encode(luke, TOKENIZER, [LONG, "Ada"], [spans, [(0, 3)] * 40], truncation=True)
    inputs = TOKENIZER(LONG, entity_spans=spans, truncation=True, max_length=58, max_entity_length=99)
    assert len(result.words) == 58
    assert result.entity_span_indices == inputs.entity_span_indices[0]
    assert result.dropped_spans == inputs.dropped_spans[0] != []
    assert len(result.entities) == len(result.entity_span_indices)
    # The vector of each entity is that of its span.
    one = next(encode(luke, TOKENIZER, [LONG], [[spans[result.entity_span_indices[0]]]], truncation=True, layer=0))
    layer_0 = next(encode(luke, TOKENIZER, [LONG], [spans], truncation=True, layer=0))
    torch.testing.assert_close(layer_0.entities[0], one.entities[0])
    # More than the tokenizer's own max_entity_length.
    assert len(short.entities) == 40


def test_iterables_of_several_lengths():
    luke = model()
    with pytest.raises(ValueError, match=r"^entity_spans must have an item for each text, 2, got 1$"):
        encode(luke, TOKENIZER, ["Ada", "Bob"], [None])
    with pytest.raises(ValueError, match=r"^entities must have an item for each text, 1, got 2$"):
        encode(luke, TOKENIZER, ["Ada"], [[(0, 3)]], [["Ada"], ["Bob"]])
    results = encode(luke, TOKENIZER, ["Ada", "Bob"], iter([None]), max_tokens=1)
    with pytest.raises(ValueError, match=r"^entity_spans must have an item for each text, got only 1$"):
        list(results)
    with pytest.raises(ValueError, match=r"^entities must have an item for each text, 1, got more$"):
        list(encode(luke, TOKENIZER, iter(["Ada"]), [[(0, 3)]], itertools.repeat(None)))
    with pytest.raises(ValueError, match=r"^entity_spans must have an item for each text, 1, got more$"):
        list(encode(luke, TOKENIZER, iter(["Ada"]), iter([None, None])))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"texts": "Ada"}, TypeError, "texts must be an iterable with an item for each text, got str"),
        ({"texts": 3}, TypeError, "texts must be an iterable with an item for each text, got int"),
        ({"texts": ["Ada"], "entity_spans": 3}, TypeError, "entity_spans must be an iterable .*, got int"),
        ({"max_tokens": 0}, ValueError, "max_tokens must be positive, got 0"),
        ({"max_tokens": 1.5}, TypeError, "max_tokens must be an int, got 1.5"),
        ({"layer": 3}, ValueError, r"layer must lie in \[-3, 2\] for a model of 2 layers, got 3"),
        ({"layer": -4}, ValueError, "layer must lie in .* got -4"),
        ({"layer": True}, TypeError, "layer must be an int, got True"),
        ({"model": torch.nn.Linear(1, 1)}, TypeError, "model must be one of luke_kernels, .*from_pretrained.*Linear"),
        ({"tokenizer": None}, TypeError, "tokenizer must be a LukeTokenizer of luke_kernels, got .*NoneType"),
    ],
)
def test_arguments_are_checked_at_the_call(arguments, error, message):
    with pytest.raises(error, match=f"^{message}$"):
        encode(**{"model": model(), "tokenizer": TOKENIZER, "texts": ["Ada"], **arguments})


def test_a_model_of_transformers():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.LukeConfig(**model().config.to_dict())
    with pytest.raises(TypeError, match=r"LukeModel.from_pretrained makes .* got transformers\..*\.LukeModel$"):
        encode(transformers.LukeModel(config), TOKENIZER, [])


@pytest.mark.parametrize(
    ("text", "spans", "titles", "error", "message"),
    [
        (["Bob"], None, None, TypeError, "text 1: text must be a str, got list"),
        ("Bob", [(0, 9)], None, ValueError, "text 1: entity_spans must hold spans .*"),
        ("Bob", [(0, 3)], ["Bob", "Ada"], ValueError, "text 1: entities must have a title for each span, 1, got 2"),
        ("Bob", 3, None, TypeError, "text 1: entity_spans must .*"),
    ],
)
def test_errors_name_the_text(text, spans, titles, error, message):
    with pytest.raises(error, match=f"^{message}$"):
        list(encode(model(), TOKENIZER, ["Ada", text], [None, spans], [None, titles]))


@pytest.fixture
def terminal(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(
        sys.modules["luke_kernels.encode"],
        "Console",
        lambda stderr: Console(file=screen, force_terminal=True, width=100),
    )
    return screen


def test_progress(terminal):
    list(encode(model(), TOKENIZER, TEXTS))
    assert f"{len(TEXTS)}/{len(TEXTS)}" in terminal.getvalue()
    assert "texts/s" in terminal.getvalue()
    list(encode(model(), TOKENIZER, iter(TEXTS)))
    assert f"{len(TEXTS)}/?" in terminal.getvalue()


def test_progress_ends_with_who_takes(terminal, capsys):
    before = threading.enumerate()
    results = encode(model(), TOKENIZER, itertools.cycle(TEXTS), max_tokens=1)
    next(results)
    (refreshing,) = (thread for thread in threading.enumerate() if thread not in [*before, *readers()])
    print("from the caller")
    results.close()
    refreshing.join(timeout=10)
    assert not refreshing.is_alive()
    assert capsys.readouterr().out == "from the caller\n"


def test_no_progress(terminal):
    list(encode(model(), TOKENIZER, TEXTS, progress=False))
    assert terminal.getvalue() == ""


def test_no_progress_where_stderr_is_no_terminal(capsys):
    list(encode(model(), TOKENIZER, TEXTS))
    assert capsys.readouterr().err == ""


# Files.


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    model(dtype=torch.float32).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


def lines_of(texts=TEXTS, spans=SPANS, titles=TITLES):
    rows = zip(texts, spans, titles, strict=True)
    return [
        json.dumps(
            {"text": text, "entity_spans": spans, "entities": titles, **({"id": f"№ {n}"} if n % 2 else {}), "x": 1}
        )
        for n, (text, spans, titles) in enumerate(rows)
    ]


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(lines_of()) + "\n", encoding="utf-8")
    return path


def expected(checkpoint, size, dtype=None):
    """What the command gives: it optimises the model where it can."""
    luke = LukeModel.from_pretrained(checkpoint, dtype=dtype)
    if luke.dtype != torch.float64 and cpu_kernels_missing() is None:
        luke.optimize_for_inference()
    for start in range(0, len(TEXTS), size):
        yield from encode(luke, TOKENIZER, *(column[start : start + size] for column in (TEXTS, SPANS, TITLES)))


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
def test_json_lines(checkpoint, texts, tmp_path, dtype):
    output = tmp_path / "made" / "vectors.jsonl"
    encode_file(texts, output, checkpoint, dtype=dtype, shard_size=4)
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    for number, (line, result) in enumerate(zip(lines, expected(checkpoint, 4, dtype), strict=True)):
        for name in ("words", "entities"):
            states = getattr(result, name)
            assert torch.equal(torch.tensor(line[name], dtype=states.dtype).reshape(states.shape), states)
        assert line["offsets"] == result.offsets.tolist()
        assert line["entity_span_indices"] == result.entity_span_indices
        assert line.get("id") == (f"№ {number}" if number % 2 else None)
        assert line["settings"]["layer"] == 2


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_shards(checkpoint, texts, tmp_path, dtype):
    from safetensors import safe_open

    output = tmp_path / "made" / "vectors"
    encode_file(texts, output, checkpoint, dtype=dtype, shard_size=4)
    assert sorted(path.name for path in output.iterdir()) == [f"0000{n}.safetensors" for n in range(3)]
    results = expected(checkpoint, 4, dtype)
    for number, path in enumerate(sorted(output.iterdir())):
        shard = load_file(path)
        with safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()["about"])
        assert about["first_text"] == 4 * number
        assert about["ids"] == [f"№ {n}" if n % 2 else None for n in range(4 * number, min(4 * number + 4, 9))]
        assert path.stat().st_mode & 0o777 == texts.stat().st_mode & 0o777
        words = shard["words"].split(shard["cu_words"].diff().tolist())
        entities = shard["entities"].split(shard["cu_entities"].diff().tolist())
        own = list(itertools.islice(results, 4))
        assert all(torch.equal(a, b.words) for a, b in zip(words, own, strict=True))
        assert all(torch.equal(a, b.entities) for a, b in zip(entities, own, strict=True))
        assert torch.equal(shard["offsets"], torch.cat([result.offsets for result in own]))
        assert shard["entity_span_indices"].tolist() == [i for result in own for i in result.entity_span_indices]
    assert next(results, None) is None


@pytest.mark.parametrize("name", ["vectors.jsonl", "vectors"])
def test_the_next_block_is_tokenised_while_the_model_runs(checkpoint, texts, tmp_path, overlapping, name):
    texts.write_text("\n".join(lines_of()[:6]))
    late = overlapping(iter([TEXTS[2], TEXTS[4]]))
    assert encode_file(texts, tmp_path / name, checkpoint, shard_size=2).texts == 6
    assert late == []
    assert readers() == []


def test_json_lines_go_on_from_anywhere(checkpoint, texts, tmp_path):
    whole, output = tmp_path / "whole.jsonl", tmp_path / "vectors.jsonl"
    encode_file(texts, whole, checkpoint, shard_size=4)
    content = whole.read_bytes()
    ends = [i + 1 for i, byte in enumerate(content) if byte == ord("\n")]
    for cut in [0, 5, 2000, ends[0], ends[1] - 1, ends[3], ends[5], ends[5] + 1, ends[-1] - 1, ends[-1]]:
        output.write_bytes(content[:cut])
        encode_file(texts, output, checkpoint, shard_size=4, resume=True, max_tokens=8192)
        assert output.read_bytes() == content
    output.unlink()
    encode_file(texts, output, checkpoint, shard_size=4, resume=True)
    assert output.read_bytes() == content


def test_shards_go_on_from_anywhere(checkpoint, texts, tmp_path):
    whole = tmp_path / "whole"
    encode_file(texts, whole, checkpoint, shard_size=4)
    content = {path.name: path.read_bytes() for path in whole.iterdir()}
    for kept in range(4):
        output = tmp_path / f"vectors {kept}"
        (output / ".writing").mkdir(parents=True)
        (output / ".writing" / f"0000{kept}.safetensors").write_bytes(b"half of one")
        for name in sorted(content)[:kept]:
            (output / name).write_bytes(content[name])
        encode_file(texts, output, checkpoint, shard_size=4, resume=True)
        assert {path.name: path.read_bytes() for path in output.iterdir()} == content


def test_grown_texts_go_on(checkpoint, texts, tmp_path):
    first, *rest = lines_of()
    short = tmp_path / "short.jsonl"
    short.write_text(first + "\n", encoding="utf-8")
    for output in (tmp_path / "vectors.jsonl", tmp_path / "vectors"):
        encode_file(short, output, checkpoint, shard_size=4)
        encode_file(texts, output, checkpoint, shard_size=4, resume=True)
        with pytest.raises(ValueError, match=r"^texts must have the 9 that output has, got 1$"):
            encode_file(short, output, checkpoint, shard_size=4, resume=True)
    assert len((tmp_path / "vectors.jsonl").read_text().splitlines()) == 1 + len(rest)
    shards = [load_file(path) for path in sorted((tmp_path / "vectors").iterdir())]
    assert [len(shard["cu_words"]) - 1 for shard in shards] == [1, 3, 4, 1]


@pytest.mark.parametrize(("name", "number"), [("vectors.jsonl", signal.SIGKILL), ("vectors", signal.SIGINT)])
def test_killed_and_gone_on(checkpoint, texts, tmp_path, name, number):
    """Killed while it waits for more texts, after two blocks."""
    whole, output = tmp_path / f"whole {name}", tmp_path / name
    encode_file(texts, whole, checkpoint, shard_size=2)
    command = [sys.executable, "-m", "luke_kernels.cli", "encode", "-", output, "--model", checkpoint]
    command += ["--shard-size", "2"]
    pipes = {"stdin": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # Torch's products may differ in their last bit with the number of threads.
    env = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    # What runs in the background of a shell ignores Ctrl-C, and its children with it.
    listens = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, **pipes, cwd=tmp_path, env=env, preexec_fn=listens) as process:
        process.stdin.write("\n".join(lines_of()[:5]) + "\n")
        process.stdin.flush()
        done = (lambda: output.exists() and output.read_bytes().count(b"\n") == 4) if name.endswith(".jsonl") else None
        done = done or (output / "00001.safetensors").exists
        deadline = time.monotonic() + 60
        while not done():
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(number)
        errors = process.communicate()[1]
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert errors == "interrupted; run the same command with --resume to continue\n"
        assert len(list(output.iterdir())) == 2
    encode_file(texts, output, checkpoint, shard_size=2, resume=True)
    assert content_of(output) == content_of(whole)


def content_of(path):
    return path.read_bytes() if path.is_file() else {each.name: each.read_bytes() for each in path.iterdir()}


def test_an_interrupted_line_is_taken_back(tmp_path):
    target = JsonLines(tmp_path / "vectors.jsonl")

    class Interrupted:
        def write(self, rest):
            if len(rest) < 7:
                raise KeyboardInterrupt
            return os.write(file.fileno(), rest[:3])

        def truncate(self, size):
            file.truncate(size)

    with target:
        target._append(b"a whole line\n")
        file, target._file = target._file, Interrupted()
        with pytest.raises(KeyboardInterrupt):
            target._append(b"another line\n")
        target._file = file
        assert target.path.read_bytes() == b"a whole line\n"


@pytest.mark.parametrize("name", ["vectors.jsonl", "vectors"])
def test_what_there_is_is_never_overwritten(checkpoint, texts, tmp_path, name):
    output = tmp_path / name
    encode_file(texts, output, checkpoint)
    content = content_of(output)
    with pytest.raises(ValueError, match=r"^output must be new, or resume .* be set"):
        encode_file(texts, output, checkpoint)
    for change, asked, made in (
        ({"layer": 0}, "layer 0", "layer 2"),
        ({"dtype": torch.bfloat16, "layer": 1}, "layer 1, dtype bfloat16", "layer 2, dtype float32"),
        ({"tokenizer": BUNDLED}, f"tokenizer {BUNDLED}", f"tokenizer {checkpoint}"),
        ({"shard_size": 999}, "shard_size 999", "shard_size 1000"),
    ):
        message = f"^output must have been made with {asked} to be resumed, got {made}$"
        with pytest.raises(ValueError, match=message):
            encode_file(texts, output, checkpoint, resume=True, **change)
    assert content_of(output) == content
    # What changes no vector of a text beyond rounding may change.
    encode_file(texts, output, checkpoint, resume=True, layer=2, truncation=True, max_tokens=9, device="cpu")
    assert content_of(output) == content


@pytest.mark.parametrize("key", ["text", "entity_spans", "entities", "id"])
@pytest.mark.parametrize("from_stdin", [False, True])
def test_other_texts_are_not_gone_on_with(checkpoint, texts, tmp_path, monkeypatch, key, from_stdin):
    """Named are those between which the output tells a difference; nothing is written."""
    outputs = [tmp_path / "vectors.jsonl", tmp_path / "vectors"]
    rows = [json.loads(line) for line in lines_of()]
    texts.write_text("".join(json.dumps(row) + "\n" for row in rows[:7]))
    for output in outputs:
        encode_file(texts, output, checkpoint, shard_size=3)
    before = [content_of(output) for output in outputs]
    rows[4][key] = {"text": rows[4]["text"] + " ", "entity_spans": [], "entities": None, "id": 4}[key]
    texts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for output, which in zip(outputs, (".*, line 5", ".*, line 6, or one of the 2 before it"), strict=True):
        with open(texts, "rb") as file:
            monkeypatch.setattr(sys, "stdin", file)
            with pytest.raises(ValueError, match=rf"^texts must be those that output was made of, got {which}, with"):
                encode_file("-" if from_stdin else texts, output, checkpoint, shard_size=3, resume=True)
    assert [content_of(output) for output in outputs] == before


def test_a_directory_of_other_files_is_left_alone(checkpoint, texts, tmp_path):
    before = content_of(checkpoint)
    for resume in (False, True):
        with pytest.raises(
            ValueError, match=r"^output must be a directory of shards and nothing else, got config.json"
        ):
            encode_file(texts, checkpoint, checkpoint, resume=resume)
    assert content_of(checkpoint) == before
    output = tmp_path / "vectors"
    encode_file(texts, output, checkpoint)
    (output / "0.safetensors").write_bytes(b"mine")
    (output / "00000.safetensors").unlink()
    with pytest.raises(ValueError, match=r"and nothing else, got 0.safetensors in "):
        encode_file(texts, output, checkpoint, resume=True)


@pytest.mark.parametrize("name", ["vectors.jsonl", "vectors"])
def test_counts(checkpoint, texts, tmp_path, name):
    long = [json.dumps({"text": LONG + " ", "entity_spans": [[0, 3], [len(LONG) - 8, len(LONG) - 2]]})]
    texts.write_text("\n".join(lines_of()[:2] + long))
    counts = encode_file(texts, tmp_path / name, checkpoint, shard_size=2, truncation=True)
    results = list(encode(LukeModel.from_pretrained(checkpoint), TOKENIZER, TEXTS[:2], SPANS[:2]))
    words, entities = (sum(len(getattr(each, name)) for each in results) for name in ("words", "entities"))
    assert (counts.texts, counts.words, counts.entities) == (3, words + 58, entities + 1)
    assert (counts.cut, counts.dropped, counts.found) == (1, 1, 0)
    assert counts.seconds > 0
    texts.write_text("\n".join(lines_of()[:2] + long + lines_of()[7:]))
    counts = encode_file(texts, tmp_path / name, checkpoint, shard_size=2, truncation=True, resume=True)
    assert (counts.texts, counts.cut, counts.dropped, counts.found) == (2, 0, 0, 3)


def test_a_text_that_just_fits_is_not_cut(checkpoint, texts, tmp_path):
    fits = "Ada" + " met" * 100
    fits = fits[: len("Ada" + " met" * (58 - len(TOKENIZER("Ada")["input_ids"])))]
    assert len(TOKENIZER(fits)["input_ids"]) == 58
    texts.write_text(json.dumps({"text": fits}) + "\n" + json.dumps({"text": fits + " met"}))
    assert encode_file(texts, tmp_path / "vectors", checkpoint, truncation=True).cut == 1


def test_gzip(checkpoint, tmp_path):
    texts = tmp_path / "texts.jsonl.gz"
    texts.write_bytes(gzip.compress(b'{"text": "Ada"}'))
    with pytest.raises(ValueError, match=rf"^{texts}: must be JSON lines, got gzip: zcat {texts} \| luke-kernels"):
        encode_file(texts, tmp_path / "vectors", checkpoint)


def test_a_folder_without_a_tokenizer(texts, tmp_path):
    model().save_pretrained(tmp_path / "model")
    message = r"^tokenizer \(--tokenizer\) must be given where model has none, got None: .*/model must hold vocab.json"
    with pytest.raises(FileNotFoundError, match=message):
        encode_file(texts, tmp_path / "vectors", tmp_path / "model")
    with pytest.raises(FileNotFoundError, match=r"^/no/tokenizer must be a directory"):
        encode_file(texts, tmp_path / "vectors", tmp_path / "model", "/no/tokenizer")


@pytest.mark.parametrize("content", [b"mine", b'{"text": "mine"}\n', b'{"settings": 1}\nmine\n'])
def test_a_file_of_another_kind_is_left_alone(checkpoint, texts, tmp_path, content):
    output = tmp_path / "vectors.jsonl"
    output.write_bytes(content)
    with pytest.raises(ValueError, match=r"^output must hold lines of vectors only, got b"):
        encode_file(texts, output, checkpoint, resume=True)
    assert output.read_bytes() == content


def test_an_output_that_cannot_be(checkpoint, texts, tmp_path):
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(ValueError, match=r"^output must be a file where it ends in .jsonl, got .*folder.jsonl$"):
        encode_file(texts, tmp_path / "folder.jsonl", checkpoint)
    with pytest.raises(ValueError, match=r"^output must end in .jsonl or be a directory, got the file"):
        encode_file(texts, checkpoint / "config.json", checkpoint)
    for name in ("vectors.json", "vectors.jsonl.gz", "vectors.safetensors"):
        with pytest.raises(ValueError, match=rf"^output must end in .jsonl or be a directory, got .*{name}$"):
            encode_file(texts, tmp_path / name, checkpoint)
    for name in ("vectors", "vectors.jsonl", "folder/vectors"):
        with pytest.raises(ValueError, match=rf"^output must lie in a directory, got {texts}/{name}, and {texts} is a"):
            encode_file(texts, texts / name, checkpoint)
    assert not list(tmp_path.glob("vectors*"))


@pytest.mark.parametrize("name", ["vectors.jsonl", "vectors"])
def test_one_process_at_a_time(checkpoint, texts, tmp_path, monkeypatch, name):
    """Another one holds the output, or wrote to it while the model was loaded."""
    whole, output = tmp_path / f"whole {name}", tmp_path / name
    encode_file(texts, whole, checkpoint, shard_size=4)
    target = JsonLines(output) if name.endswith(".jsonl") else Shards(output)
    # A flock is of an open file, not of a process.
    with target:
        before = content_of(output) if output.is_file() else sorted(output.iterdir())
        with pytest.raises(ValueError, match=rf"^output must be written by one process at a time, got {output}, which"):
            encode_file(texts, output, checkpoint, shard_size=4, resume=True)
        assert before == (content_of(output) if output.is_file() else sorted(output.iterdir()))

    def load(name_or_path):
        monkeypatch.undo()
        encode_file(texts, output, checkpoint, shard_size=4, resume=True)
        return LukeTokenizer.from_pretrained(name_or_path)

    monkeypatch.setattr(LukeTokenizer, "from_pretrained", load)
    with pytest.raises(ValueError, match=r"^output must be written by one process .*, which has changed meanwhile$"):
        encode_file(texts, output, checkpoint, shard_size=4, resume=True)
    assert content_of(output) == content_of(whole)


@pytest.mark.parametrize("name", ["vectors.jsonl", "vectors"])
def test_a_file_system_without_locks(checkpoint, texts, tmp_path, monkeypatch, name):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.warns(UserWarning, match="cannot be protected from a second process: .*No locks available"):
        encode_file(texts, tmp_path / name, checkpoint)


def test_the_vectors_of_a_shard_are_held_once_as_it_is_written(checkpoint, texts, tmp_path, monkeypatch):
    import safetensors.torch

    def spy(*arguments, **options):
        alive.append(sum(type(each) is TextVectors for each in gc.get_objects()))
        save_file(*arguments, **options)

    alive: list[int] = []
    gc.collect()
    before = sum(type(each) is TextVectors for each in gc.get_objects())
    monkeypatch.setattr(safetensors.torch, "save_file", spy)
    encode_file(texts, tmp_path / "vectors", checkpoint)
    assert [number - before for number in alive] == [1]  # the last one


@pytest.mark.parametrize("name", ["vectors.jsonl", "vectors"])
def test_memory_is_given_back_after_each_block(checkpoint, texts, tmp_path, monkeypatch, name):
    given = []
    monkeypatch.setattr(vector_files, "_give_back_memory", lambda: given.append(None))
    encode_file(texts, tmp_path / name, checkpoint, shard_size=4)
    assert len(given) == 3


def test_memory_that_lies_among_what_is_in_use_is_given_back():
    if not hasattr(ctypes.CDLL(None), "malloc_trim"):
        pytest.skip("the C library cannot")

    def resident_bytes():
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    # 64 MiB in pieces below 128 KiB, from where on the system gives each its own.
    pieces = [torch.ones(2**14) for _ in range(2**10)]
    del pieces[::2], pieces[::2], pieces[::2]
    before = resident_bytes()
    vector_files._give_back_memory()
    assert before - resident_bytes() > 2**25
    assert sum(len(piece) for piece in pieces) == 2**21


def test_a_file_by_the_name_of_stdin(checkpoint, texts, tmp_path, monkeypatch):
    """`-` is stdin, also beside a file of that name; `stdin` is a file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "-").write_bytes(b"")
    with open(texts, "rb") as file:
        monkeypatch.setattr(sys, "stdin", file)
        encode_file("-", tmp_path / "vectors.jsonl", checkpoint)
    texts.rename("stdin")
    encode_file("stdin", tmp_path / "again.jsonl", checkpoint)
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "vectors.jsonl").read_bytes() != b""


def test_an_archive_has_no_tokenizer(texts, tmp_path):
    """Refused before it is unpacked."""
    archive = tmp_path / "luke.tar.gz"
    archive.write_bytes(b"not unpacked")
    with pytest.raises(ValueError, match=rf"^tokenizer must be given .* got None for {archive}$"):
        encode_file(texts, tmp_path / "vectors", archive)
    with pytest.raises(ValueError, match=rf"^{archive} must be a whole archive"):
        encode_file(texts, tmp_path / "vectors", archive, BUNDLED)


def test_damaged_shards(checkpoint, texts, tmp_path):
    output = tmp_path / "vectors"
    encode_file(texts, output, checkpoint, shard_size=4)
    (output / "00001.safetensors").rename(output / "mine")
    with pytest.raises(ValueError, match=r"^output must hold all shards from 00000 on, got \[0, 2\]"):
        encode_file(texts, output, checkpoint, shard_size=4, resume=True)
    (output / "mine").rename(output / "00001.safetensors")
    (output / "00002.safetensors").write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"output must hold whole shards of vectors, got .*00002.safetensors: Saf"):
        encode_file(texts, output, checkpoint, shard_size=4, resume=True)
    save_file({}, output / "00002.safetensors", metadata={"about": json.dumps({"settings": {}})})
    with pytest.raises(ValueError, match=r"must hold whole shards .*00002.safetensors: KeyError\('first_text'\)$"):
        encode_file(texts, output, checkpoint, shard_size=4, resume=True)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "must be a JSON object, got '{': .*"),
        ("", "must be a JSON object, got an empty line"),
        ("[1]", "must be a JSON object, got list"),
        ("{}", "text must be a string, got None"),
        ('{"text": 3}', "text must be a string, got 3"),
        (r'{"text": "Ada \ud83d"}', r"text must hold no lone surrogates, got '\\ud83d'"),
        ('{"text": "Ada", "id": 1e999}', "id must hold finite numbers only, got inf"),
        ('{"text": "Ada", "id": [NaN]}', r"id must hold finite numbers only, got \[nan\]"),
    ],
)
def test_malformed_lines(checkpoint, texts, tmp_path, line, message):
    """Found before anything is encoded."""
    texts.write_text("\n".join([*lines_of(), line]) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=rf"^{texts}, line 10: {message}$"):
        encode_file(texts, tmp_path / "vectors", checkpoint)
    assert list(tmp_path.iterdir()) == [texts]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "Bob", "entity_spans": [[0, 4]]}', r"entity_spans must hold spans .* got \(0, 4\)"),
        ('{"text": "Bob", "entity_spans": [[0, 3]], "entities": []}', "entities must have a title .*, 1, got 0"),
        ('{"text": "Bob", "entities": ["Bob"]}', "entity_spans must be given with entities, got None"),
        (json.dumps({"text": LONG}), "text must have at most 58 tokens, .*--truncation.*"),
    ],
)
def test_texts_that_cannot_be_encoded(checkpoint, texts, tmp_path, line, message):
    """The blocks before are there; the text mended, it goes on."""
    output = tmp_path / "vectors"
    texts.write_text("\n".join([*lines_of()[:5], line]) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=rf"^{texts}, line 6: {message}$"):
        encode_file(texts, output, checkpoint, shard_size=4)
    assert [path.name for path in output.iterdir()] == ["00000.safetensors"]
    texts.write_text("\n".join(lines_of()) + "\n", encoding="utf-8")
    encode_file(texts, output, checkpoint, shard_size=4, resume=True)
    encode_file(texts, tmp_path / "whole", checkpoint, shard_size=4)
    assert content_of(output) == content_of(tmp_path / "whole")


def test_json_has_finite_numbers(texts, tmp_path):
    luke = model(dtype=torch.float32)
    with torch.no_grad():
        luke.encoder["layer"][1].output.LayerNorm.bias[0] = torch.inf
    luke.save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="line 1: words must have finite vectors for JSON, got infinite ones or NaN"):
        encode_file(texts, tmp_path / "vectors.jsonl", tmp_path / "model")
    encode_file(texts, tmp_path / "vectors", tmp_path / "model")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"shard_size": 0}, ValueError, "shard_size must be a positive int, got 0"),
        ({"device": "tpu"}, ValueError, "device must be auto, cpu, or cuda where torch sees a GPU, got 'tpu'"),
        ({"texts": "nothing"}, FileNotFoundError, "texts must be a file or -, got nothing, which does not exist"),
        ({"texts": "/"}, ValueError, "texts must be a file or -, got the directory /"),
        ({"layer": 3}, ValueError, "layer must lie in .*"),
        ({"dtype": torch.int64}, ValueError, "dtype must be one of torch.float64, .*, got torch.int64"),
        ({"dtype": torch.float8_e4m3fn}, ValueError, "dtype must be one of .*, got torch.float8_e4m3fn"),
    ],
)
def test_arguments_of_files(checkpoint, texts, tmp_path, arguments, error, message):
    with pytest.raises(error, match=f"^{message}$"):
        encode_file(**{"texts": texts, "output": tmp_path / "vectors", "model": checkpoint, **arguments})
    assert list(tmp_path.iterdir()) == [texts]
