"""LUKE on fused entity-aware attention."""

from luke_kernels.attention import EntityAwareSelfAttention
from luke_kernels.config import LukeConfig
from luke_kernels.encode import TextVectors, encode
from luke_kernels.heads import (
    LukeForEntityClassification,
    LukeForEntityPairClassification,
    LukeForEntitySpanClassification,
    LukeForMaskedLM,
    LukeForMultipleChoice,
    LukeForQuestionAnswering,
    LukeForSequenceClassification,
    LukeForTokenClassification,
)
from luke_kernels.integrations import accelerate, restore
from luke_kernels.model import LukeModel, LukePreTrainedModel
from luke_kernels.ops import (
    available_backends,
    entity_aware_attention,
    entity_aware_attention_varlen,
    explain_backends,
    stack_projections,
)
from luke_kernels.packing import PackedBatch, PackedLengths
from luke_kernels.tokenizer import LukeTokenizer
from luke_kernels.tuning import tune
from luke_kernels.version import __version__

__all__ = [
    "EntityAwareSelfAttention",
    "LukeConfig",
    "LukeForEntityClassification",
    "LukeForEntityPairClassification",
    "LukeForEntitySpanClassification",
    "LukeForMaskedLM",
    "LukeForMultipleChoice",
    "LukeForQuestionAnswering",
    "LukeForSequenceClassification",
    "LukeForTokenClassification",
    "LukeModel",
    "LukePreTrainedModel",
    "LukeTokenizer",
    "PackedBatch",
    "PackedLengths",
    "TextVectors",
    "__version__",
    "accelerate",
    "available_backends",
    "encode",
    "entity_aware_attention",
    "entity_aware_attention_varlen",
    "explain_backends",
    "restore",
    "stack_projections",
    "tune",
]
