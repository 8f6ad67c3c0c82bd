"""Layers that run as something else than their modules: whether their modules are, and still are, what was read."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class PlainLayers:
    """The weights of `model.Layer`s, their modules plain: no hooks, no adapters, nothing quantised.

    Args:
        layers: The layers.
        new_values_count: Whether weights changed in place are other weights.

    Raises:
        ValueError: a module is not the plain one it was.
    """

    def __init__(self, layers: Sequence[nn.Module], new_values_count: bool):
        self.new_values_count = new_values_count
        self._modules: list[nn.Module] = []
        self._children: list[tuple[nn.Module, str, nn.Module]] = []
        self._parameters: list[tuple[nn.Module, str, Tensor, tuple[int, int]]] = []
        for number, layer in enumerate(layers):
            for name, module in layer.named_modules():
                self._modules.append(module)
                self._children += [
                    (module, child, value) for child, value in module._modules.items() if value is not None
                ]
                if not isinstance(module, nn.Linear | nn.LayerNorm) and not list(module.parameters(recurse=False)):
                    if _is_hooked(module):
                        raise ValueError(f"layer.{number}.{name} must be without hooks to be optimized, got {module}")
                    continue
                kind = nn.LayerNorm if name.endswith("LayerNorm") else nn.Linear
                parts = [vars(module)["_parameters"].get(part) for part in ("weight", "bias")]
                if type(module) is not kind or _is_hooked(module) or any(type(p) is not nn.Parameter for p in parts):
                    raise ValueError(
                        f"layer.{number}.{name} must be a plain {kind.__name__} without hooks, with weight and bias, "
                        f"got {module}"
                    )
                self._parameters += [(module, part, p, self._state(p)) for part, p in module._parameters.items()]  # type: ignore[arg-type, misc]

    @property
    def weights(self) -> list[Tensor]:
        return [parameter for _, _, parameter, _ in self._parameters]

    def check(self) -> None:
        """Refuse modules, weights and hooks that are no longer those that were read.

        Writes through `weight.data` are not seen.
        """
        same = (
            all(module._modules.get(name) is child for module, name, child in self._children)
            and all(
                module._parameters.get(name) is parameter and self._state(parameter) == state
                for module, name, parameter, state in self._parameters
            )
            and not any(map(_is_hooked, self._modules))
        )
        if not same:
            raise RuntimeError(
                "weights, modules and hooks must stay as they were at optimize_for_inference, got others: call "
                "optimize_for_inference again"
            )

    def _state(self, parameter: Tensor) -> tuple[int, int]:
        # Tensors made in inference mode have no version.
        counts = self.new_values_count and not parameter.is_inference()
        return parameter.data_ptr(), parameter._version if counts else 0


def _is_hooked(module: nn.Module) -> Any:
    own = vars(module)
    return "forward" in own or any(own[hooks] for hooks in _HOOKS)


def need_gradients(hidden: Tensor, weights: Sequence[Tensor]) -> bool:
    """Return whether a call on these states would be recorded by autograd."""
    return torch.is_grad_enabled() and (hidden.requires_grad or any(weight.requires_grad for weight in weights))
