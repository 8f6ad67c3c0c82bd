"""Linear layers in inference on the CPU, their weights packed once, and layer normalisation.

`PackedLinear` runs in the C++ core: bias, GELU and residual in one pass. `Int8Linear` rounds to 8 bits, by oneDNN.
"""

import torch
from torch import Tensor

from luke_kernels import _C
from luke_kernels.ops.backends.parameters import DTYPE_NAMES

# Of a scale: rows may be zero.
SMALLEST = 1e-30
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class PackedLinear:
    """Weights as the kernels of this CPU read them.

    In bfloat16 and float16 sums are kept in float32; where the CPU has no units for the dtype, the packed weights are
    float32 too.

    Args:
        weight: (N, K), float32, bfloat16 or float16.
        bias: (N,), or None; not copied.

    Raises:
        TypeError: the weights are of another dtype.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None):
        if weight.dtype not in DTYPES:
            raise TypeError(f"weight must be float32, bfloat16 or float16, got {weight.dtype}")
        self.out_size, self.in_size = weight.shape
        self.dtype, self.bias = weight.dtype, None if bias is None else bias.detach().contiguous()
        weight = weight.detach()
        if weight.stride(1) != 1:
            weight = weight.contiguous()
        dtype = getattr(_C.DType, DTYPE_NAMES[self.dtype])
        size = _C.linear_packed_bytes_cpu(dtype, self.in_size, self.out_size)
        # Zeros: where columns are no multiple of a panel, products read on.
        self.packed = torch.zeros(size, dtype=torch.uint8, device="cpu")
        _C.linear_pack_cpu(
            dtype, weight.data_ptr(), weight.stride(0), self.in_size, self.out_size, self.packed.data_ptr()
        )

    def __call__(
        self, x: Tensor, *, gelu: bool = False, residual: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        """Return f(x W^T + b) + residual, (M, K) -> (M, N), where f is the exact GELU or nothing.

        Rows may be strided; `out` (M, N) is written to where it is given, or (M, n) to get the first n columns.
        """
        _check(self, x, residual, out)
        if out is None:
            out = x.new_empty(x.shape[0], self.out_size)
        x, residual = _rows(x), None if residual is None else _rows(residual)
        _C.linear_cpu(
            getattr(_C.DType, DTYPE_NAMES[self.dtype]),
            x.shape[0],
            self.in_size,
            out.shape[1],
            (x.data_ptr(), x.stride(0)),
            self.packed.data_ptr(),
            0 if self.bias is None else self.bias.data_ptr(),
            (0, 0) if residual is None else (residual.data_ptr(), residual.stride(0)),
            (out.data_ptr(), out.stride(0)),
            gelu,
            torch.get_num_threads(),
        )
        return out


class Int8Linear:
    """Weights in int8, a scale for each output, and rows in 8 bits, a scale and a zero for each, found in each call.

        W = s_n w,   x = t_m (q - z_m),   x W^T = s_n t_m (q w^T - z_m sum_k w)

    Products by oneDNN, whose sums are int32. One scale for all rows would lose most of them: a model's first words
    have far larger numbers than others.

    Args:
        weight: (N, K), float32 or bfloat16.
        bias: (N,), or None.

    Raises:
        TypeError: the weights are of another dtype.
        NotImplementedError: torch was built without oneDNN's int8 products.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None):
        if weight.dtype not in (torch.float32, torch.bfloat16):
            raise TypeError(f"weight must be float32 or bfloat16 to be rounded to int8, got {weight.dtype}")
        if not hasattr(torch.ops.onednn, "qlinear_pointwise"):
            raise NotImplementedError("weights must be rounded for oneDNN, got a torch without its int8 products")
        self.out_size, self.in_size = weight.shape
        self.dtype = weight.dtype
        weight = weight.detach().float()
        self.scales = weight.abs().amax(dim=1).div_(127).clamp_(min=SMALLEST)
        self.zeros = torch.zeros(self.out_size, dtype=torch.int32, device="cpu")
        rounded = (weight / self.scales[:, None]).round_()
        self.packed = torch.ops.onednn.qlinear_prepack(rounded.to(torch.int8), None)
        sums = rounded.sum(dim=1) * self.scales
        self.sums_bias = torch.stack([sums, torch.zeros_like(sums) if bias is None else bias.detach().float()])

    def __call__(
        self, x: Tensor, *, gelu: bool = False, residual: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        """As of `PackedLinear`."""
        _check(self, x, residual, out)
        if len(x):
            q, scales, zeros = _quantize(x)
            y = torch.ops.onednn.qlinear_pointwise(
                *(q, 1.0, 0, self.packed, self.scales, self.zeros, None, 1.0, 0, torch.float32, "none", [], "none")
            )
            y.mul_(scales[:, None]).addmm_(
                torch.stack([-scales * zeros, torch.ones_like(scales)], dim=1), self.sums_bias
            )
        else:
            y = torch.empty(0, self.out_size, device="cpu")
        if gelu:
            y = torch.ops.aten.gelu_(y)
        if residual is not None:
            y += residual
        return y.to(self.dtype) if out is None else out.copy_(y[:, : out.shape[1]])


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    """Normalise rows (M, C), float32, bfloat16 or float16, in the C++ core; `out` may be `x` itself.

    Args:
        weight, bias: (C,), without gaps, in the dtype of `x`.
    """
    if x.dtype not in DTYPES:
        raise TypeError(f"x must be float32, bfloat16 or float16, got {x.dtype}")
    if out is None:
        out = x.new_empty(x.shape)
    x = _rows(x)
    _C.layer_norm_cpu(
        getattr(_C.DType, DTYPE_NAMES[x.dtype]),
        x.shape[0],
        x.shape[1],
        (x.data_ptr(), x.stride(0)),
        weight.data_ptr(),
        bias.data_ptr(),
        eps,
        (out.data_ptr(), out.stride(0)),
        torch.get_num_threads(),
    )
    return out


def _check(linear: PackedLinear | Int8Linear, x: Tensor, residual: Tensor | None, out: Tensor | None) -> None:
    if x.shape[1:] != (linear.in_size,):
        raise ValueError(f"x must be (M, {linear.in_size}), got {tuple(x.shape)}")
    if x.dtype != linear.dtype:
        raise TypeError(f"x must have the dtype of the packed weights, {linear.dtype}, got {x.dtype}")
    if out is not None and (out.shape[0] != x.shape[0] or out.shape[1] > linear.out_size):
        raise ValueError(f"out must be ({x.shape[0]}, at most {linear.out_size}), got {tuple(out.shape)}")
    if residual is not None and residual.shape != (x.shape[0], linear.out_size):
        raise ValueError(f"residual must be ({x.shape[0]}, {linear.out_size}), got {tuple(residual.shape)}")
    for name, tensor in (("residual", residual), ("out", out)):
        if tensor is not None and (tensor.dtype != x.dtype or (name == "out" and tensor.stride(1) != 1)):
            raise TypeError(f"{name} must be {x.dtype}, without gaps in a row, got {tensor.dtype}")


def _quantize(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows in uint8, their scales and their zeros (M,): x = scale (q - zero)."""
    # Without VNNI pairs of products are summed in 16 bits.
    levels = 255 if torch.cpu._is_vnni_supported() else 127
    x = x.float()
    low, high = torch.aminmax(x, dim=1)
    low, high = low.clamp_(max=0), high.clamp_(min=0)
    scales = ((high - low) / levels).clamp_(min=SMALLEST)
    # Rounded down, so that none comes to more than 255; and with a half more, to cut off what follows the point rounds.
    zeros = (low / scales).neg_().floor_()
    return torch.addcmul((zeros + 0.5)[:, None], x, (1 / scales)[:, None]).to(torch.uint8), scales, zeros


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()
