"""The drop-in module: equal to transformers, no copies between projections and kernel, hooks and adapters effective."""

import copy

import pytest
import torch
from torch import nn

from luke_kernels import EntityAwareSelfAttention, PackedLengths
from luke_kernels.attention import project_joint

HIDDEN, HEADS = 64, 4
BATCH, WORDS, ENTITIES = 2, 11, 5


@pytest.fixture
def module() -> EntityAwareSelfAttention:
    module = EntityAwareSelfAttention(HIDDEN, HEADS)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    return module


@pytest.fixture
def hidden() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(BATCH, WORDS, HIDDEN), torch.randn(BATCH, ENTITIES, HIDDEN)


@pytest.fixture
def masks() -> dict[str, torch.Tensor]:
    return {"word_mask": torch.rand(BATCH, WORDS) < 0.6, "entity_mask": torch.rand(BATCH, ENTITIES) < 0.6}


@pytest.mark.parametrize("entity_aware", [True, False])
def test_equals_transformers(hidden, masks, entity_aware):
    luke = pytest.importorskip("transformers.models.luke.modeling_luke", reason="transformers is not installed")
    config = luke.LukeConfig(
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        use_entity_aware_attention=entity_aware,
        attention_probs_dropout_prob=0,
    )
    theirs = luke.LukeSelfAttention(config)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.2)
    ours = EntityAwareSelfAttention(HIDDEN, HEADS, entity_aware=entity_aware)
    names = [name for name, _ in ours.named_parameters()]
    # transformers builds the three extra queries only where they are used; so do we.
    assert set(names) == {name for name, _ in theirs.named_parameters()}
    ours.load_state_dict(theirs.state_dict())
    exists = torch.cat([masks["word_mask"], masks["entity_mask"]], dim=1)
    additive = torch.zeros(exists.shape).masked_fill(~exists, torch.finfo(torch.float32).min)[:, None, None]
    expected = theirs(*hidden, additive, True)
    results = ours(*hidden, **masks)
    for kind, mask in enumerate(masks.values()):
        torch.testing.assert_close(results[kind][mask], expected[kind][mask], rtol=1e-5, atol=1e-5)
        assert not results[kind][~mask].any()
    *contexts, probs = ours(*hidden, **masks, output_attentions=True)
    pairs = exists[:, None, :, None] & exists[:, None, None, :]
    torch.testing.assert_close(probs, expected[2] * pairs, rtol=1e-5, atol=1e-6)
    for context, result in zip(contexts, results, strict=True):
        torch.testing.assert_close(context, result, rtol=1e-5, atol=1e-5)


def test_output_attentions_with_nan_in_pads(module, hidden, masks):
    expected = module(*hidden, **masks, output_attentions=True)
    for h, mask in zip(hidden, masks.values(), strict=True):
        h[~mask] = torch.nan
        h.requires_grad_()
    masks["word_mask"][0], masks["entity_mask"][0] = False, False
    words, entities, probs = module(*hidden, **masks, output_attentions=True)
    assert not probs[0].any()
    torch.testing.assert_close((words[1], entities[1], probs[1]), tuple(t[1] for t in expected))
    gradients = torch.autograd.grad(words.sum() + probs.square().sum(), hidden)
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("entity_aware", [True, False])
def test_packed_equals_padded(hidden, grad, entity_aware):
    module = EntityAwareSelfAttention(HIDDEN, HEADS, entity_aware=entity_aware)
    lengths = PackedLengths.from_lengths([WORDS, 4], [0, ENTITIES])
    keep = torch.arange(WORDS) < torch.tensor([[WORDS], [4]]), torch.arange(ENTITIES) < torch.tensor([[0], [ENTITIES]])
    with torch.set_grad_enabled(grad):
        packed = module(hidden[0][keep[0]], hidden[1][keep[1]], packed=lengths)
        padded = module(
            *hidden,
            word_lengths=torch.tensor([WORDS, 4], dtype=torch.int32),
            entity_lengths=torch.tensor([0, ENTITIES], dtype=torch.int32),
        )
        words_only = module(hidden[0][keep[0]], packed=PackedLengths.from_lengths([WORDS, 4]))
    with pytest.raises(ValueError, match="entity_hidden must be given where packed has entities, 5, got None"):
        module(hidden[0][keep[0]], packed=lengths)
    torch.testing.assert_close(packed[0], padded[0][keep[0]])
    torch.testing.assert_close(packed[1], padded[1][keep[1]])
    assert words_only[1] is None
    with pytest.raises(ValueError, match="output_attentions must not be given with packed, got True"):
        module(hidden[0][keep[0]], hidden[1][keep[1]], packed=lengths, output_attentions=True)


