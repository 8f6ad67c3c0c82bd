"""What puts models of other frameworks on fused attention; each framework is imported only when asked for."""

from typing import TypeVar

from torch import nn

Model = TypeVar("Model", bound=nn.Module)


def accelerate(model: Model, backend: str = "auto") -> Model:
    """Put a transformers LUKE on fused attention, in place: the same numbers, without padding and without scores.

    Masks are read and sequences packed once a forward. Modules, parameters, state dict, `save_pretrained`, adapters,
    gradient checkpointing and training stay as they are. What differs:

    - Last hidden states are zero where no token exists; heads get those zeros. LukeForQuestionAnswering then gives such
      words the smallest logit, so that its loss is that of the same sequences without padding.
    - Hooks on the layers see the packed batch, all words, then all entities, as (1, Tw + Te, C), and on the projections
      the same without the 1.
    - Dropout in the attention draws other random numbers.
    - With `output_attentions` or `output_hidden_states`, transformers' own code runs.

    Args:
        model: A LukeModel or LukeFor... of transformers, or any module that contains one; of its encoder and of the
            embeddings of its entities the code must be transformers' own.
        backend: As in `luke_kernels.entity_aware_attention`.

    Returns:
        `model` itself. Calling again sets another backend; `restore` undoes it.

    Raises:
        ValueError, TypeError: there is no such encoder in `model`, or one with code of its own; backend unknown. Later,
            from the model: a mask does not say which tokens exist but which pairs attend, or a `head_mask` is given.
        ImportError: transformers is not installed.
    """
    from luke_kernels.integrations import transformers

    return transformers.accelerate(model, backend)


def restore(model: Model) -> Model:
    """Undo `accelerate`, in place: all code is transformers' own again. A model that is not accelerated stays as is."""
    from luke_kernels.integrations import transformers

    return transformers.restore(model)
