"""Devices and dtypes by name."""

import torch

from secateur.errors import SecateurError, nearest

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
DTYPES = {str(kind).removeprefix("torch."): kind for kind in _FLOATS}


def find_device(name: str) -> torch.device:
    """The device of a name, once it is known to be there.

    Raises:
        SecateurError: It is unknown or not there, or holds no values.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise SecateurError(f"device {name!r} is unknown{nearest(name, ['cpu', 'cuda', 'cuda:0', 'mps'])}") from error
    if device.type == "meta":
        raise SecateurError("device 'meta' holds no weights; to look at a model without them, use meta_model")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # builds without CUDA assert
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SecateurError(f"device {name!r} is not available here ({first}); use 'cpu'") from error
    return device


def find_dtype(given: str | torch.dtype | None) -> torch.dtype | None:
    """The dtype of a name; None for the checkpoint's own.

    Raises:
        SecateurError: It is unknown, or no type of weights.
    """
    if given is None or given == "auto":
        return None
    if isinstance(given, torch.dtype):
        if not given.is_floating_point:
            raise SecateurError(f"dtype {given} is no type of weights; use one of {', '.join(DTYPES)}")
        return given
    found = DTYPES.get(given.removeprefix("torch."))
    if found is None:
        raise SecateurError(f"dtype {given!r} is unknown{nearest(given, [*DTYPES, 'auto'])}")
    return found
