"""What puts models of other frameworks on fused attention; each framework is imported only when asked for."""

from typing import TypeVar

from torch import nn

Model = TypeVar("Model", bound=nn.Module)


def accelerate(model: Model, backend: str = "auto") -> Model:
    """Put a transformers LUKE on fused attention, in place: the same numbers where tokens exist.

    The encoder reads the mask and packs the tokens that exist, once a forward: it computes no padding and holds no
    scores. Modules, parameters, state dict, `save_pretrained`, adapters, gradient checkpointing and training stay as
    they are. What differs:

    - Last hidden states are zero where no token exists, and heads get those zeros. A head that reads the first column
      needs it to exist, so padding on the right; a warning says where it does not. LukeForQuestionAnswering gives words
      that do not exist the smallest logit, so that its loss is that of the same sequences without padding.
    - Hooks on layers and projections see the packed batch.
    - Dropout within the encoder draws other random numbers.
    - With `output_attentions` or `output_hidden_states`, the encoder runs transformers' own code.

    Args:
        model: A LukeModel or LukeFor... of transformers, or any module that contains one.
        backend: As in `luke_kernels.entity_aware_attention`.

    Returns:
        `model` itself. Calling again sets another backend; `restore` undoes it.

    Raises:
        ValueError, TypeError: `model` contains no LukeModel of transformers; the code of its encoder is not
            transformers' own, or wrapped; it lies on several devices, or feeds forward in chunks; backend unknown.
        ImportError: transformers is missing, or older than 4.57.

    The model itself then raises:
        ValueError: a mask says which pairs attend or adds to scores, and not which tokens exist; or there is a
            `head_mask`.
        NotImplementedError: the backend cannot serve the model's dtype or device.
        RuntimeError: it is traced.
    """
    from luke_kernels.integrations import transformers

    return transformers.accelerate(model, backend)


def restore(model: Model) -> Model:
    """Undo `accelerate`, in place: all code is transformers' own again.

    Args:
        model: As in `accelerate`; one that is not accelerated stays as it is.

    Returns:
        `model` itself.

    Raises:
        ValueError, TypeError: `model` contains no LukeModel of transformers, or was sharded since.
    """
    from luke_kernels.integrations import transformers

    return transformers.restore(model)
