"""Losses of texts, token by token, in nats."""

from inspect import signature

import numpy as np
import torch
import torch.nn.functional as F
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from sinkbook.annotations import check_arguments
from sinkbook.arguments import check_token_ids, whole_number
from sinkbook.errors import NotFiniteError, SinkbookError
from sinkbook.models.partial_forward import logits_of
from sinkbook.models.wrappers import AnyModel, computing_device, evaluating, taking, unwrapped

Tokens = Int[Tensor, "text position"]

AT_ONCE = 512  # tokens: the logits of a large vocabulary are the largest thing in memory


def next_token_loss(
    logits: Float[Tensor, "text position symbol"], texts: Int[Tensor, "text _longer"]
) -> Float[Tensor, ""]:
    """Mean cross-entropy of each next token, over all texts and positions, in nats.

    `logits` are those of `texts` without their last token.
    """
    return F.cross_entropy(logits.flatten(0, 1).float(), texts[:, 1:].flatten())


def next_token_losses(
    logits: Float[Tensor, "text _predicting symbol"], texts: Int[Tensor, "text position"]
) -> Float[Tensor, "text predicted"]:
    """Cross-entropy of every token but the first, in nats.

    `logits` are those of `texts`, with or without their last token.
    """
    targets = texts[:, 1:].long()
    if logits.shape[1] - targets.shape[1] not in (0, 1):
        raise SinkbookError(
            f"{logits.shape[1]} positions of logits do not belong to texts of {texts.shape[1]} "
            "tokens. The model must give logits at every position."
        )
    logits = logits[:, : targets.shape[1]].flatten(0, 1).float()
    losses = F.cross_entropy(logits, targets.flatten(), reduction="none")
    return losses.unflatten(0, targets.shape)


@check_arguments
@torch.no_grad()
def token_losses(
    model: AnyModel, input_ids: Tokens, *, last: int | None = None
) -> Float[np.ndarray, "text scored"]:
    """Loss of every token but the first given those before it, in nats; or of the `last` ones.

    `model` is any that `measure` takes, and reads without dropout. Raises `SinkbookError` for one
    without a head that predicts tokens, and `NotFiniteError` for a loss that is NaN or infinite.
    """
    model = unwrapped(model)
    check_token_ids("input_ids", input_ids)
    if input_ids.shape[1] < 2:
        raise SinkbookError(
            f"input_ids of shape {tuple(input_ids.shape)} have no next tokens. Give (text, "
            "position), two tokens or more of each text."
        )
    most = input_ids.shape[1] - 1
    last = most if last is None else whole_number("last", last, 1, most)
    losses, device = [], computing_device(model)
    cut_short = "logits_to_keep" in signature(model.forward).parameters
    with evaluating(model), taking(model, input_ids):
        for rows in input_ids.to(device).split(max(1, AT_ONCE // input_ids.shape[1])):
            if cut_short:
                logits = model(rows, use_cache=False, logits_to_keep=last + 1).logits
            else:
                logits = logits_of(model, rows)[:, -last - 1 :]
            losses.append(next_token_losses(logits, rows[:, -last - 1 :]).cpu().numpy())
    found = np.concatenate(losses)
    if not np.isfinite(found).all():
        text, token = np.argwhere(~np.isfinite(found))[0]
        raise NotFiniteError(
            f"{type(model).__name__}: the loss of the token at position "
            f"{input_ids.shape[1] - last + token} of text {text} is {found[text, token]}. The "
            "weights are damaged, or a number outgrew its dtype: load the model afresh, or in "
            "float32."
        )
    return found


@check_arguments
def perplexity(losses: xr.DataArray, *, after: int = 0) -> xr.DataArray:
    """The exponential of the mean loss of each text's tokens from position `after` on."""
    return np.exp(losses.sel(position=slice(after, None)).mean("position"))
