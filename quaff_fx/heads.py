"""The loss of a head as it is compiled; `weights/logits.py` calls it for some tokens at a time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quaff_fx import distributed
from quaff_fx.sites import Site
from quaff_fx.weights import owners
from quaff_fx.weights.logits import Steps


class HeadLoss(nn.Module):
    """The product of a head, what the model does to its logits, and the cross entropy of each token."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.name = site.name.rpartition(".")[2]
        self.parameter = site.parameter
        self.add_module(self.name, site.module)

    def quaff_forward(
        self, x: Tensor, bias: Tensor | None, labels: Tensor, steps: Steps, ignore_index: int, label_smoothing: float
    ) -> Tensor:
        """Returns the cross entropy of tokens (T,): of the rows of x (T, K) and their labels (T,) int64."""
        weight = owners.states_of(self._modules[self.name])[self.parameter].dequantized()  # type: ignore[arg-type]
        logits = nn.functional.linear(x, weight, bias)
        for name, *numbers in steps:
            logits = getattr(logits, name)(*numbers)
        return token_losses(logits, labels, ignore_index, label_smoothing)


def token_losses(logits: Tensor, labels: Tensor, ignore_index: int, label_smoothing: float) -> Tensor:
    """Returns `torch.nn.functional.cross_entropy` with ``reduction="none"``, of logits (T, N).

    In a form whose gradient is one pass over the logits: what Inductor makes of the op itself adds up one-hot rows.
    """
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = torch.logsumexp(z, dim=1)
    is_label = torch.arange(z.shape[1], device=z.device) == labels.unsqueeze(1)
    losses = total - torch.where(is_label, z, 0.0).sum(dim=1)
    if label_smoothing:
        losses = (1 - label_smoothing) * losses + label_smoothing * (total - z.mean(dim=1))
    losses = torch.where(labels == ignore_index, 0.0, losses)
    return losses if torch.is_autocast_enabled(z.device.type) else losses.to(logits.dtype)


def defer_logits(model: nn.Module, sites: list[Site], compiled: Callable[..., Any]) -> None:
    """Makes the heads among quantized `sites` of a model give logits that are computed where they are read.

    Args:
        compiled: runs the ``quaff_forward`` of a module, (module, args, kwargs).
    """
    for site in sites:
        weight = owners.quantized_in(site.module).get(site.parameter)
        if weight is not None and site.is_head:
            weight.defer_logits(_losses(HeadLoss(site), compiled), partial(_is_gathered_alone, model, site.module))


def _is_gathered_alone(model: nn.Module, head: nn.Module) -> bool:
    """Whether the weight of a head is there only while the head runs, or a module between it and the model."""
    if not distributed.is_initialized():  # nor is a model to be looked into that is being unpickled
        return False
    around = (module for module in model.modules() if module is not model and distributed.is_gathered_alone(module))
    return any(child is head for module in around for child in module.modules())


def _losses(loss: HeadLoss, compiled: Callable[..., Any]) -> Callable[..., Tensor]:
    def token_losses(*arguments: Any) -> Tensor:
        losses: Tensor = compiled(loss, arguments, {})
        return losses

    return token_losses
