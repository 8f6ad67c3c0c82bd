"""Linear layers in inference on the CPU, by the C++ core: weights packed once; bias, GELU and residual in one pass."""

import torch
from torch import Tensor

from luke_kernels import _C
from luke_kernels.ops.backends.parameters import DTYPE_NAMES

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
        self.packed = torch.zeros(size, dtype=torch.uint8)
        _C.linear_pack_cpu(
            dtype, weight.data_ptr(), weight.stride(0), self.in_size, self.out_size, self.packed.data_ptr()
        )

    def __call__(
        self, x: Tensor, *, gelu: bool = False, residual: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        """Return f(x W^T + b) + residual, (M, K) -> (M, N), where f is the exact GELU or nothing.

        Rows may be strided; `out` (M, N) is written to where it is given, or (M, n) to get the first n columns.
        """
        if x.shape[1:] != (self.in_size,):
            raise ValueError(f"x must be (M, {self.in_size}), got {tuple(x.shape)}")
        if x.dtype != self.dtype:
            raise TypeError(f"x must have the dtype of the packed weights, {self.dtype}, got {x.dtype}")
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


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()
