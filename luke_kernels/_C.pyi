from collections.abc import Sequence

class DType:
    float32: DType
    float64: DType
    bfloat16: DType
    float16: DType

class Buffer:
    def __init__(self, data: int, token_stride: int, slot_stride: int, head_stride: int) -> None: ...

class Segments:
    def __init__(self, offsets: int, lengths: int, num_tokens: int, max_length: int) -> None: ...

class AttentionParams:
    dtype: DType
    batch_size: int
    num_heads: int
    head_dim: int
    stack: int
    segments: Sequence[Segments]
    projections: Sequence[Buffer]
    out: Sequence[Buffer]
    lse: Sequence[Buffer]
    dout: Sequence[Buffer]
    dprojections: Sequence[Buffer]
    scale: float
    dropout_p: float
    seed: int
    offset: int
    num_threads: int

def has_openmp() -> bool: ...
def cpu_isa() -> str: ...
def set_cpu_isa(name: str) -> None: ...
def multiply_add_cpu(dtype: DType, num_threads: int, rounds: int) -> int: ...
def attention_scratch_bytes_cpu(params: AttentionParams) -> int: ...
def attention_forward_cpu(params: AttentionParams) -> None: ...
def attention_backward_cpu(params: AttentionParams) -> None: ...
