class DType:
    float32: DType
    float64: DType
    bfloat16: DType
    float16: DType

Buffer = tuple[int, int, int, int]  # address; strides of tokens, slots, heads, in elements
Segments = tuple[int, int, int, int]  # addresses of offsets and of lengths, 0 for none; number of tokens, max_length

class AttentionParams:
    def __init__(
        self,
        dtype: DType,
        batch_size: int,
        stack: int,
        num_heads: int,
        head_dim: int,
        segments: tuple[Segments, Segments],
        projections: tuple[Buffer, Buffer],
        out: Buffer,
        lse: Buffer,
        scale: float,
        dropout_p: float,
        seed: int,
        offset: int,
        num_threads: int,
        /,
    ) -> None: ...

def has_openmp() -> bool: ...
def cpu_isa() -> str: ...
def set_cpu_isa(name: str) -> None: ...
def multiply_add_cpu(dtype: DType, num_threads: int, rounds: int) -> int: ...
def attention_scratch_bytes_cpu(params: AttentionParams) -> int: ...
def attention_forward_cpu(params: AttentionParams) -> None: ...
def attention_backward_cpu(
    params: AttentionParams, dout: tuple[Buffer, Buffer], dprojections: tuple[Buffer, Buffer], /
) -> None: ...
def linear_packed_bytes_cpu(dtype: DType, in_size: int, out_size: int, /) -> int: ...
def linear_pack_cpu(dtype: DType, weight: int, stride: int, in_size: int, out_size: int, packed: int, /) -> None: ...

Matrix = tuple[int, int]  # address, 0 for none; stride of rows, in elements

def linear_cpu(
    dtype: DType,
    rows: int,
    in_size: int,
    out_size: int,
    x: Matrix,
    packed: int,
    bias: int,
    residual: Matrix,
    out: Matrix,
    gelu: bool,
    num_threads: int,
    /,
) -> None: ...
def layer_norm_cpu(
    dtype: DType, rows: int, size: int, x: Matrix, weight: int, bias: int, eps: float, out: Matrix, num_threads: int, /
) -> None: ...

# Where the extension was built with CUDA. `seed` is an address on the device.
def cuda_architectures() -> str: ...
def cuda_missing(device: int) -> str: ...
def attention_forward_cuda(params: AttentionParams, device: int, stream: int, seed: int, /) -> None: ...
def attention_backward_cuda(
    params: AttentionParams,
    device: int,
    stream: int,
    seed: int,
    dout: tuple[Buffer, Buffer],
    dprojections: tuple[Buffer, Buffer],
    statistics: int,
    /,
) -> None: ...
