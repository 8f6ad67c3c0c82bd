"""transformers' models on fused attention, in place, against themselves before. Under transformers 4.57 and 5."""

import copy
import pickle
import warnings
from contextlib import nullcontext

import luke_cases
import pytest
import torch
from parity_cases import BOUNDS, BY_NAME, HEADS, assert_close, assert_gradients, encode, pair_of_models, run
from torch import Tensor, nn

import luke_kernels
from luke_kernels import accelerate, restore

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
# Old names that transformers 4 and peft call things by.
OLD_NAMES = pytest.mark.filterwarnings("ignore:.*will be removed in v6:FutureWarning")


def eager_and_fast(name: str, size: str = "tiny", backend: str = "auto", **settings) -> tuple[nn.Module, nn.Module]:
    eager, _ = pair_of_models(name, size, **settings)
    return eager, accelerate(copy.deepcopy(eager), backend)


def small_inputs(padding: str = "right") -> dict[str, Tensor]:
    """A batch drawn at random, all types 0."""
    return {
        name: value.clamp(max=0) if "token_type" in name else value
        for name, value in luke_cases.padded_inputs(padding).items()
    }


def assert_same_where_tokens_exist(got, expected, inputs: dict[str, Tensor], size: str = "tiny") -> None:
    words, entities = inputs["attention_mask"].bool(), inputs["entity_attention_mask"].bool()
    for a, b in (
        (got.last_hidden_state[words], expected.last_hidden_state[words]),
        (got.entity_last_hidden_state[entities], expected.entity_last_hidden_state[entities]),
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=BOUNDS[size])
    assert not got.last_hidden_state[~words].any()
    assert not got.entity_last_hidden_state[~entities].any()


@pytest.mark.parametrize("entity_aware", [True, False])
@pytest.mark.parametrize("size", ["tiny", "mini", "base"])
def test_encoder(size, entity_aware):
    eager, fast = eager_and_fast("LukeModel", size, use_entity_aware_attention=entity_aware)
    batch = encode(None)
    with torch.no_grad():
        assert_close(fast(**batch), eager(**batch), batch, size)
        words = {name: batch[name] for name in ("input_ids", "attention_mask")}
        assert_close(fast(**words), eager(**words), words, size)


@BY_NAME
@pytest.mark.parametrize("size", ["tiny", "mini"])
def test_head(head, size):
    """Outputs at tokens that exist, the loss, and every gradient as exact as eager's."""
    eager, fast = eager_and_fast(head.name, size)
    exact = copy.deepcopy(eager).double()
    batch = encode(head.task)
    labels = head.labels(batch)
    results = {}
    for name, model in (("eager", eager), ("fast", fast), ("exact", exact)):
        results[name] = run(model, head, batch, labels)
        results[name].loss.backward()
    assert_close(results["fast"], results["eager"], batch, size)
    torch.testing.assert_close(results["fast"].loss, results["eager"].loss, rtol=2e-6, atol=0)
    assert_gradients(fast, eager, exact)


@pytest.mark.parametrize("backend", ["cpu", "sdpa", "reference"])
def test_backends(backend):
    eager, fast = eager_and_fast("LukeModel", backend=backend)
    with torch.no_grad():
        assert_close(fast(**encode(None)), eager(**encode(None)), encode(None), "tiny")


@pytest.mark.parametrize("padding", luke_cases.PADDINGS)
def test_masks_of_any_pattern(padding):
    """Where a first column does not exist, heads that read it are warned of."""
    eager, fast = eager_and_fast("LukeModel")
    inputs = small_inputs(padding)
    warns = pytest.warns(match="leaves out the first column") if padding == "left" else nullcontext()
    with torch.no_grad(), warns:
        assert_same_where_tokens_exist(fast(**inputs), eager(**inputs), inputs)


