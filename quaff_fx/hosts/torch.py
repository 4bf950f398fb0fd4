"""What quaff_fx knows of torch's own modules (read in torch 2.13): the fused encoder layer, recurrent modules."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import nn

_fastpath_lock = threading.Lock()
_fastpath_off = 0  # how many calls want it off
_fastpath_was_on = True


@contextlib.contextmanager
def without_mha_fastpath(model: nn.Module) -> Iterator[None]:
    """Turns off the fused kernels that `nn.MultiheadAttention` and `nn.TransformerEncoderLayer` run in evaluation.

    They take the weights of a whole layer, past its linears, and so leave out an adapter of these. The switch is
    torch's own and global: the last of several models that run at the same time turns it on again.
    """
    global _fastpath_off, _fastpath_was_on
    if not any(isinstance(module, nn.MultiheadAttention) for module in model.modules()):
        yield
        return
    with _fastpath_lock:
        if _fastpath_off == 0:
            _fastpath_was_on = torch.backends.mha.get_fastpath_enabled()
            torch.backends.mha.set_fastpath_enabled(False)
        _fastpath_off += 1
    try:
        yield
    finally:
        with _fastpath_lock:
            _fastpath_off -= 1
            if _fastpath_off == 0:
                torch.backends.mha.set_fastpath_enabled(_fastpath_was_on)


def untraced_modules(model: nn.Module) -> list[str]:
    """Returns the names of recurrent modules of torch: Dynamo skips every function that calls one.

    Empty where ``torch._dynamo.config.allow_rnn`` is on.
    """
    if torch._dynamo.config.allow_rnn:
        return []
    return [name for name, module in model.named_modules() if isinstance(module, nn.RNNBase)]