def test_paths_of_the_projections_agree(module, hidden):
    """One product with gradients, products in place without, modules called where hooked: the same numbers."""
    fused = module(*hidden)
    with torch.no_grad():
        in_place = module(*hidden)
    module.key.register_forward_hook(lambda *_: None)
    called = module(*hidden)
    for a, b, c in zip(fused, in_place, called, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_hooks_for_all_modules_see_the_projections(module, hidden):
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda each, *_: seen.append(each))
    try:
        with torch.no_grad():  # else written into one buffer without calls
            module(*hidden)
    finally:
        handle.remove()
    assert {module.query, module.w2e_query, module.e2w_query, module.e2e_query, module.key, module.value} <= set(seen)


@pytest.mark.parametrize("how", ["gradients", "in place", "hooked"])
@pytest.mark.parametrize("entity_aware", [True, False])
@pytest.mark.parametrize("num_words", [HIDDEN // 2, 2 * HIDDEN])
def test_joint_projections(num_words, entity_aware, how):
    """Words and entities in one buffer get what they get apart; few tokens and many go different ways."""
    module = EntityAwareSelfAttention(HIDDEN, HEADS, entity_aware=entity_aware)
    hidden = torch.randn(num_words + 3, HIDDEN)
    expected = module.project_words(hidden[:num_words]), module.project_entities(hidden[num_words:])
    calls = []
    if how == "hooked":
        module.key.register_forward_hook(lambda *_: calls.append(1))
    with torch.set_grad_enabled(how != "in place"):
        projected = project_joint(module, hidden, num_words, HEADS, entity_aware, has_entities=True)
    assert len(calls) == (how == "hooked")
    for a, b in zip(projected, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert project_joint(module, hidden, num_words + 3, HEADS, entity_aware, has_entities=False)[1] is None


@pytest.mark.parametrize("change", ["no_grad", "data", "storage"])
@pytest.mark.parametrize("name", ["query", "w2e_query", "e2w_query", "e2e_query", "key", "value"])
def test_a_weight_changed_in_place_changes_the_next_output(module, hidden, name, change):
    module.eval()
    with torch.no_grad():
        before = module(*hidden)
        weight = getattr(module, name).weight
        if change == "no_grad":
            weight.mul_(1.5)
        elif change == "data":
            weight.data += 1
        else:
            weight.data = weight.data * 1.5
        after = module(*hidden)
        expected = copy.deepcopy(module)(*hidden)
    assert any(not torch.allclose(a, b) for a, b in zip(before, after, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(after, expected, strict=True))


@pytest.mark.parametrize("grad", [True, False])
def test_hooks_and_parametrisations_are_effective(module, hidden, grad):
    with torch.set_grad_enabled(grad):
        before = module(*hidden)
        handles = [
            module.e2w_query.register_forward_hook(lambda _, __, output: output * 2),
            module.e2w_query.register_forward_pre_hook(lambda *_: None),
        ]
        hooked = module(*hidden)
        for handle in handles:
            handle.remove()
        plain = module.e2w_query.forward
        module.e2w_query.forward = lambda x: plain(x) * 2
        assert torch.equal(module(*hidden)[1], hooked[1])
        del module.e2w_query.forward
        nn.utils.parametrizations.weight_norm(module.value)
        module.value.parametrizations.weight.original0.data *= 2
        parametrised = module(*hidden)
    assert torch.equal(before[0], hooked[0])
    assert not torch.allclose(before[1], hooked[1])
    torch.testing.assert_close(parametrised[0] - module.value.bias, 2 * (before[0] - module.value.bias))


def test_lora(module, hidden):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    with torch.no_grad():
        before = module(*hidden)
    config = peft.LoraConfig(r=4, target_modules=["query", "value", "w2e_query"], init_lora_weights=False)
    adapted = peft.get_peft_model(module, config)
    results = adapted(*hidden)
    assert not torch.allclose(results[0], before[0])
    sum(r.square().sum() for r in results).backward()
    trained = {name for name, p in adapted.named_parameters() if p.grad is not None}
    assert len(trained) == 6
    assert all("lora_" in name for name in trained)
    with torch.no_grad():
        torch.testing.assert_close(adapted.merge_and_unload()(*hidden)[0], results[0], rtol=1e-4, atol=1e-4)


def test_gradients_of_the_weights(module, hidden):
    """Against the same module with its linears called one by one."""
    called = copy.deepcopy(module)
    called.key.register_forward_hook(lambda *_: None)
    called.query.register_forward_hook(lambda *_: None)
    for m in (module, called):
        sum(out.sin().sum() for out in m(*hidden)).backward()
    for (name, p), q in zip(module.named_parameters(), called.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=lambda text, name=name: f"{name}: {text}", rtol=1e-4, atol=1e-5)
        assert p.grad.abs().max() > 0


COPIES = ("aten::copy_", "aten::cat", "aten::clone", "aten::contiguous", "aten::stack", "aten::permute")


@pytest.mark.parametrize("how", ["dense", "lengths", "packed"])
@pytest.mark.parametrize("grad", [True, False])
def test_no_activation_is_copied(grad, how):
    """Between the products and the kernel, in both directions; weights may be put side by side."""
    batch, words, entities, hidden_size = 3, 37, 13, 128
    module = EntityAwareSelfAttention(hidden_size, 4, backend="cpu")
    shapes = [(batch, words), (batch, entities)] if how != "packed" else [(batch * words,), (batch * entities,)]
    inputs = [torch.randn(*shape, hidden_size, requires_grad=True) for shape in shapes]
    arguments = {
        "dense": {},
        "lengths": {"word_lengths": torch.tensor([37, 5, 9]).int(), "entity_lengths": torch.tensor([13, 0, 9]).int()},
        "packed": {"packed": PackedLengths.from_lengths([words] * batch, [entities] * batch)},
    }[how]
    smallest_activation = batch * entities * hidden_size
    weights = [hidden_size * hidden_size * stack for stack in (1, 4)]
    assert smallest_activation not in weights
    with torch.profiler.profile(record_shapes=True) as profile, torch.set_grad_enabled(grad):
        outs = module(*inputs, **arguments)
        if grad:
            torch.autograd.backward(outs, [torch.randn_like(out) for out in outs])
    # A matrix product may spread its bias over its own result.
    events = [e for e in profile.events() if e.name in COPIES and getattr(e.cpu_parent, "name", None) != "aten::addmm"]

    def numbers(event) -> list[int]:
        return [torch.Size(shape).numel() for shape in event.input_shapes if shape]

    activations = [
        (e.name, e.input_shapes)
        for e in events
        if any(n >= smallest_activation and n not in weights for n in numbers(e))
    ]
    assert activations == []
    assert "luke_kernels::attention_forward" in {event.name for event in profile.events()}


@pytest.mark.parametrize("backend", ["sdpa", "cpu"])
def test_compiles(module, hidden, masks, backend):
    torch._dynamo.reset()
    module.backend = backend
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            for a, b in zip(compiled(*hidden, **masks), module(*hidden, **masks), strict=True):
                torch.testing.assert_close(a, b)


def test_autocast(module, hidden):
    with torch.no_grad():
        expected = module(*hidden)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            results = module(*hidden)
    for result, value in zip(results, expected, strict=True):
        assert result.dtype == torch.bfloat16
        torch.testing.assert_close(result.float(), value, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("entity_aware", [True, False])
def test_batches_without_entities_or_tokens(hidden, grad, entity_aware):
    module = EntityAwareSelfAttention(HIDDEN, HEADS, entity_aware=entity_aware)
    with torch.set_grad_enabled(grad):
        expected = module(hidden[0])[0]
        words, entities = module(hidden[0], hidden[1][:, :0])
        assert torch.equal(words, expected)
        assert entities.shape == (BATCH, 0, HIDDEN)
        packed = PackedLengths.from_lengths([WORDS] * BATCH, [0] * BATCH)
        words, entities = module(hidden[0].flatten(0, 1), hidden[1][:, :0].flatten(0, 1), packed=packed)
        assert torch.equal(words.unflatten(0, (BATCH, -1)), expected)
        assert entities.shape == (0, HIDDEN)
        assert module(hidden[0][:0], hidden[1][:0])[1].shape == (0, ENTITIES, HIDDEN)


def test_on_the_meta_device(hidden):
    module = EntityAwareSelfAttention(HIDDEN, HEADS, device="meta")
    words, entities = module(*(h.to("meta") for h in hidden))
    assert words.shape == (BATCH, WORDS, HIDDEN)
    assert entities.shape == (BATCH, ENTITIES, HIDDEN)


def test_dropout_only_in_training(hidden):
    module = EntityAwareSelfAttention(HIDDEN, HEADS, dropout=0.5)
    assert not torch.equal(module(*hidden)[0], module(*hidden)[0])
    assert (module(*hidden, output_attentions=True)[2] == 0).any()
    module.eval()
    assert torch.equal(module(*hidden)[0], module(*hidden)[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden_size": 65}, "hidden_size must be a multiple of num_heads, 4, got 65"),
        ({"num_heads": 0}, "hidden_size must be a multiple of num_heads, 0, got 64"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1.0"),
        ({"dropout": None}, "dropout must be a number, got NoneType"),
        ({"hidden_size": 64.0}, "hidden_size must be an int, got 64.0"),
        ({"backend": "flash"}, "backend must be one of auto, .*, got 'flash'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        EntityAwareSelfAttention(**{"hidden_size": HIDDEN, "num_heads": HEADS, **arguments})


def test_bad_hidden_states(module, hidden):
    with pytest.raises(ValueError, match=r"entity_hidden must be \(B, tokens, 64\), got \(2, 5, 32\)"):
        module(hidden[0], hidden[1][..., :32])
    with pytest.raises(ValueError, match=r"word_hidden must be \(tokens, 64\), got \(2, 11, 64\)"):
        module(*hidden, packed=PackedLengths.from_lengths([3], [1]))
    with pytest.raises(TypeError, match="word_hidden must be a tensor, got NoneType"):
        module(None)
    with pytest.raises(TypeError, match=r"must have the dtype of the weights, torch.float32, got torch.bfloat16"):
        module(hidden[0].bfloat16(), hidden[1])
    with pytest.raises(ValueError, match="must be on the device of the weights, cpu, got meta"):
        module(hidden[0], hidden[1].to("meta"))
    with pytest.raises(TypeError, match="packed must be PackedLengths, got str"):
        module(hidden[0][0], packed="x")
    with pytest.raises(ValueError, match="entities must have the batch size of words, 2, got 1"):
        module(hidden[0], hidden[1][:1], output_attentions=True)
    with pytest.raises(ValueError, match=r"word_lengths must lie in \[0, 11\], got 12"):
        module(*hidden, word_lengths=torch.tensor([12, 1], dtype=torch.int32))
