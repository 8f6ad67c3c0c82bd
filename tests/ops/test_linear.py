"""Linear layers on packed weights, in the kernels of each instruction set: error, edges, rows."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("luke_kernels._C", reason="luke_kernels._C is not built")
from luke_kernels.ops.linear import DTYPES, Int8Linear, PackedLinear, layer_norm

# Rows, in, out: one of each, odd ones, more than a block of rows and a piece of the depth, less than a vector.
SIZES = [
    (1, 1, 1),
    (13, 33, 17),
    (97, 130, 70),
    (5, 768, 64),
    (200, 777, 100),
    (31, 3072, 96),
    (70, 5000, 300),
    (350, 5000, 33),
]


def draw(rows, in_size, out_size, dtype):
    return (
        torch.randn(rows, in_size).to(dtype),
        (torch.randn(out_size, in_size) * in_size**-0.5).to(dtype),
        torch.randn(out_size).to(dtype),
        torch.randn(rows, out_size).to(dtype),
    )


def exact(x, weight, bias, gelu):
    y = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    return F.gelu(y) if gelu else y


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_cpu(isa, dtype, size):
    """Rounding of the sum in float32, and of the output; and for bfloat16 of GELU to a fifth of its rounding."""
    x, weight, bias, residual = draw(*size, dtype)
    packed = {True: PackedLinear(weight, bias), False: PackedLinear(weight, None)}
    for has_bias in (True, False):
        for gelu in (True, False):
            for added in (residual, None):
                activated = exact(x, weight, bias if has_bias else None, gelu)
                truth = activated + (0 if added is None else added.double())
                got = packed[has_bias](x, gelu=gelu, residual=added)
                assert got.dtype == dtype
                eps = torch.finfo(dtype).eps
                sums = torch.finfo(torch.float32).eps * (x.double().abs() @ weight.double().abs().t()).max()
                coarse = eps / 20 * activated.abs() if gelu and dtype == torch.bfloat16 else 0
                bound = eps / 2 * truth.abs() + coarse + 4 * sums + 1e-7
                assert ((got.double() - truth).abs() <= bound).all(), (has_bias, gelu, added is None)


def test_gelu_cpu(isa):
    """Within some float32 roundings of x Phi(x), relative where it is tiny; there x^2 is rounded in the exponent."""
    x = torch.cat([torch.linspace(-13, 13, 40_001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e30, -1e30])])
    got = PackedLinear(torch.ones(1, 1), None)(x[:, None], gelu=True)[:, 0].double()
    truth = 0.5 * x.double() * torch.special.erfc(-x.double() / 2**0.5)
    assert ((got - truth).abs() <= 1e-5 * truth.abs() + 1e-37).all()
    near = x > -1
    assert ((got - truth).abs()[near] <= 5e-7 * truth.abs()[near] + 1e-37).all()


def test_strided_rows_cpu(isa):
    x, weight, bias, _ = draw(40, 48, 32, torch.float32)
    packed = PackedLinear(weight, bias)
    wide, out = torch.randn(40, 3, 48), torch.full((40, 2, 32), 7.0)
    wide[:, 1] = x
    assert packed(wide[:, 1], out=out[:, 1]).data_ptr() == out[:, 1].data_ptr()
    assert torch.equal(out[:, 1], packed(x))
    assert (out[:, 0] == 7).all()
    assert torch.equal(packed(x.t().contiguous().t()), packed(x))
    assert torch.equal(PackedLinear(weight.t().contiguous().t(), bias)(x), packed(x))


def test_threads_change_nothing_cpu():
    x, weight, bias, residual = draw(300, 96, 200, torch.float32)
    packed, before, found = PackedLinear(weight, bias), torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(packed(x, gelu=True, residual=residual))
    torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_no_rows_cpu():
    assert PackedLinear(torch.ones(3, 4), None)(torch.empty(0, 4)).shape == (0, 3)


def test_other_dtype_cpu():
    with pytest.raises(TypeError, match=r"x must have the dtype of the packed weights, torch.float32, got torch.bfl"):
        PackedLinear(torch.ones(3, 4), None)(torch.ones(2, 4, dtype=torch.bfloat16))
    with pytest.raises(TypeError, match=r"weight must be float32, bfloat16 or float16, got torch.float64"):
        PackedLinear(torch.ones(3, 4, dtype=torch.float64), None)


def test_other_size_cpu():
    with pytest.raises(ValueError, match=r"x must be \(M, 4\), got \(2, 5\)"):
        PackedLinear(torch.ones(3, 4), None)(torch.ones(2, 5))
    with pytest.raises(ValueError, match=r"out must be \(2, at most 3\), got \(2, 4\)"):
        PackedLinear(torch.ones(3, 4), None)(torch.ones(2, 4), out=torch.empty(2, 4))


def test_other_residuals_and_outputs_cpu():
    packed, x = PackedLinear(torch.ones(3, 4), None), torch.ones(2, 4)
    with pytest.raises(ValueError, match=r"residual must be \(2, 3\), got \(1, 3\)"):
        packed(x, residual=torch.ones(1, 3))
    with pytest.raises(TypeError, match=r"residual must be torch.float32, without gaps in a row, got torch.float64"):
        packed(x, residual=torch.ones(2, 3).double())
    with pytest.raises(TypeError, match=r"out must be torch.float32, without gaps"):
        packed(x, out=torch.empty(3, 2).t())
    with pytest.raises(TypeError, match=r"x must be float32, bfloat16 or float16, got torch.float64"):
        layer_norm(x.double(), torch.ones(4), torch.ones(4), 1e-5)


# Layer normalisation


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (40, 64), (33, 768), (3, 1000)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_norm_cpu(isa, dtype, size):
    """Rounding of float32 sums, of rows far from zero too, and of the output; into itself, and into columns."""
    x = (3 * torch.randn(size) + 5 * torch.randn(size[0], 1)).to(dtype)
    weight, bias = torch.randn(size[1]).to(dtype), torch.randn(size[1]).to(dtype)
    truth = F.layer_norm(x.double(), size[1:], weight.double(), bias.double(), 1e-5)
    got = layer_norm(x, weight, bias, 1e-5)
    assert got.dtype == dtype
    # Of one number the deviation is 0: nothing is left but the bias, and what the mean rounds.
    sums = 1e-6 * (
        1
        + x.double().abs().amax(dim=1, keepdim=True)
        / x.double().var(dim=1, keepdim=True, correction=0).add(1e-5).sqrt()
    )
    assert (
        (got.double() - truth).abs() <= torch.finfo(dtype).eps / 2 * truth.abs() + sums * (1 + weight.double().abs())
    ).all()
    wide = torch.full((size[0], size[1] + 3), 7.0).to(dtype)
    wide[:, 1:-2] = x
    assert layer_norm(wide[:, 1:-2], weight, bias, 1e-5, out=wide[:, 1:-2]).data_ptr() == wide[:, 1:].data_ptr()
    assert torch.equal(wide[:, 1:-2], got)
    assert (wide[:, [0, -2, -1]] == 7).all()


def test_layer_norm_of_no_rows_cpu():
    assert layer_norm(torch.empty(0, 8), torch.ones(8), torch.zeros(8), 1e-5).shape == (0, 8)


# Eight bits


def step(low, high, levels):
    """Return what an eighth bit is worth, of numbers from low to high and 0."""
    return (high.clamp(min=0) - low.clamp(max=0)) / levels


@pytest.mark.parametrize("vnni", [True, False])
@pytest.mark.parametrize("size", [(1, 1, 1), (13, 33, 17), (97, 130, 70), (31, 3072, 96)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_error_of_int8_cpu(monkeypatch, dtype, size, vnni):
    """Half a step of each weight and of each number in a row, of rows of many sizes, and what it is then rounded to."""
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: vnni)
    x, weight, bias, residual = draw(*size, dtype)
    x *= torch.logspace(-3, 3, len(x))[:, None].to(dtype)
    x[::5] = x[::5].abs()
    w, rows = weight.double(), x.double()
    w_step = w.abs().amax(dim=1) / 127
    x_step = step(rows.amin(dim=1), rows.amax(dim=1), 255 if vnni else 127)
    bound = rows.abs().sum(dim=1)[:, None] * w_step / 2 + x_step[:, None] / 2 * (
        w.abs().sum(dim=1) + size[1] * w_step / 2
    )
    # The zero is taken out of sums in float32.
    bound += 1e-6 * 255 * x_step[:, None] * w.abs().sum(dim=1) + 1e-6
    for has_bias in (True, False):
        for gelu in (True, False):
            got = Int8Linear(weight, bias if has_bias else None)(x, gelu=gelu, residual=residual)
            truth = exact(x, weight, bias if has_bias else None, gelu) + residual.double()
            assert got.dtype == dtype
            # GELU rises by 1.13 at most.
            assert ((got.double() - truth).abs() <= 1.13 * bound + torch.finfo(dtype).eps * truth.abs()).all()


def test_int8_of_rows_of_zeros_and_of_none_cpu():
    _, weight, bias, _ = draw(1, 8, 6, torch.float32)
    packed = Int8Linear(weight, bias)
    torch.testing.assert_close(packed(torch.zeros(3, 8)), bias.expand(3, 6))
    assert packed(torch.empty(0, 8), gelu=True).shape == (0, 6)
    assert not Int8Linear(torch.zeros(6, 8), None)(torch.randn(3, 8)).any()


def test_int8_into_columns_cpu():
    x, weight, bias, _ = draw(9, 16, 12, torch.float32)
    packed, out = Int8Linear(weight, bias), torch.full((9, 10), 7.0)
    assert packed(x, out=out[:, 2:7]).data_ptr() == out[:, 2:7].data_ptr()
    assert torch.equal(out[:, 2:7], packed(x)[:, :5])
    assert (out[:, [0, 1, 7, 8, 9]] == 7).all()


def test_int8_of_another_dtype_cpu(monkeypatch):
    with pytest.raises(TypeError, match=r"weight must be float32 or bfloat16 to be rounded to int8, got torch.float16"):
        Int8Linear(torch.ones(3, 4, dtype=torch.float16), None)
    with pytest.raises(TypeError, match=r"x must have the dtype of the packed weights, torch.float32, got torch.bfl"):
        Int8Linear(torch.ones(3, 4), None)(torch.ones(2, 4, dtype=torch.bfloat16))
    monkeypatch.setattr(torch.ops, "onednn", object())
    with pytest.raises(NotImplementedError, match="got a torch without its int8 products"):
        Int8Linear(torch.ones(3, 4), None)
