"""`graphs`: every traced graph as it was captured, rewritten and lowered."""

from __future__ import annotations

from torch import nn

from quaff_fx.api import stages_of
from quaff_fx.backend import Graph


def graphs(model: nn.Module) -> tuple[Graph, ...]:
    """Returns the graphs traced so far for `model`, oldest first; none while it calibrates.

    Blocks of one class share theirs.

    Raises:
        ConfigError: the model was not compiled by quaff_fx.
    """
    return tuple(stages_of(model).graphs)
