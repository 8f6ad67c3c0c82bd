"""Cross-entropy a chunk of classes at a time: loss and gradients of the whole, without its memory."""

import pytest
import torch
import torch.nn.functional as F

from luke_kernels import losses
from luke_kernels.losses import linear_cross_entropy
from luke_kernels.memory import peak_memory_bytes

ROWS, CLASSES, SIZE = 13, 101, 24  # of which the larger counts


def draw(dtype, rows=ROWS, classes=CLASSES, size=SIZE):
    shapes = ((rows, size), (classes, size), (classes,))
    tensors = [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]
    return *tensors, torch.randint(0, classes, (rows,))


def run(function, hidden, weight, bias, labels):
    loss = function(hidden, weight, bias, labels)
    return loss, *torch.autograd.grad(loss, (hidden, weight, bias), torch.tensor(0.7, dtype=loss.dtype))


def plain(hidden, weight, bias, labels):
    return F.cross_entropy(F.linear(hidden, weight, bias), labels)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
# A chunk of one class, of some, of all but one, of all.
@pytest.mark.parametrize("chunk", [1, 7, 100, 1000])
def test_error(monkeypatch, dtype, chunk):
    monkeypatch.setattr(losses, "CHUNK_BYTES", 4 * SIZE * chunk)
    tensors = draw(dtype)
    exact = run(plain, *(t.detach().double().requires_grad_() for t in tensors[:3]), tensors[3])
    eager, ours = run(plain, *tensors), run(linear_cross_entropy, *tensors)
    # What is added up: the loss cancels nothing, gradients are sums of probabilities times rows.
    share = 0.7 / ROWS
    sizes = [exact[0].abs(), tensors[1].abs().max() * share, tensors[0].abs().max() * share, share]
    # An exponent of some 16 is rounded before it is taken.
    eps = 2 * torch.finfo(dtype).eps + 16 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    for name, truth, theirs, got, size in zip(
        ("loss", "hidden", "weight", "bias"), exact, eager, ours, sizes, strict=True
    ):
        assert got.dtype == theirs.dtype
        error, allowed = ((x.double() - truth).abs().max() for x in (got, theirs))
        assert error <= 2 * allowed + eps * size, name


def test_second_backward_and_labels_that_repeat():
    hidden, weight, bias, _ = draw(torch.float64)
    labels = torch.full((ROWS,), 5)
    loss = linear_cross_entropy(hidden, weight, bias, labels)
    loss.backward(retain_graph=True)
    once = weight.grad.clone()
    loss.backward()
    torch.testing.assert_close(weight.grad, 2 * once)
    torch.testing.assert_close(once, torch.autograd.grad(plain(hidden, weight, bias, labels), weight)[0])


def test_frozen_table_gets_no_gradient():
    hidden, weight, bias, labels = draw(torch.float32)
    weight.requires_grad_(False)
    linear_cross_entropy(hidden, weight, bias, labels).backward()
    assert weight.grad is None
    torch.testing.assert_close(hidden.grad, torch.autograd.grad(plain(hidden, weight, bias, labels), hidden)[0])


def test_scores_far_apart():
    hidden, weight, bias, labels = draw(torch.float32)
    scaled = (hidden * 200).detach().requires_grad_()
    torch.testing.assert_close(
        run(linear_cross_entropy, scaled, weight, bias, labels), run(plain, scaled, weight, bias, labels)
    )


def test_no_rows_are_nan():
    hidden, weight, bias, _ = draw(torch.float32, rows=0)
    assert linear_cross_entropy(hidden, weight, bias, torch.empty(0, dtype=torch.int64)).isnan()


@pytest.mark.parametrize("label", [-1, -100, CLASSES])
def test_labels_that_are_no_class(label):
    hidden, weight, bias, labels = draw(torch.float32)
    labels[3] = label
    with pytest.raises(IndexError):
        linear_cross_entropy(hidden, weight, bias, labels)


def test_autocast():
    hidden, weight, bias, labels = draw(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, bias, labels)
    assert loss.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):  # not advised, and right all the same
        loss.backward()
    assert weight.grad.dtype == torch.float32
    exact = torch.autograd.grad(plain(hidden, weight, bias, labels), weight)[0]
    assert (weight.grad - exact).abs().max() < 0.02 * exact.abs().max()


def test_memory():
    """Beyond the gradient of the table, chunks: not the logits, which would be 256 MB, and their gradient."""
    hidden, weight, bias, labels = draw(torch.float32, rows=512, classes=2**17, size=8)

    def step():
        weight.grad = bias.grad = hidden.grad = None
        linear_cross_entropy(hidden, weight, bias, labels).backward()

    step()
    beyond = peak_memory_bytes(step, torch.device("cpu")) - weight.numel() * 4
    assert beyond < 5 * losses.CHUNK_BYTES
