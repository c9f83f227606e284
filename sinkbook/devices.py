"""Where tensors are computed: one choice of the device for everything that takes a `device`."""

from typing import TYPE_CHECKING, Union

from sinkbook.errors import SinkbookError

if TYPE_CHECKING:  # the command line names devices without importing torch
    import torch


def check_device(name: Union[str, "torch.device"]) -> None:
    """Refuse a word that is the name of no device."""
    import torch

    try:
        torch.device(name)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise SinkbookError(f"`device={name!r}` is no device ({reason}). Try 'cpu'.") from error


def device_of(name: Union[str, "torch.device"] = "auto") -> "torch.device":
    """The device of that name; "auto" is CUDA where there is one, else the CPU.

    Raises `SinkbookError` for a device that is unknown, or that cannot be used here.
    """
    import torch

    if not isinstance(name, str | torch.device):
        raise SinkbookError(f"`device={name!r:.60}` is no device. Give 'auto', 'cpu' or 'cuda'.")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise SinkbookError(
            f"device {str(name)!r} cannot be used here ({reason}). Try 'auto' or 'cpu'."
        ) from error
