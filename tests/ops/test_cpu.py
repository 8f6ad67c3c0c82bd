"""What is particular to the C++ kernels: threads, forks, scratch memory."""

import os
import threading

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from attention_cases import PATTERNS, Case, assert_as_exact_as_eager, run, with_gradients

from luke_kernels import entity_aware_attention
from luke_kernels.ops.layout import Layout, empty_outputs

cpu = pytest.importorskip("luke_kernels.ops.backends.cpu", reason="luke_kernels._C is not built")


@pytest.fixture
def threads():
    """Leaves the number of threads as it was."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


EXAMPLES = int(os.environ.get("LUKE_KERNELS_EXAMPLES", "40"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "case",
    [Case(130, 33, "ragged"), Case(63, 17, "empty", 80), Case(5, 3, "holes", 16, 3), Case(700, 900, "none", 64)],
    ids=str,
)
def test_error_with_every_instruction_set(isa, case, dtype):
    assert_as_exact_as_eager(run(case, dtype, "cpu"), case, dtype)


# The fixtures leave instruction set and threads as they were after the last case; each case sets its own threads.
@hypothesis.settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
)
@hypothesis.given(data=st.data())
def test_error_of_any_case(data, isa, threads):
    """Any lengths, head size, dtype, scale, dropout, number of threads."""
    draw = data.draw
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
    case = Case(
        # Of few tokens in low precision eager may be exact by chance; and of large scores, which have their own tests.
        draw(st.integers(0 if dtype.itemsize >= 4 else 24, 400)),
        draw(st.integers(0, 200)),
        draw(st.sampled_from(PATTERNS)),
        draw(st.integers(1, 130)),
        draw(st.sampled_from([3, 4])),
        draw(st.sampled_from([0.1, 1.0])),
    )
    scale = case.head_dim**-0.5
    options = case.masks() | {"scale": draw(st.sampled_from([scale, -scale, 0.0]))}
    if draw(st.booleans()):
        options |= {"dropout_p": 0.2, "seed": torch.tensor([draw(st.integers(0, 99)), 7])}
    torch.set_num_threads(draw(st.integers(1, 3)))
    inputs = case.inputs(dtype)

    def results(backend, inputs):
        return with_gradients(lambda w, e: entity_aware_attention(w, e, **options, backend=backend), inputs)

    truth, found = results("reference", [t.double() for t in inputs]), results("cpu", inputs)
    if dtype == torch.float64:
        torch.testing.assert_close(found, truth, rtol=1e-11, atol=1e-11)
    else:
        assert_as_exact_as_eager(found, case, dtype, pooled=True, against=(truth, results("reference", inputs)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("words", "entities"), [(772, 0), (700, 72), (755, 5)])
def test_the_last_draws_of_a_full_block(isa, dtype, words, entities):
    """More numbers are drawn than there are keys: they must have room where a block of keys is full."""
    case, options = Case(words, entities, head_dim=64), {"dropout_p": 0.1, "seed": torch.tensor([1, 2])}
    found, expected = (run(case, dtype, backend, **options)["out_words"] for backend in ("cpu", "reference"))
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05 if dtype.itemsize == 2 else 1e-5)


def test_an_unknown_instruction_set():
    with pytest.raises(ValueError, match="must be portable, avx2, avx512, avx512_bf16 or amx, got 'x'"):
        cpu._C.set_cpu_isa("x")


@pytest.mark.parametrize("case", [Case(130, 33, "ragged", 80), Case(300, 0)], ids=str)
def test_half_precision(case):
    assert_as_exact_as_eager(run(case, torch.float16, "cpu"), case, torch.float16)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_threads_change_no_bit(threads, dtype):
    case, results = Case(130, 33, "ragged", head_dim=80), []
    for number in (1, 2, 5):
        torch.set_num_threads(number)
        results.append(run(case, dtype, "cpu", dropout_p=0.1, seed=torch.tensor([1, 2])))
    for name, expected in results[0].items():
        assert all(torch.equal(result[name], expected) for result in results[1:]), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("words", [200, 1700])
def test_few_heads_are_shared_out(threads, words, dtype):
    """One sequence of one head: rows and keys go to many threads, the backward in two halves, and no bit changes."""
    layout = Layout(None, None, None, None, 1, words, 70, True)
    inputs = torch.randn(words, 4, 1, 40, dtype=dtype), torch.randn(70, 4, 1, 40, dtype=dtype)
    douts = torch.randn(words, 1, 40, dtype=dtype), torch.randn(70, 1, 40, dtype=dtype)
    options = (layout, 0.2, 0.1, torch.tensor([3, 4]))
    results = []
    for number in (1, 2, 3, 16):
        torch.set_num_threads(number)
        out, lse = cpu.forward(*inputs, *options)
        results.append((out, lse, *cpu.backward(*douts, out, lse, *inputs, *options)))
    assert not any(t.isnan().any() for t in results[0])
    assert all(map(torch.equal, results[0] * 3, [t for result in results[1:] for t in result]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("number", [1, 3])
def test_rows_that_no_sequence_holds_are_filled(threads, dtype, number):
    """Before, between and after sequences in any order; fresh memory holds NaN."""
    torch.set_num_threads(number)
    places = ([700, 3, 50, 2**30, 20], [40, 9, 0, 7, 2**30]), ([5, 0, 9, 2, -4], [3, 2, 0, 2, 0])
    offsets, lengths, entity_offsets, entity_lengths = (torch.tensor(p).int() for kind in places for p in kind)
    layout = Layout(offsets, lengths, entity_offsets, entity_lengths, 5, 40, 3, covers_rows=False)
    words, entities = torch.randn(900, 4, 2, 24, dtype=dtype), torch.randn(10, 4, 2, 24, dtype=dtype)
    held = torch.zeros(910, dtype=torch.bool)
    for begin, end in ((700, 740), (3, 12), (20, 60), (905, 908), (900, 902), (902, 904)):
        held[begin:end] = True
    out, lse = cpu.forward(words, entities, layout, 0.2, 0.0, None)
    gradients = torch.cat(cpu.backward(out[:900], out[900:], out, lse, words, entities, layout, 0.2, 0.0, None))
    assert (out[~held] == 0).all()
    assert (gradients[~held] == 0).all()
    assert (lse[:, ~held] == torch.inf).all()
    assert all(tensor.isfinite().all() for tensor in (out[held], gradients[held], lse[:, held]))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_workers_of_a_data_loader(threads):
    """They are forked after a parallel region, where GNU OpenMP would hang; and give what the parent gives."""
    torch.set_num_threads(2)
    words = torch.randn(6, 1, 200, 4, 2, 32)
    expected = [entity_aware_attention(w, backend="cpu")[0] for w in words]

    def attend(items):
        torch.set_num_threads(2)  # workers have one unless they ask
        return entity_aware_attention(items[0], backend="cpu")[0]

    options = {"num_workers": 2, "timeout": 60, "multiprocessing_context": "fork"}
    found = list(torch.utils.data.DataLoader(words, collate_fn=attend, **options))
    assert len(found) == len(expected)
    assert all(map(torch.equal, found, expected))


def test_several_python_threads_at_once():
    case = Case(130, 33, "ragged")
    expected, results = run(case, torch.float32, "cpu"), []
    threads = [threading.Thread(target=lambda: results.append(run(case, torch.float32, "cpu"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all(torch.equal(result[name], value) for result in results for name, value in expected.items())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_a_forked_child_runs_and_does_not_hang(threads):
    torch.set_num_threads(2)
    words = torch.randn(2, 200, 4, 2, 32)
    expected = entity_aware_attention(words, backend="cpu")[0]
    child = os.fork()
    if child == 0:
        # The child may not return into pytest, whatever happens.
        same = False
        try:
            same = torch.equal(entity_aware_attention(words, backend="cpu")[0], expected)
        finally:
            os._exit(0 if same else 1)
    waiting = threading.Timer(60, lambda: os.kill(child, 9))
    waiting.start()
    _, status = os.waitpid(child, 0)
    waiting.cancel()
    assert os.waitstatus_to_exitcode(status) == 0


def test_scratch_grows_with_the_longest_sequence_only(threads):
    torch.set_num_threads(2)

    def scratch_bytes(tokens: int, sequences: int) -> int:
        words, entities = torch.zeros(tokens * sequences, 4, 12, 64), torch.zeros(0, 4, 12, 64)
        layout = Layout(None, None, None, None, sequences, tokens, 0, True)
        outputs = empty_outputs(words, entities, True)
        params = cpu.parameters(cpu._C, words, entities, layout, 1.0, 0.0, (0, 0), *outputs)
        return cpu._C.attention_scratch_bytes_cpu(params)

    assert scratch_bytes(16, 1) == scratch_bytes(16, 100) < 2 * 2**21
    # Two gradients of queries in float32, lse and delta; some more for the last block.
    assert scratch_bytes(5000, 1) - scratch_bytes(16, 1) < 2 * 5200 * (2 * 64 + 2) * 4
