"""Layers as CUDA graphs: batches in buffers of rounded sizes give the numbers of the plain model, graphs are shared.

Without a GPU a function that is run again stands for a graph; tests/test_model_gpu.py captures real ones.
"""

import copy

import pytest
import torch
from luke_cases import build, padded_inputs, words_of

from luke_kernels import LukeForMaskedLM, LukeModel, PackedBatch, graphs
from luke_kernels.graphs import GraphedLayers


@pytest.fixture
def captured(monkeypatch):
    """Let functions stand for graphs; return the buckets they were captured for."""
    found, make = [], graphs._Graph

    class Repeating:
        def __init__(self, device):
            pass

        def capture(self, run):
            result = run()
            return lambda: result.copy_(run()), result

        def wait(self):
            pass

        done = wait

    def keep(bucket, *arguments):
        found.append(bucket)
        return make(bucket, *arguments)

    monkeypatch.setattr(graphs, "Capturing", Repeating)
    monkeypatch.setattr(graphs, "CAPTURE_AT", 1)
    monkeypatch.setattr(graphs, "choose", lambda *_: "triton")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(graphs, "_Graph", keep)
    return found


def graphed(cls, **changes):
    model = build(cls, dtype=torch.float32, **changes)
    model.encoder_model.optimized = GraphedLayers(model.encoder_model.layers)
    return model


def batch_of(word_lengths, entity_lengths):
    rows = [
        {
            "input_ids": torch.randint(3, 99, (words,)).tolist(),
            "entity_ids": torch.randint(0, 10, (entities,)).tolist(),
            "entity_position_ids": [[0]] * entities,
        }
        for words, entities in zip(word_lengths, entity_lengths, strict=True)
    ]
    return PackedBatch.from_encodings(rows, pad_token_id=1)


def plain(model, **inputs):
    return copy.deepcopy(model)(**inputs)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["padded", "packed", "words"])
def test_equal_to_the_plain_model(captured, kind):
    model = graphed(LukeModel)
    assert not copy.deepcopy(model).is_optimized_for_inference
    for padding in ("right", "holes"):
        inputs = padded_inputs(padding)
        given = {"packed": {"input_ids": PackedBatch.from_padded(**inputs)}, "words": words_of(inputs)}.get(
            kind, inputs
        )
        for _ in range(2):
            for a, b in zip(model(**given).to_tuple(), plain(model, **given).to_tuple(), strict=True):
                torch.testing.assert_close(a, b)
    assert captured


@torch.no_grad()
def test_a_graph_serves_many_lengths(captured):
    """And what a larger batch left in its buffers changes nothing."""
    model = graphed(LukeModel)
    for words, entities in (([6, 4, 2], [2, 1, 0]), ([5], [1]), ([1, 1], [0, 3]), ([7, 2, 3, 4], [2, 2, 2, 2])):
        batch = batch_of(words, entities)
        for a, b in zip(model(batch).to_tuple(), plain(model, input_ids=batch).to_tuple(), strict=True):
            torch.testing.assert_close(a, b)
    assert len(captured) == len(set(captured))
    assert {(bucket.words, bucket.entities) for bucket in captured} == {(16, 16)}
    assert {bucket.sequences for bucket in captured} == {1, 2, 4}


@torch.no_grad()
def test_rows_and_new_weights(captured):
    """Heads take the rows they read; graphs read the weights that are there, and refuse others."""
    model, inputs = graphed(LukeForMaskedLM), padded_inputs()
    rows = {"rows_to_compute": torch.tensor([3, 0, 9])}
    encoder = model.encoder_model
    torch.testing.assert_close(encoder(**inputs, **rows)[0], plain(encoder, **inputs, **rows)[0])
    encoder.layers[1].output.dense.weight.mul_(2)
    torch.testing.assert_close(model(**inputs).logits, plain(model, **inputs).logits)
    assert len(captured) == 1
    model.double()
    with pytest.raises(RuntimeError, match="call optimize_for_inference again"):
        model(**inputs)


@torch.no_grad()
def test_the_plain_layers_run_where_graphs_gain_nothing(captured, monkeypatch):
    model, inputs = graphed(LukeModel), padded_inputs()
    states = model(**inputs, output_hidden_states=True)
    torch.testing.assert_close(states.hidden_states, plain(model, **inputs, output_hidden_states=True).hidden_states)
    model.encode(**inputs, num_layers=0)
    monkeypatch.setattr(graphs, "MAX_TOKENS", 3)
    torch.testing.assert_close(model(**inputs)[0], plain(model, **inputs)[0])
    with torch.enable_grad():
        model(**inputs)[0].sum().backward()
    assert not captured


@torch.no_grad()
def test_the_one_not_used_for_longest_goes(captured, monkeypatch):
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 2)
    model = graphed(LukeModel)
    for words in (5, 20, 5, 35, 5, 20):
        model(batch_of([words], [1]))
    assert [bucket.words for bucket in captured] == [16, 32, 48, 32]


@torch.no_grad()
def test_inference_mode_before(captured):
    model, inputs = graphed(LukeModel), padded_inputs()
    with torch.inference_mode():
        model(**inputs)
    torch.testing.assert_close(model(**inputs)[0], plain(model, **inputs)[0])


@torch.no_grad()
def test_results_outlast_later_calls(captured):
    model = graphed(LukeModel)
    batches = batch_of([6, 4], [2, 1]), batch_of([5, 5], [1, 2])
    first, second = (model(batch)[0] for batch in batches)
    assert len(captured) == 1
    torch.testing.assert_close(first, plain(model, input_ids=batches[0])[0])
    torch.testing.assert_close(second, plain(model, input_ids=batches[1])[0])


@torch.no_grad()
def test_sizes_that_come_once_are_not_captured(captured, monkeypatch):
    monkeypatch.setattr(graphs, "CAPTURE_AT", 2)
    model = graphed(LukeModel)
    for words, count in ((5, 0), (20, 0), (5, 1), (5, 1), (20, 2)):
        model(batch_of([words], [1]))
        assert len(captured) == count


@torch.no_grad()
def test_hooked_layers_are_refused(captured):
    model, inputs = graphed(LukeModel), padded_inputs()
    handle = model.layers[0].register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match="hooks must stay as they were"):
        model(**inputs)
    with pytest.raises(ValueError, match=r"layer\.0\. must be without hooks"):
        GraphedLayers(model.layers)
    handle.remove()
    model(**inputs)


@pytest.mark.parametrize("backend", ["auto", "sdpa"])
def test_a_backend_that_waits_is_refused(backend):
    with pytest.raises(
        ValueError, match=r"backend must be triton or cuda to be captured in CUDA graphs, got '(sdpa|cpu)'"
    ):
        GraphedLayers(build(LukeModel, backend=backend).layers)


@pytest.mark.parametrize(
    ("count", "rounded"), [(0, 0), (1, 16), (16, 16), (17, 32), (256, 256), (257, 288), (600, 640)]
)
def test_sizes_are_rounded_up(count, rounded):
    assert graphs._rounded(count) == rounded