def test_entities_that_begin_later():
    _, fast = eager_and_fast("LukeModel")
    inputs = small_inputs()
    inputs["entity_attention_mask"][0] = torch.tensor([0, 1, 1, 0])
    with pytest.warns(UserWarning, match="leaves out the first column"):
        fast(**inputs)


def test_sequence_without_tokens():
    eager, fast = eager_and_fast("LukeModel")
    inputs = small_inputs()
    inputs["attention_mask"][1], inputs["entity_attention_mask"][1] = 0, 0
    with torch.no_grad():
        assert_same_where_tokens_exist(fast(**inputs), eager(**inputs), inputs)


def test_entities_that_are_all_pads():
    """Their queries get a gradient of zero, as before: none at all would stop DistributedDataParallel."""
    eager, fast = eager_and_fast("LukeModel")
    inputs = small_inputs()
    inputs["entity_attention_mask"].zero_()
    words = inputs["attention_mask"].bool()
    for model in (eager, fast):
        model(**inputs).last_hidden_state[words].sum().backward()
    without = [{n for n, p in model.named_parameters() if p.grad is None} for model in (eager, fast)]
    assert without[0] == without[1]
    assert "encoder.layer.0.attention.self.w2e_query.weight" not in without[0]


@pytest.mark.parametrize("positions", ["plain", "hooked"])
def test_positions_of_mentions(positions):
    eager, fast = eager_and_fast("LukeModel")
    ids = torch.tensor([[5, 6], [7, 8]])
    at = torch.tensor([[[3, 4, -1], [-1, 5, -1]], [[-1, -1, -1], [1, 1, 2]]])
    if positions == "hooked":
        for model in (eager, fast):
            model.entity_embeddings.position_embeddings.register_forward_hook(lambda module, args, output: output * 2)
    got, expected = (model.entity_embeddings(ids, at) for model in (fast, eager))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    types = torch.zeros_like(ids)
    torch.testing.assert_close(fast.entity_embeddings(ids, at, types), expected, rtol=0, atol=1e-6)


