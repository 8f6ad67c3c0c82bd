"""What only a GPU can show of the public functions: streams, graphs, syncs, memory, copies."""

import pytest
import torch
from attention_cases import Case, assert_as_exact_as_eager, eager, run, with_gradients

from luke_kernels import EntityAwareSelfAttention, PackedLengths, entity_aware_attention, entity_aware_attention_varlen
from luke_kernels.ops.backends import TABLE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning"),
    # The leaves are made on the default stream on purpose.
    pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream does not match:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*Profiler clears events:UserWarning"),
]
BATCH, WORDS, ENTITIES, HEADS, DIM = 4, 130, 33, 4, 64


def _inputs(dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor]:
    shapes = [(BATCH, n, 4, HEADS, DIM) for n in (WORDS, ENTITIES)]
    words, entities = (torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True) for shape in shapes)
    return words, entities


def _lengths() -> dict[str, torch.Tensor]:
    return {
        "word_lengths": torch.tensor([130, 64, 1, 0], dtype=torch.int32, device="cuda"),
        "entity_lengths": torch.tensor([33, 0, 16, 0], dtype=torch.int32, device="cuda"),
    }


@pytest.fixture(params=["triton", "cuda"])
def backend(request) -> str:
    if (reason := TABLE[request.param].missing(None)) is not None:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


def _step(backend: str, words: torch.Tensor, entities: torch.Tensor, **options) -> tuple[torch.Tensor, ...]:
    outs = entity_aware_attention(words, entities, backend=backend, **options)
    return *outs, *torch.autograd.grad(outs, (words, entities), [torch.ones_like(out) for out in outs])


def test_nothing_waits_for_the_device(backend):
    words, entities = _inputs()
    masks, lengths = {"word_mask": torch.rand(BATCH, WORDS, device="cuda") < 0.5}, _lengths()
    packed = PackedLengths.from_lengths([WORDS] * BATCH, [ENTITIES] * BATCH).to("cuda")
    calls = [
        lambda: _step(backend, words, entities),
        lambda: _step(backend, words, entities, **lengths),
        lambda: _step(backend, words, entities, **masks),
        lambda: _step(backend, words, entities, dropout_p=0.1),
        lambda: entity_aware_attention_varlen(
            *(t.flatten(0, 1) for t in (words, entities)),
            packed.cu_words,
            packed.cu_entities,
            WORDS,
            ENTITIES,
            backend=backend,
        ),
    ]
    for call in calls:
        call()  # compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_ten_runs_are_bitwise_equal(backend):
    words, entities = _inputs()
    options = {**_lengths(), "dropout_p": 0.1, "seed": torch.tensor([1, 2], device="cuda")}
    first = _step(backend, words, entities, **options)
    for _ in range(9):
        assert all(torch.equal(a, b) for a, b in zip(first, _step(backend, words, entities, **options), strict=True))


def test_graph_capture(backend):
    words, entities = _inputs()
    lengths = _lengths()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            _step(backend, words, entities, **lengths)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _step(backend, words, entities, **lengths)
    with torch.no_grad():
        words.normal_(), entities.normal_()
        lengths["word_lengths"].copy_(torch.tensor([3, 130, 0, 77]))
    graph.replay()
    for a, b in zip(captured, _step(backend, words, entities, **lengths), strict=True):
        assert torch.equal(a, b)


def test_compiles_whole(backend):
    words, entities = _inputs()
    torch._dynamo.reset()

    def function(w, e, word_lengths):
        return entity_aware_attention(w, e, word_lengths=word_lengths, backend=backend)

    lengths = _lengths()["word_lengths"]
    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    for a, b in zip(compiled(words, entities, lengths), function(words, entities, lengths), strict=True):
        assert torch.equal(a, b)


