"""What quaff_fx knows of several processes: their number, sums over them, and tensors that are sharded (DTensor)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def is_initialized() -> bool:
    """Tells whether this process is one of a group."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def processes() -> int:
    """How many processes train together."""
    return torch.distributed.get_world_size() if is_initialized() else 1


def summed(tensor: Tensor) -> Tensor:
    """Returns the sum of the tensors of all processes; that of each stays as it is."""
    if not is_initialized():
        return tensor
    total = tensor.clone()
    torch.distributed.all_reduce(total)
    return total


def largest(number: int, device: torch.device) -> int:
    """Returns the largest of the numbers of all processes, compared on `device`."""
    if not is_initialized():
        return number
    found = torch.tensor(number, dtype=torch.int64, device=device)
    torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX)
    return int(found)


def is_sharded(tensor: Tensor) -> bool:
    """Tells whether this process holds only a part of a tensor."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def is_gathered_alone(module: nn.Module) -> bool:
    """Tells whether FSDP2 gathers the weights of a module for its own forward, and no longer."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


def whole(tensor: Tensor) -> Tensor:
    """Returns a tensor whole, on every process, if it is sharded (FSDP2 shards int8 weights)."""
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full


def is_wrapper_among(objects: Iterable[object]) -> bool:
    """Tells whether a `DistributedDataParallel` is among objects; it holds all that it was built over."""
    return any(type(each) is nn.parallel.DistributedDataParallel for each in objects)
