"""LUKE on fused entity-aware attention."""

from luke_kernels.attention import EntityAwareSelfAttention
from luke_kernels.ops import (
    available_backends,
    entity_aware_attention,
    entity_aware_attention_varlen,
    explain_backends,
    stack_projections,
)
from luke_kernels.packing import PackedLengths
from luke_kernels.version import __version__

__all__ = [
    "EntityAwareSelfAttention",
    "PackedLengths",
    "__version__",
    "available_backends",
    "entity_aware_attention",
    "entity_aware_attention_varlen",
    "explain_backends",
    "stack_projections",
]
