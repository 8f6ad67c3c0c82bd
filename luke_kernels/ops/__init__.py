"""Functions on tensors."""

from luke_kernels.ops.attention import (
    available_backends,
    entity_aware_attention,
    entity_aware_attention_varlen,
    explain_backends,
    stack_projections,
)

__all__ = [
    "available_backends",
    "entity_aware_attention",
    "entity_aware_attention_varlen",
    "explain_backends",
    "stack_projections",
]
