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
