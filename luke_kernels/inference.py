"""The encoder's layers in inference on the CPU: the same sums as `model.Layer`, by kernels that read packed weights."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luke_kernels.ops.attention import attend_joint
from luke_kernels.ops.layout import Layout
from luke_kernels.ops.linear import DTYPES, Int8Linear, PackedLinear, layer_norm
from luke_kernels.plain import PlainLayers


class PackedLayers:
    """Packed copies of layers' weights. The layers keep their own, and nothing of them is changed.

    Args:
        layers: `model.Layer`s on the CPU.
        dtype: What the layers compute in; None: the dtype of their weights.
        weight_dtype: torch.int8 to round weights, and the rows they are multiplied by, to 8 bits; None: `dtype`.

    Raises:
        ValueError, TypeError: a layer is not on the CPU, in another dtype than float32, bfloat16 and float16 (to be
            rounded, float16 too), or has a part that is not the plain module it was.
        NotImplementedError: torch cannot multiply int8 here.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        dtype: torch.dtype | None = None,
        weight_dtype: torch.dtype | None = None,
    ):
        if weight_dtype not in (None, torch.int8):
            raise ValueError(f"weight_dtype must be torch.int8 or None, got {weight_dtype}")
        self._plain = PlainLayers(layers, new_values_count=True)
        self.weights = parameters = self._plain.weights
        for parameter in parameters:
            if parameter.device.type != "cpu":
                raise ValueError(f"device must be cpu to be optimized for inference, got {parameter.device}")
        self.dtype = dtype or (parameters[0].dtype if parameters else torch.float32)
        if self.dtype not in DTYPES:
            raise TypeError(f"dtype must be float32, bfloat16 or float16 for inference, got {self.dtype}")
        linear = PackedLinear if weight_dtype is None else Int8Linear
        self.layers = [PackedLayer(layer, self.dtype, linear) for layer in layers]

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """A copy of a model, or one that was pickled, has other weights and is not optimized."""
        return type(None), ()

    def choose(self, num_layers: int | None, one_by_one: bool) -> list[Callable[..., Tensor]]:
        """Return what runs the first layers in turn, each as a `model.Layer` is called, in one call of the model."""
        workspace = Workspace()
        return [partial(layer, workspace) for layer in self.layers[:num_layers]]

    def check(self) -> None:
        """Refuse weights that are no longer those that were packed."""
        self._plain.check()


class Workspace:
    """Memory that the layers of one call use in turn: what is fresh costs a page fault every 4 KB."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """Return (rows, columns) of what lies under the name, whatever it holds."""
        size, buffer = rows * columns, self._buffers.get(name)
        if buffer is None or buffer.numel() < size:
            buffer = self._buffers[name] = torch.empty(size, dtype=dtype, device="cpu")
        return buffer[:size].view(rows, columns)


class PackedLayer:
    """One layer, (Tw + Te, C) -> the same, or (R, C)."""

    def __init__(self, layer: Any, dtype: torch.dtype, linear: type[PackedLinear] | type[Int8Linear]):
        def pack(*linears: nn.Linear) -> PackedLinear | Int8Linear:
            """Pack layers of the same input as one."""
            weight = torch.cat([each.weight.to(dtype) for each in linears])
            return linear(weight, torch.cat([each.bias.to(dtype) for each in linears]))

        attention = layer.attention["self"]
        self.num_heads, self.backend = attention.num_heads, attention.backend
        self.activation = layer.activation
        self.entity_aware = attention.entity_aware
        # Side by side as they lie in a token's slots.
        self.queries = pack(attention.query, *([attention.w2e_query] if self.entity_aware else []))
        self.entity_queries = pack(attention.e2w_query, attention.e2e_query) if self.entity_aware else None
        self.keys_values = pack(attention.key, attention.value)
        self.attention_output = pack(layer.attention["output"].dense)
        self.attention_norm = _norm(layer.attention["output"].LayerNorm, dtype)
        self.intermediate = pack(layer.intermediate["dense"])
        self.output = pack(layer.output.dense)
        self.output_norm = _norm(layer.output.LayerNorm, dtype)

    def __call__(
        self, workspace: Workspace, hidden: Tensor, num_words: int, layout: Layout, rows: Tensor | None = None
    ) -> Tensor:
        def place(name: str, linear: PackedLinear | Int8Linear) -> Tensor | None:
            # Int8Linear would copy to it.
            if isinstance(linear, Int8Linear):
                return None
            return workspace.take(name, len(hidden), linear.out_size, hidden.dtype)

        hidden = hidden.to(self.intermediate.dtype)
        projections = self._project(workspace, hidden, num_words)
        context = attend_joint(*projections, layout, 0.0, self.backend).flatten(-2)
        if rows is not None:
            hidden, context = hidden.index_select(0, rows), context.index_select(0, rows)
        attended = self.attention_output(context, residual=hidden, out=place("attended", self.attention_output))
        layer_norm(attended, *self.attention_norm, out=attended)
        is_gelu = self.activation is F.gelu
        inner = self.intermediate(attended, gelu=is_gelu, out=place("inner", self.intermediate))
        output = self.output(inner if is_gelu else self.activation(inner), residual=attended)
        return layer_norm(output, *self.output_norm, out=output)

    def _project(self, workspace: Workspace, hidden: Tensor, num_words: int) -> tuple[Tensor, Tensor | None]:
        """Project as `attention.project_joint` does: (Tw + Te, slots, H, D), cut into words and entities."""
        tokens, size = hidden.shape
        has_entities = tokens > num_words
        if self.entity_queries is not None and has_entities:
            slots = workspace.take("slots", tokens, 4 * size, hidden.dtype).unflatten(1, (4, size))
            queries, keys_values = slots.flatten(1).split(2 * size, dim=1)
            self.queries(hidden[:num_words], out=queries[:num_words])
            self.entity_queries(hidden[num_words:], out=queries[num_words:])
        else:
            slots = workspace.take("slots", tokens, 3 * size, hidden.dtype).unflatten(1, (3, size))
            queries, keys_values = slots.flatten(1).split([size, 2 * size], dim=1)
            self.queries(hidden, out=queries)
        self.keys_values(hidden, out=keys_values)
        heads = slots.unflatten(-1, (self.num_heads, -1))
        return heads[:num_words], heads[num_words:] if has_entities else None


def _norm(norm: nn.LayerNorm, dtype: torch.dtype) -> tuple[Tensor, Tensor, float]:
    return norm.weight.detach().to(dtype).contiguous(), norm.bias.detach().to(dtype).contiguous(), norm.eps
