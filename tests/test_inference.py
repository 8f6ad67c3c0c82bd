"""optimize_for_inference: the numbers of the plain model, its weights untouched, every refusal."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from luke_cases import BATCH, build, padded_inputs, words_of
from torch import nn

from luke_kernels import LukeForEntitySpanClassification, LukeForMaskedLM, LukeModel, PackedBatch
from luke_kernels.ops.backends import cpu_kernels_missing

pytestmark = pytest.mark.skipif(cpu_kernels_missing() is not None, reason=f"{cpu_kernels_missing()}")
SETTINGS = [
    {},
    {"use_entity_aware_attention": False},
    {"hidden_act": "relu"},
    {"hidden_size": 48, "num_attention_heads": 4, "intermediate_size": 130},
]


def states(model, inputs):
    with torch.no_grad():
        output = model(**inputs)
    return [value for value in output.to_tuple() if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("padding", ["right", "holes"])
def test_equal_to_the_plain_model(settings, padding):
    model, inputs = build(LukeModel, dtype=torch.float32, **settings), padded_inputs(padding)
    for given in (inputs, words_of(inputs), {"input_ids": PackedBatch.from_padded(**inputs)}):
        plain = states(model, given)
        assert model.optimize_for_inference() is model
        torch.testing.assert_close(states(model, given), plain, rtol=1e-5, atol=1e-5)
        model.restore_from_inference()
        assert all(map(torch.equal, states(model, given), plain))


def test_bfloat16_within_twice_the_error_of_the_plain_model():
    model, inputs = build(LukeModel, dtype=torch.float32), padded_inputs()
    exact = states(copy.deepcopy(model).double(), inputs)
    plain = states(copy.deepcopy(model).bfloat16(), inputs)
    ours = states(model.optimize_for_inference(dtype=torch.bfloat16), inputs)
    for truth, theirs, got in zip(exact, plain, ours, strict=True):
        assert got.dtype == torch.float32
        assert (got - truth).abs().max() <= 2 * (theirs - truth).abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_int8_is_near_the_plain_model(dtype):
    model, inputs = build(LukeModel, dtype=torch.float32), padded_inputs()
    plain = states(model, inputs)
    for got, expected in zip(
        states(model.optimize_for_inference(dtype=dtype, weight_dtype=torch.int8), inputs), plain, strict=True
    ):
        error = ((got - expected).norm() / expected.norm()).item()
        assert 1e-4 < error < 0.05
    assert all(map(torch.equal, states(model.restore_from_inference(), inputs), plain))


def test_other_dtypes_of_weights_are_refused():
    model = build(LukeModel, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"weight_dtype must be torch\.int8 or None, got torch\.int4"):
        model.optimize_for_inference(weight_dtype=torch.int4)
    with pytest.raises(
        TypeError, match=r"weight must be float32 or bfloat16 to be rounded to int8, got torch\.float16"
    ):
        model.optimize_for_inference(dtype=torch.float16, weight_dtype=torch.int8)
    assert not model.is_optimized_for_inference


def test_hidden_states_are_those_of_the_plain_model():
    model, inputs = build(LukeModel, dtype=torch.float32), padded_inputs()
    with torch.no_grad():
        plain = model(**inputs, output_hidden_states=True)
        ours = model.optimize_for_inference()(**inputs, output_hidden_states=True)
    torch.testing.assert_close(ours.hidden_states, plain.hidden_states, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.entity_hidden_states, plain.entity_hidden_states, rtol=1e-5, atol=1e-5)


def test_of_a_head_with_rows():
    model, inputs = build(LukeForMaskedLM, dtype=torch.float32), padded_inputs()
    plain = states(model, inputs)
    torch.testing.assert_close(states(model.optimize_for_inference(), inputs), plain, rtol=1e-5, atol=1e-5)


def test_round_trip_and_training():
    """Weights stay bit for bit, gradients are those of the plain model, and the packed layers are not run for them."""
    model, inputs = build(LukeModel, dtype=torch.float32), padded_inputs()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.optimize_for_inference()
    assert model.is_optimized_for_inference
    assert not model.training
    assert model.state_dict().keys() == before.keys()
    model(**inputs).last_hidden_state.sum().backward()
    assert model.encoder["layer"][0].output.dense.weight.grad.any()
    model.restore_from_inference()
    assert not model.is_optimized_for_inference
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("change", ["in place", "moved", "assigned", "parameter", "module"])
def test_new_weights_are_refused_until_optimized_again(change):
    model, inputs = build(LukeModel, dtype=torch.float32).optimize_for_inference(), padded_inputs()
    if change == "in place":
        with torch.no_grad():
            model.encoder["layer"][1].output.dense.weight.mul_(2)
    elif change == "moved":
        model.double().float()
    elif change == "assigned":
        model.load_state_dict({name: 1.01 * value for name, value in model.state_dict().items()}, assign=True)
    elif change == "parameter":
        layer = model.encoder["layer"][0].output
        layer.dense.weight = nn.Parameter(2 * layer.dense.weight.detach())
    else:
        model.encoder["layer"][0].intermediate["dense"] = nn.Linear(
            *reversed(model.layers[0].intermediate["dense"].weight.shape)
        )
    with torch.no_grad(), pytest.raises(RuntimeError, match="call optimize_for_inference again"):
        model(**inputs)
    torch.testing.assert_close(
        states(model.optimize_for_inference(), inputs),
        states(copy.deepcopy(model).restore_from_inference(), inputs),
        rtol=1e-5,
        atol=1e-5,
    )


def test_layers_are_trained_where_embeddings_are_not():
    model, inputs = build(LukeModel, dtype=torch.float32).optimize_for_inference(), padded_inputs()
    model.embeddings.requires_grad_(False)
    model.entity_embeddings.requires_grad_(False)
    model(**inputs)[0].sum().backward()
    assert model.layers[0].output.dense.weight.grad.any()


def test_results_outlast_later_calls_and_threads_share_nothing():
    model = build(LukeModel, dtype=torch.float32).optimize_for_inference()
    batches = [PackedBatch.from_padded(**padded_inputs(padding)) for padding in ("right", "holes", "none")] * 8
    alone = [states(model, {"input_ids": batch}) for batch in batches]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda batch: states(model, {"input_ids": batch}), batches))
    for kept, found, batch in zip(alone, together, batches, strict=True):
        fresh = states(model, {"input_ids": batch})
        assert all(map(torch.equal, kept, fresh))
        assert all(map(torch.equal, found, fresh))


def test_another_default_device():
    model, inputs = build(LukeModel, dtype=torch.float32), padded_inputs()
    plain = states(model, inputs)
    for options in ({}, {"weight_dtype": torch.int8}):
        with torch.device("meta"):
            model.optimize_for_inference(**options)
        batch = PackedBatch.from_padded(**inputs)
        with torch.device("meta"):
            found = model.encode(batch, num_layers=2)
        assert found.words.device.type == "cpu"
        torch.testing.assert_close(batch.pad_words(found.words), plain[0], rtol=0.2, atol=0.2)


def test_copies_are_not_optimized():
    model, inputs = build(LukeModel, dtype=torch.float32).optimize_for_inference(), padded_inputs()
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not copied.is_optimized_for_inference
        torch.testing.assert_close(states(copied, inputs), states(model, inputs), rtol=1e-5, atol=1e-5)
    assert model.is_optimized_for_inference


def test_packed_layers_run(monkeypatch):
    """A test of equality would pass without them."""
    model, inputs = build(LukeModel, dtype=torch.float32).optimize_for_inference(), padded_inputs()
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: x.new_zeros(*x.shape[:-1], self.out_features))
    with_embeddings_wrong = states(model, inputs)
    assert all(value.any() for value in with_embeddings_wrong[:1])
    model.restore_from_inference()
    assert not torch.equal(states(model, inputs)[0], with_embeddings_wrong[0])


def test_hooks_and_others_are_refused():
    model = build(LukeForEntitySpanClassification, dtype=torch.float32)
    handle = model.luke.encoder["layer"][1].output.dense.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"layer\.1\.output\.dense must be a plain Linear without hooks"):
        model.optimize_for_inference()
    handle.remove()
    assert not model.is_optimized_for_inference
    with pytest.raises(
        TypeError, match=r"dtype must be float32, bfloat16 or float16 for inference, got torch\.float64"
    ):
        model.double().optimize_for_inference()
    with pytest.raises(ValueError, match="device must be cpu to be optimized for inference, got meta"):
        model.float().to("meta").optimize_for_inference()


def test_batches_of_no_tokens():
    model = build(LukeModel, dtype=torch.float32).optimize_for_inference()
    inputs = words_of(padded_inputs())
    inputs["attention_mask"] = torch.zeros_like(inputs["attention_mask"])
    assert states(model, inputs)[0].shape[0] == BATCH
    assert not states(model, inputs)[0].any()