def test_side_stream(backend):
    words, entities = _inputs()
    expected = _step(backend, words, entities)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        results = _step(backend, words, entities)
    torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_more_sequences_than_a_grid_axis_holds(backend):
    count = 70_000
    packed = PackedLengths.from_lengths([1] * count, [0] * count).to("cuda")
    words = torch.randn(count, 4, 1, 16, device="cuda", dtype=torch.bfloat16)
    out, _ = entity_aware_attention_varlen(words, None, packed.cu_words, None, 1, 0, backend=backend)
    assert torch.equal(out, words[:, 3])  # a sequence of one token returns its value


def test_more_numbers_than_32_bits_count(backend):
    """The last sequence, 2^31 elements away from the first, is as it is alone."""
    length, entities_each, heads = 512, 8, 16
    count = 2**31 // (length * 4 * heads * DIM) + 2
    packed = PackedLengths.from_lengths([length] * count, [entities_each] * count).to("cuda")
    words, entities = (
        torch.randn(n * count, 4, heads, DIM, device="cuda", dtype=torch.bfloat16) for n in (length, entities_each)
    )
    assert words[:-length].numel() > 2**31

    def step(w, e, lengths):
        w, e = w.detach().requires_grad_(), e.detach().requires_grad_()
        outs = entity_aware_attention_varlen(
            w, e, lengths.cu_words, lengths.cu_entities, length, entities_each, backend=backend
        )
        return *outs, *torch.autograd.grad(outs, (w, e), [out.detach() for out in outs])

    last = words[-length:], entities[-entities_each:]
    alone = step(*last, PackedLengths.from_lengths([length], [entities_each]).to("cuda"))
    for ours, expected in zip(step(words, entities, packed), alone, strict=True):
        assert torch.equal(ours[-len(expected) :], expected)


def test_tf32_where_torch_allows_it():
    case, exact = Case(130, 33, "ragged", DIM), torch.backends.cuda.matmul.fp32_precision
    inputs, exists = case.inputs(torch.float32), case.exists()

    def eager_of(tensors):
        return with_gradients(lambda w, e: eager(w, e, *exists), tensors)

    in_float32, truth = run(case, torch.float32, "triton"), eager_of([t.double() for t in inputs])
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        results, reference = run(case, torch.float32, "triton"), eager_of(inputs)
    finally:
        torch.backends.cuda.matmul.fp32_precision = exact
    assert_as_exact_as_eager(results, case, torch.float32, against=(truth, reference))
    assert_as_exact_as_eager(in_float32, case, torch.float32)
    assert (results["out_words"] - truth["out_words"]).abs().max() > 1e-5  # 10 bits of mantissa were multiplied


def test_peak_memory(backend):
    words = torch.randn(1, 4096, 4, 12, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    entities = torch.randn(1, 1024, 4, 12, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    _step(backend, words, entities)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    _step(backend, words, entities)
    output_bytes = (words.nbytes + entities.nbytes) // 4
    assert torch.cuda.max_memory_allocated() - before < 12 * output_bytes


def test_no_activation_is_copied_in_the_module(backend):
    module = EntityAwareSelfAttention(HEADS * DIM, HEADS, backend=backend, device="cuda", dtype=torch.bfloat16)
    hidden = [torch.randn(BATCH, n, HEADS * DIM, device="cuda", dtype=torch.bfloat16) for n in (WORDS, ENTITIES)]
    module(*hidden)
    with torch.profiler.profile(record_shapes=True) as profile:
        outs = module(*hidden)
        torch.autograd.backward(outs, [torch.randn_like(out) for out in outs])
    smallest = hidden[1].numel()
    weights = {module.query.weight.numel() * stack for stack in (1, 4)}
    copied = [
        event.name
        for event in profile.events()
        if event.name in ("aten::copy_", "aten::cat", "aten::clone", "aten::contiguous")
        for shape in event.input_shapes
        if shape and torch.Size(shape).numel() >= smallest and torch.Size(shape).numel() not in weights
    ]
    assert copied == []
