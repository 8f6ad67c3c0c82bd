"""transformers' models on fused attention, in place, against themselves before. Under transformers 4.57 and 5."""

import copy
import pickle

import luke_cases
import pytest
import torch
from parity_cases import BOUNDS, BY_NAME, HEADS, assert_close, assert_gradients, encode, pair_of_models, run
from torch import Tensor, nn

import luke_kernels
from luke_kernels import accelerate, restore

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytestmark = luke_cases.NEEDS_DATA

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
    eager, fast = eager_and_fast("LukeModel")
    inputs = small_inputs(padding)
    with torch.no_grad():
        assert_same_where_tokens_exist(fast(**inputs), eager(**inputs), inputs)


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


def test_no_masks_and_tuples():
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


@pytest.mark.parametrize("return_dict", [True, False])
@pytest.mark.parametrize("asked", [{"output_attentions": True}, {"output_hidden_states": True}])
def test_attentions_and_hidden_states_are_eager(asked, return_dict):
    eager, fast = eager_and_fast("LukeModel")
    inputs = small_inputs()
    with torch.no_grad():
        got, expected = (model(**inputs, **asked, return_dict=return_dict) for model in (fast, eager))
        plain = fast(**inputs)
    if not return_dict:
        assert len(got) == len(expected)
        return
    assert_same_where_tokens_exist(got, expected, inputs)
    assert torch.equal(got.last_hidden_state == 0, plain.last_hidden_state == 0)
    names = ["attentions"] if "output_attentions" in asked else ["hidden_states", "entity_hidden_states"]
    for name in names:
        for a, b in zip(got[name], expected[name], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


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
    assert not any(m._forward_hooks for m in restored.modules())
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
    assert len(fast.qa_outputs._forward_hooks) == 1


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
    head = HEADS[3]
    _, fast = eager_and_fast(head.name)
    batch = encode(head.task)
    labels = head.labels(batch)
    fast.train()
    run(fast, head, batch, labels).loss.backward()
    expected = {name: copy.copy(parameter.grad) for name, parameter in fast.named_parameters()}
    fast.zero_grad(set_to_none=True)
    calls = []
    fast.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    fast.luke.encoder.layer[0].attention.self.key.register_forward_hook(lambda *_: calls.append(1))
    run(fast, head, batch, labels).loss.backward()
    assert len(calls) == 2  # forward and recomputed
    for name, parameter in fast.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-5, atol=1e-6)


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
    from transformers.models.luke.modeling_luke import LukeEncoder

    class Another(LukeEncoder):
        """With code of its own."""

    eager, _ = pair_of_models("LukeModel", "tiny")
    with pytest.raises(ValueError, match="must be or contain a LukeModel of transformers, got Linear"):
        accelerate(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="must be or contain a LukeModel of transformers, got LukeModel"):
        accelerate(luke_cases.build(luke_kernels.LukeModel))
    with pytest.raises(TypeError, match="model must be a module, got str"):
        accelerate("studio-ousia/luke-base")
    with pytest.raises(ValueError, match="backend must be"):
        accelerate(eager, "cuda3")
    wrapped = copy.deepcopy(eager)
    wrapped.encoder.forward = lambda *args, **kwargs: None
    with pytest.raises(ValueError, match="accelerated before its forwards are wrapped, got a wrapped LukeEncoder"):
        accelerate(wrapped)
    other = copy.deepcopy(eager)
    other.encoder.__class__ = Another
    with pytest.raises(ValueError, match="own encoder and embeddings, got a Another"):
        accelerate(other)
    chunked = copy.deepcopy(eager)
    chunked.config.chunk_size_feed_forward = 2
    with pytest.raises(ValueError, match="chunk_size_feed_forward must be 0"):
        accelerate(chunked)
    for model in (wrapped, other, chunked):
        assert not any(type(m).__name__.startswith("Packed") for m in model.modules())


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
