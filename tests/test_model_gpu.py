"""What only a GPU can show of the model: the numbers there, and that a packed batch waits for nothing."""

import pytest
import torch
from luke_cases import BATCH, ENTITIES, build, of_transformers, padded_inputs

import luke_kernels
from luke_kernels import (
    LukeForEntitySpanClassification,
    LukeForMaskedLM,
    LukeModel,
    LukeTokenizer,
    PackedBatch,
    accelerate,
    encode,
    graphs,
)
from luke_kernels.tokenizer import BUNDLED

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning"),
]

# A head_dim that the Triton kernels take without padding.
SIZES = {"hidden_size": 128, "entity_emb_size": 32, "num_attention_heads": 2, "max_position_embeddings": 40}
HEADS = [name for name in luke_kernels.__all__ if name.startswith("LukeFor") and name != "LukeForMultipleChoice"]


def batch_on_the_cpu() -> PackedBatch:
    with torch.device("cpu"):
        columns = torch.zeros(BATCH, ENTITIES, dtype=torch.int64)
        return PackedBatch.from_padded(**padded_inputs(), entity_start_positions=columns, entity_end_positions=columns)


@pytest.mark.parametrize("backend", ["triton", "sdpa"])
@pytest.mark.parametrize("name", HEADS)
def test_equals_the_cpu(name, backend):
    with torch.device("cpu"):
        expected = build(getattr(luke_kernels, name), backend="reference", dtype=torch.float32, **SIZES)
        there = build(getattr(luke_kernels, name), backend=backend, dtype=torch.float32, **SIZES).to("cuda")
        batch = batch_on_the_cpu()
    with torch.no_grad():
        for a, b in zip(there(batch.to("cuda")).to_tuple(), expected(batch).to_tuple(), strict=True):
            torch.testing.assert_close(a.cpu(), b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cls", [LukeForEntitySpanClassification, LukeForMaskedLM])
def test_a_packed_batch_waits_for_nothing(cls):
    """Forward, loss and backward, with dropout."""
    changes = {**SIZES, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    model = build(cls, backend="triton", dtype=torch.bfloat16, **changes).to("cuda").train()
    batch = batch_on_the_cpu().to("cuda")
    labels = {"labels": torch.zeros(batch.num_entities, dtype=torch.int64, device="cuda")}
    if cls is LukeForMaskedLM:
        labels = {"labels": batch.input_ids, "entity_labels": batch.entity_ids}
    model(batch, **labels).loss.backward()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(batch, **labels).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_padded_inputs_equal_packed_ones():
    with torch.device("cpu"):
        inputs = padded_inputs("holes")
    model = build(luke_kernels.LukeModel, backend="triton", dtype=torch.float32, **SIZES).to("cuda")
    inputs = {name: value.to("cuda") for name, value in inputs.items()}
    batch = PackedBatch.from_padded(**inputs)
    with torch.no_grad():
        padded, packed = model(**inputs), model(batch)
    torch.testing.assert_close(batch.pack_words(padded.last_hidden_state), packed.last_hidden_state)
    torch.testing.assert_close(batch.pack_entities(padded.entity_last_hidden_state), packed.entity_last_hidden_state)


@pytest.mark.parametrize("backend", ["triton", "sdpa"])
def test_accelerated_model_of_transformers(backend):
    """States where tokens exist, and gradients, are those before."""
    with torch.device("cpu"):
        theirs = of_transformers(build(LukeModel, dtype=torch.float32, **SIZES)).to("cuda").train()
        inputs = {name: value.to("cuda") for name, value in padded_inputs().items()}
    exists = [inputs[name].bool() for name in ("attention_mask", "entity_attention_mask")]
    for module in theirs.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    found = []
    for fast in (False, True):
        model = accelerate(theirs, backend) if fast else theirs
        model.zero_grad()
        output = model(**inputs)
        states = output.last_hidden_state[exists[0]], output.entity_last_hidden_state[exists[1]]
        sum(state.square().sum() for state in states).backward()
        found.append([*states, *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_encoded_texts():
    with torch.device("cpu"):
        tokenizer = LukeTokenizer.from_pretrained(BUNDLED)
        sizes = {**SIZES, "vocab_size": len(tokenizer), "max_position_embeddings": 99}
        model = build(LukeModel, dtype=torch.float32, **sizes)
        texts, spans = (
            ["Ada met Babbage.", "Vienna lies on the Danube, as Budapest does."],
            [[(0, 3)], [(0, 6), (19, 25)]],
        )
        expected = list(encode(model, tokenizer, texts, spans))
    for a, b in zip(encode(model.to("cuda"), tokenizer, texts, spans), expected, strict=True):
        torch.testing.assert_close(a.words, b.words, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(a.entities, b.entities, rtol=1e-4, atol=1e-4)


def test_graphs_give_the_numbers_of_the_plain_model():
    """Of many lengths by few graphs; new weights are read, weights in new memory refused."""
    model = build(LukeModel, backend="triton", dtype=torch.float32, **SIZES).to("cuda")
    batches = [
        PackedBatch.from_padded(**padded_inputs(padding), pad_token_id=1).to("cuda") for padding in ("right", "holes")
    ]
    with torch.no_grad():
        plain = [model(batch).to_tuple() for batch in batches]
        model.optimize_for_inference()
        for _ in range(2):
            for batch, expected in zip(batches, plain, strict=True):
                for a, b in zip(model(batch).to_tuple(), expected, strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        assert len(model.optimized._graphs) == 1
        model.encoder["layer"][0].output.dense.weight.mul_(2)
        doubled = model(batches[0])[0]
        torch.testing.assert_close(doubled, model.restore_from_inference()(batches[0])[0], rtol=1e-5, atol=1e-5)
        model.optimize_for_inference().double()
        with pytest.raises(RuntimeError, match="call optimize_for_inference again"):
            model(batches[0])


def test_graphs_wait_for_nothing():
    model = build(LukeForEntitySpanClassification, backend="triton", dtype=torch.bfloat16, **SIZES).to("cuda")
    batch = batch_on_the_cpu().to("cuda")
    with torch.no_grad():
        model.optimize_for_inference()
        for _ in range(graphs.CAPTURE_AT):
            model(batch)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            model(batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
