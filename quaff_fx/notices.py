"""What is said once while a model is trained, where something would otherwise never happen without a word."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import nn

from quaff_fx import hosts
from quaff_fx.errors import QuaffWarning
from quaff_fx.forwards import is_in_backward

UNHEARD_LIMIT = 16
"""So many forwards with gradients, one after the other, may go without a backward."""

HOOKED_LIMIT = 8
"""So many forwards with gradients may run a block eagerly because of a hook in it."""


class Notices:
    """Warns of a model, each thing once.

    Args:
        model: the root, for the names of its modules.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._said: set[str] = set()
        self._unheard = 0
        self._hooked: dict[int, int] = {}

    def step_was_counted(self) -> None:
        """A backward was heard."""
        self._unheard = 0

    def forward_was_observed(self, steps: int, wanted: int, awaited: int) -> None:
        """Warns when forwards with gradients go on without a backward: then nothing ever becomes int8.

        Args:
            steps: counted, of how many `wanted`. awaited: earlier forwards whose graph is alive.
        """
        self._unheard += 1
        if self._unheard >= max(UNHEARD_LIMIT, 2 * wanted):
            self._warn_once(
                "unheard",
                f"model: ran {self._unheard} forwards with gradients and none of their backwards was seen, expected "
                f"training steps: its weights stay in float until {wanted} steps are counted ({steps} are) and no "
                f"output of an earlier forward is kept with its graph ({awaited} are). Put an evaluation under "
                "torch.no_grad(), or call quaff_fx.calibrate(model, batches).",
            )

    def nothing_was_read(self, weights: int, readers: Sequence[str]) -> None:
        """Warns that no linear has read any of the frozen `weights`, only `readers`."""
        self._warn_once(
            "read",
            f"model: no linear reads any of its {weights} frozen weights (but {', '.join(readers)} does), expected one "
            "that does. What stays so is left in float, with its reason in quaff_fx.explain(model).",
        )

    def block_was_hooked(self, block: nn.Module, hooked: nn.Module) -> None:
        """Warns when a block goes on running eagerly in training because `hooked`, inside it, has a hook."""
        if not torch.is_grad_enabled() or is_in_backward():
            return
        self._hooked[id(block)] = self._hooked.get(id(block), 0) + 1
        if self._hooked[id(block)] >= HOOKED_LIMIT:
            self._warn_once(
                "hooked",
                f"{self._name(hooked)}: has a hook and lies in a block, expected none while training: the block runs "
                "eagerly, in int8 but slower, so that the hook is called. Hooks on the blocks themselves cost nothing.",
            )

    def recurrent_modules(self, blocks: Sequence[nn.Module]) -> None:
        """Warns if a block calls a module that Dynamo does not trace, before the first step."""
        for block in blocks:
            if skipped := hosts.untraced_modules(block):
                self._warn_once(
                    "untraced",
                    f"{self._name(block)}: calls {', '.join(skipped)}, a recurrent module of torch, which Dynamo "
                    "does not trace, expected a graph. What is around it will run eagerly, in int8 but slower. Set "
                    "torch._dynamo.config.allow_rnn = True before training, or move it out of the module.",
                )

    def block_was_untraced(self, block: nn.Module) -> None:
        """Warns that the first compiled call of a block has made no graph at all."""
        self._warn_once(
            "untraced",
            f"{self._name(block)}: was not traced by torch.compile, expected a graph. It runs eagerly, in int8 but "
            "slower. Move what cannot be traced out of the module; TORCH_LOGS=graph_breaks names it.",
        )

    def _name(self, module: nn.Module) -> str:
        names = (name for name, other in self._model.named_modules() if other is module)
        return next(names, "") or type(module).__name__

    def _warn_once(self, what: str, text: str) -> None:
        if what not in self._said:
            self._said.add(what)
            warnings.warn(text, QuaffWarning, stacklevel=4)