def test_options_of_the_position_table():
    """Its padding row gets no gradient, as before."""
    eager, _ = pair_of_models("LukeModel", "tiny")
    eager.entity_embeddings.position_embeddings.padding_idx = 3
    fast = accelerate(copy.deepcopy(eager))
    ids, at = torch.tensor([[5]]), torch.tensor([[[3, 4, -1]]])
    for model in (eager, fast):
        model.entity_embeddings(ids, at).square().sum().backward()
    got, expected = (model.entity_embeddings.position_embeddings.weight.grad for model in (fast, eager))
    assert not expected[3].any()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_no_masks():
    eager, fast = eager_and_fast("LukeModel")
    inputs = {name: value for name, value in small_inputs("none").items() if not name.endswith("mask")}
    with torch.no_grad():
        for got, expected in zip(fast(**inputs, return_dict=False), eager(**inputs, return_dict=False), strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
        inputs.pop("entity_ids"), inputs.pop("entity_position_ids"), inputs.pop("entity_token_type_ids")
        for got, expected in zip(fast(**inputs, return_dict=False), eager(**inputs, return_dict=False), strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_layers_get_tokens_that_exist_and_the_mask_is_read_once(monkeypatch):
    from luke_kernels.integrations import transformers as integration

    _, fast = eager_and_fast("LukeModel")
    inputs, shapes, reads = small_inputs(), [], []
    read_mask = integration._read_mask
    monkeypatch.setattr(integration, "_read_mask", lambda *args: reads.append(args) or read_mask(*args))
    for layer in fast.encoder.layer:
        layer.register_forward_hook(lambda module, args, output: shapes.append(tuple(output[0].shape)))
    fast(**inputs)
    tokens = int(inputs["attention_mask"].sum() + inputs["entity_attention_mask"].sum())
    assert shapes == [(1, tokens, 32)] * 2
    assert len(reads) == 1


@pytest.mark.parametrize("asked", [{"output_attentions": True}, {"output_hidden_states": True}])
def test_attentions_and_hidden_states_are_eager(asked):
    eager, fast = eager_and_fast("LukeModel")
    inputs = small_inputs()
    with torch.no_grad():
        got, expected = (model(**inputs, **asked) for model in (fast, eager))
        plain = fast(**inputs)
    assert_same_where_tokens_exist(got, expected, inputs)
    assert torch.equal(got.last_hidden_state == 0, plain.last_hidden_state == 0)
    names = ["attentions"] if "output_attentions" in asked else ["hidden_states", "entity_hidden_states"]
    for name in names:
        for a, b in zip(got[name], expected[name], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("asked", [{}, {"output_attentions": True}, {"output_hidden_states": True}])
def test_tuples(asked):
    eager, fast = eager_and_fast("LukeModel")
    inputs = small_inputs("none")
    with torch.no_grad():
        got, expected = (model(**inputs, **asked, return_dict=False) for model in (fast, eager))
    assert [isinstance(value, tuple) for value in got] == [isinstance(value, tuple) for value in expected]
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_sequence_without_tokens_beside_hidden_states():
    """transformers' code gives NaN there where the mask is of -inf."""
    _, fast = eager_and_fast("LukeModel")
    words = torch.randn(luke_cases.BATCH, luke_cases.WORDS, 32)
    mask = torch.zeros(luke_cases.BATCH, 1, 1, luke_cases.WORDS)
    mask[1] = -torch.inf
    states = fast.encoder(words, None, attention_mask=mask, output_hidden_states=True).last_hidden_state
    assert not states[1].any()
    assert states[0].all()


def test_answers_beside_attentions():
    """The loss does not depend on what else is asked for."""
    head = next(head for head in HEADS if head.name == "LukeForQuestionAnswering")
    _, fast = eager_and_fast(head.name)
    batch = encode(head.task)
    with torch.no_grad():
        labels = head.labels(batch)
        plain, beside = fast(**batch, **labels), fast(**batch, **labels, output_hidden_states=True)
    torch.testing.assert_close(beside.loss, plain.loss, rtol=2e-6, atol=0)
    assert (plain.start_logits[batch["attention_mask"] == 0] == torch.finfo(torch.float32).min).all()


PAIRS = torch.ones(luke_cases.BATCH, 1, luke_cases.WORDS, luke_cases.WORDS).tril()


@pytest.mark.parametrize("asked", [{}, {"output_attentions": True}])
@pytest.mark.parametrize(
    "mask",
    [
        pytest.param((1 - PAIRS) * torch.finfo(torch.float32).min, id="causal"),
        pytest.param(torch.zeros_like(PAIRS).index_fill(3, torch.tensor([2]), -2.0), id="bias"),
        pytest.param(torch.zeros_like(PAIRS).index_fill(3, torch.tensor([2]), torch.nan), id="nan"),
        pytest.param(torch.zeros_like(PAIRS).expand(-1, 4, -1, -1), id="per head"),
    ],
)
def test_masks_that_are_no_key_masks(mask, asked):
    _, fast = eager_and_fast("LukeModel")
    words = torch.randn(luke_cases.BATCH, luke_cases.WORDS, 32)
    with pytest.raises(ValueError, match=r"attention_mask must say which tokens exist.*restore"):
        fast.encoder(words, None, attention_mask=mask, **asked)


def test_mask_of_keys_in_four_dimensions():
    eager, fast = eager_and_fast("LukeModel")
    words = torch.randn(luke_cases.BATCH, luke_cases.WORDS, 32)
    mask = torch.zeros(1, 1, 1, luke_cases.WORDS)
    mask[..., 3] = -torch.inf
    with torch.no_grad():
        got, expected = (model.encoder(words, None, attention_mask=mask)[0] for model in (fast, eager))
    kept = mask[0, 0, 0] == 0
    torch.testing.assert_close(got[:, kept], expected[:, kept], rtol=0, atol=1e-5)


def test_mask_of_ten_thousand_in_bfloat16():
    """What users write for minus infinity; it is rounded to -9,984 there."""
    _, fast = eager_and_fast("LukeModel")
    fast.bfloat16()
    words = torch.randn(luke_cases.BATCH, luke_cases.WORDS, 32, dtype=torch.bfloat16)
    mask = torch.zeros(1, 1, 1, luke_cases.WORDS, dtype=torch.bfloat16)
    mask[..., -1] = -1e4
    states = fast.encoder(words, None, attention_mask=mask).last_hidden_state
    assert not states[:, -1].any()
    assert states[:, :-1].any(dim=-1).all()


def test_head_mask():
    _, fast = eager_and_fast("LukeModel")
    words = torch.randn(luke_cases.BATCH, luke_cases.WORDS, 32)
    fast.encoder(words, None, head_mask=[None, None])
    with pytest.raises(ValueError, match="head_mask must be None"):
        fast.encoder(words, None, head_mask=[torch.ones(4), None])


@BY_NAME
def test_restore(head):
    eager, fast = eager_and_fast(head.name)
    assert [type(m) for m in fast.modules()] != [type(m) for m in eager.modules()]
    restored = restore(fast)
    assert restored is fast
    assert [type(m) for m in restored.modules()] == [type(m) for m in eager.modules()]
    assert [vars(m).keys() for m in restored.modules()] == [vars(m).keys() for m in eager.modules()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in restored.modules())
    batch = encode(head.task)
    labels = head.labels(batch)
    results = [run(model, head, batch, labels) for model in (restored, eager)]
    for result in results:
        result.loss.backward()
    assert all(
        torch.equal(a, b) for a, b in zip(*(r.to_tuple() for r in results), strict=True) if isinstance(a, Tensor)
    )
    for (name, a), (_, b) in zip(restored.named_parameters(), eager.named_parameters(), strict=True):
        assert (a.grad is None and b.grad is None) or torch.equal(a.grad, b.grad), name
    assert restore(restored) is restored


def test_accelerating_again_sets_the_backend():
    _, fast = eager_and_fast("LukeForQuestionAnswering")
    assert accelerate(fast, "reference") is fast
    assert {m.backend for m in fast.modules() if hasattr(m, "backend")} == {"reference"}
    assert len(fast._forward_pre_hooks) == 1


@BY_NAME
def test_checkpoints_are_transformers_own(head, tmp_path):
    eager, _ = pair_of_models(head.name, "tiny")
    if head.name == "LukeForMaskedLM":
        # transformers 5 saves it apart.
        eager.lm_head.decoder.weight = nn.Parameter(eager.lm_head.decoder.weight.detach().clone())
    fast = accelerate(copy.deepcopy(eager))
    assert all(torch.equal(a, b) for a, b in zip(fast.state_dict().values(), eager.state_dict().values(), strict=True))
    assert list(fast.state_dict()) == list(eager.state_dict())
    fast.save_pretrained(tmp_path / "fast")
    eager.save_pretrained(tmp_path / "eager")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "fast" / name).read_bytes() == (tmp_path / "eager" / name).read_bytes()


def test_copies_and_pickles():
    _, fast = eager_and_fast("LukeForQuestionAnswering")
    batch = encode(None)
    with torch.no_grad():
        expected = fast(**batch).start_logits
        for copied in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
            assert torch.equal(copied(**batch).start_logits, expected)
            del copied.luke.encoder.layer[1]
            assert not torch.equal(copied(**batch).start_logits, expected)


def test_hooks():
    _, fast = eager_and_fast("LukeModel")
    inputs, seen = small_inputs(), []
    with torch.no_grad():
        expected = fast(**inputs).last_hidden_state
        attention = fast.encoder.layer[0].attention.self
        for module in (fast, fast.encoder, fast.encoder.layer[1], attention, attention.w2e_query):
            module.register_forward_hook(lambda module, args, output: seen.append(module))
        assert torch.equal(fast(**inputs).last_hidden_state, expected)
        assert set(seen) == {fast, fast.encoder, fast.encoder.layer[1], attention, attention.w2e_query}
        attention.value.register_forward_hook(lambda module, args, output: output * 2)
        assert not torch.allclose(fast(**inputs).last_hidden_state, expected, atol=1e-3)


@OLD_NAMES
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(use_reentrant):
    """The same gradients, dropout included: what is computed again draws the same numbers."""
    _, fast = eager_and_fast("LukeModel")
    for module in fast.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    inputs = small_inputs()

    def gradients() -> dict[str, Tensor]:
        torch.manual_seed(0)
        fast.zero_grad(set_to_none=True)
        fast(**inputs).last_hidden_state.square().sum().backward()
        return {name: parameter.grad for name, parameter in fast.named_parameters() if parameter.grad is not None}

    fast.train()
    expected, calls = gradients(), []
    fast.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    fast.encoder.layer[0].attention.self.key.register_forward_hook(lambda *_: calls.append(1))
    got = gradients()
    assert len(calls) == 2  # forward and recomputed
    assert got.keys() == expected.keys()
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # of the compiler, on itself
def test_compiled():
    """Batches of other lengths and sizes, with gradients."""
    eager, fast = eager_and_fast("LukeModel")
    compiled = torch.compile(fast, backend="aot_eager")
    for padding in ("right", "none", "right"):
        inputs = small_inputs(padding)
        assert_same_where_tokens_exist(compiled(**inputs), eager(**inputs), inputs)
    compiled(**inputs).last_hidden_state.sum().backward()
    got = fast.encoder.layer[0].attention.self.w2e_query.weight.grad.clone()
    fast.zero_grad()
    fast(**inputs).last_hidden_state.sum().backward()
    torch.testing.assert_close(got, fast.encoder.layer[0].attention.self.w2e_query.weight.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # of the tracer
def test_traces_are_refused():
    _, fast = eager_and_fast("LukeModel")
    inputs = small_inputs()
    with pytest.raises(RuntimeError, match="must not be traced"):
        torch.jit.trace(fast, (inputs["input_ids"], inputs["attention_mask"]), strict=False)


def test_dropout_draws_in_training_only():
    _, fast = eager_and_fast("LukeModel")
    for layer in fast.encoder.layer:
        layer.attention.self.dropout.p = 0.5
    inputs = small_inputs()

    def states() -> Tensor:
        torch.manual_seed(0)
        with torch.no_grad():
            return fast(**inputs).last_hidden_state

    expected = states()
    fast.train()
    assert torch.equal(states(), states())
    assert not torch.allclose(states(), expected, atol=1e-2)
    for layer in fast.encoder.layer:
        layer.attention.self.dropout.eval()
    assert torch.equal(states(), expected)
    fast.eval()
    for layer in fast.encoder.layer:  # Monte Carlo dropout
        layer.attention.self.dropout.train()
    assert not torch.allclose(states(), expected, atol=1e-2)
    for layer in fast.encoder.layer:
        layer.attention.self.dropout = nn.Identity()
    assert torch.equal(accelerate(fast).train()(**inputs).last_hidden_state, expected)


def test_half_precision():
    eager, fast = eager_and_fast("LukeModel")
    inputs = small_inputs()
    words = inputs["attention_mask"].bool()
    with torch.no_grad():
        expected = eager(**inputs).last_hidden_state[words]
        with torch.autocast("cpu", torch.bfloat16):
            cast = fast(**inputs).last_hidden_state[words]
            eager_error = (eager(**inputs).last_hidden_state[words] - expected).abs().max()
        assert 0 < (cast - expected).abs().max() <= 2 * eager_error
        half, eager_half = (model.to(torch.bfloat16)(**inputs).last_hidden_state[words] for model in (fast, eager))
    assert half.dtype == torch.bfloat16
    assert (half.float() - expected).abs().max() <= 2 * (eager_half.float() - expected).abs().max()


class OwnEncoder(nn.Module):
    """A user's model around transformers' encoder."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.text = model
        self.score = nn.Linear(32, 1)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.score(self.text(**inputs).entity_last_hidden_state)


def test_encoder_inside_another_model():
    eager, _ = pair_of_models("LukeModel", "tiny")
    model, inputs = OwnEncoder(eager), small_inputs()
    entities = inputs["entity_attention_mask"].bool()
    with torch.no_grad():
        expected = model(inputs)[entities]
        got = accelerate(model)(inputs)[entities]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert not torch.equal(got, expected)


def test_bad_models():
    eager, _ = pair_of_models("LukeModel", "tiny")
    with pytest.raises(ValueError, match=r"must be or contain a LukeModel of transformers, got torch.*Linear"):
        accelerate(nn.Linear(2, 2))
    with pytest.raises(
        ValueError, match=r"must be or contain a LukeModel of transformers, got luke_kernels\.model\.LukeModel"
    ):
        accelerate(luke_cases.build(luke_kernels.LukeModel))
    with pytest.raises(TypeError, match="model must be a module, one that is loaded, got 'studio-ousia/luke-base'"):
        accelerate("studio-ousia/luke-base")
    with pytest.raises(ValueError, match="backend must be"):
        accelerate(eager, "cuda3")
    eager.hf_device_map = {"encoder.layer.0": "cpu", "encoder.layer.1": "meta"}
    with pytest.raises(ValueError, match="must lie on one device"):
        accelerate(eager)
    del eager.hf_device_map
    with pytest.raises(ValueError, match="must be or contain a LukeModel"):
        restore(nn.Linear(2, 2))


@pytest.mark.parametrize(
    "path", ["encoder", "encoder.layer.1", "encoder.layer.1.attention", "encoder.layer.1.attention.self"]
)
def test_code_that_is_not_transformers_own(path):
    """It would get a packed batch and mix its sequences."""
    eager, _ = pair_of_models("LukeModel", "tiny")
    for model in (copy.deepcopy(eager), eager):
        module = model.get_submodule(path)
        if model is eager:
            module.forward = lambda *args, **kwargs: None
            message = f"accelerated before its forwards are replaced, got one of {type(module).__name__}"
        else:
            module.__class__ = type("Another", (type(module),), {})
            message = "model must have transformers' own Luke.*, got Another"
        with pytest.raises(ValueError, match=message):
            accelerate(model)
        assert not any(type(m).__name__.startswith(("Packed", "Lean")) for m in model.modules())


def test_attention_of_another_kind():
    eager, _ = pair_of_models("LukeModel", "tiny")
    eager.encoder.layer[0].attention.self = nn.Identity()
    with pytest.raises(ValueError, match="own LukeSelfAttention, got Identity"):
        accelerate(eager)
    eager, _ = pair_of_models("LukeModel", "tiny")
    eager.encoder.layer[0].attention.self.dropout = nn.AlphaDropout()
    with pytest.raises(ValueError, match=r"must have nn.Dropout, got AlphaDropout"):
        accelerate(eager)


def test_feed_forward_in_chunks():
    chunked, _ = pair_of_models("LukeModel", "tiny")
    chunked.encoder.layer[1].chunk_size_feed_forward = 2
    with pytest.raises(ValueError, match="chunk_size_feed_forward must be 0"):
        accelerate(chunked)


def test_restore_of_a_class_made_since():
    """As fully_shard makes them."""
    _, fast = eager_and_fast("LukeModel")
    fast.encoder.__class__ = type("FSDPPackedLukeEncoder", (type(fast.encoder),), {})
    with pytest.raises(ValueError, match="must be as accelerate left it, got a FSDPPackedLukeEncoder"):
        restore(fast)


@pytest.mark.parametrize("changes", ["replaced", "peft"])
def test_answers_of_a_head_that_was_replaced(changes):
    inputs = {name: value for name, value in small_inputs().items() if not name.startswith("entity")}
    absent = inputs["attention_mask"] == 0
    _, fast = eager_and_fast("LukeForQuestionAnswering")
    if changes == "replaced":
        fast.qa_outputs = nn.Linear(32, 2)
    else:
        peft = pytest.importorskip("peft", reason="peft is not installed")
        adapters = peft.LoraConfig(target_modules=["query"], modules_to_save=["qa_outputs"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            adapted = peft.get_peft_model(restore(fast), adapters)
        assert (accelerate(adapted)(**inputs).start_logits[absent] < -1e30).all()
        fast = adapted.merge_and_unload()
    for model in (fast, copy.deepcopy(fast)):
        logits = model(**inputs).start_logits
        assert (logits[absent] < -1e30).all()
        assert (logits[~absent] > -1e30).all()
    restored = restore(fast)
    assert (restored(**inputs).start_logits > -1e30).all()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in restored.modules())


# Of training


def trained_losses(model: nn.Module, folder, steps: int, **arguments) -> list[float]:
    """Train with transformers' Trainer on real sentences; return the loss of every step."""
    head = next(head for head in HEADS if head.name == "LukeForEntitySpanClassification")
    examples = []
    torch.manual_seed(0)
    for first in range(0, 64, 8):
        batch = encode(head.task, first, 8)
        examples.append(batch | head.labels(batch))
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(
            output_dir=str(folder),
            max_steps=steps,
            per_device_train_batch_size=1,
            learning_rate=1e-3,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            dataloader_pin_memory=False,
            disable_tqdm=True,
            **arguments,
        ),
        train_dataset=examples,
        data_collator=lambda items: items[0],
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@OLD_NAMES
@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer_gives_the_eager_loss_curve(tmp_path, checkpointing):
    eager, fast = eager_and_fast("LukeForEntitySpanClassification")
    expected = trained_losses(eager, tmp_path, 50)
    got = trained_losses(fast, tmp_path, 50, gradient_checkpointing=checkpointing)
    assert len(got) == len(expected) == 50
    assert expected[-1] < expected[0] - 0.5
    torch.testing.assert_close(torch.tensor(got), torch.tensor(expected), rtol=0, atol=1e-4)


@OLD_NAMES
def test_lora(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    eager, fast = eager_and_fast("LukeForEntitySpanClassification")
    adapters = peft.LoraConfig(r=4, target_modules=["query", "w2e_query", "value"], modules_to_save=["classifier"])
    curves, before = {}, {name: parameter.clone() for name, parameter in fast.named_parameters()}
    for name, model in (("eager", eager), ("fast", fast)):
        torch.manual_seed(0)
        adapted = peft.get_peft_model(model, adapters)
        curves[name] = trained_losses(adapted, tmp_path, 30)
    assert curves["fast"][-1] < curves["fast"][0] - 0.1
    torch.testing.assert_close(torch.tensor(curves["fast"]), torch.tensor(curves["eager"]), rtol=0, atol=1e-4)
    changed = {
        name
        for name, parameter in adapted.named_parameters()
        if "lora_B" in name and parameter.detach().abs().sum() > 0
    }
    assert len(changed) == 2 * 3
    base = dict(adapted.named_parameters())["base_model.model.luke.encoder.layer.0.attention.self.key.weight"]
    assert torch.equal(base, before["luke.encoder.layer.0.attention.self.key.weight"])
    batch = encode("entity_span_classification")
    with torch.no_grad():
        adapted.eval()
        expected = adapted(**batch).logits
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(merged(**batch).logits, expected, rtol=0, atol=1e-4)
    assert any(type(m).__name__ == "PackedLukeEncoder" for m in merged.modules())
