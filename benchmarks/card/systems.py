"""How each system of `plan.py` makes the adapted model its own: those of `benchmarks/peers.py`, as a card wants them.

The model comes in the shape's dtype, its adapters too, so no system casts between adapter and base.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from benchmarks import peers
from benchmarks.card import plan


def with_tf32(prepare: Callable[[nn.Module], nn.Module], model: nn.Module) -> nn.Module:
    """Lets float32 products use TF32, for the whole process."""
    torch.set_float32_matmul_precision("high")
    return prepare(model)


def then_compiled(prepare: Callable[[nn.Module], nn.Module], model: nn.Module) -> nn.Module:
    """Compiles the blocks as well, which makes bitsandbytes faster where it can be traced."""
    return peers.compiled(prepare(model))


def torchao_float8(model: nn.Module) -> nn.Module:
    """The float8 training of torchao with one scale per tensor, its fastest recipe, and compiled blocks."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = Float8LinearConfig.from_recipe_name("tensorwise")

    def converted(linear: nn.Linear) -> nn.Module:
        holder = nn.Sequential(linear)  # it replaces children
        convert_to_float8_training(holder, config=config)
        return holder[0].requires_grad_(False)

    return peers.compiled(peers.with_base_layers(model, converted))


def quaff_fx(model: nn.Module) -> nn.Module:
    """The default config at 8 bits, in the dtype of the model."""
    return peers.quaff_fx_compiled(8, next(model.parameters()).dtype, model)


_INT8_MIXED = partial(peers.torchao_quantized, peers.int8_mixed_precision)

SYSTEMS = {
    system.name: system
    for system in (
        peers.System(plan.FLOAT32_EAGER, peers.eager, is_float32=True),
        peers.System(plan.FLOAT32_COMPILED, peers.compiled, is_float32=True),
        peers.System(plan.TF32_COMPILED, partial(with_tf32, peers.compiled), is_float32=True),
        peers.System(plan.BFLOAT16_EAGER, peers.eager),
        peers.System(plan.BFLOAT16_COMPILED, peers.compiled),
        peers.System(plan.LLM_INT8[0], peers.bitsandbytes_int8, peers.reason_no_bitsandbytes),
        peers.System(plan.LLM_INT8[1], partial(then_compiled, peers.bitsandbytes_int8), peers.reason_no_bitsandbytes),
        peers.System(plan.NF4[0], peers.bitsandbytes_nf4, peers.reason_no_bitsandbytes),
        peers.System(plan.NF4[1], partial(then_compiled, peers.bitsandbytes_nf4), peers.reason_no_bitsandbytes),
        peers.System(plan.TORCHAO_INT8, _INT8_MIXED, partial(peers.reason_no_gradient, peers.int8_mixed_precision)),
        peers.System(plan.TORCHAO_FLOAT8, torchao_float8, peers.reason_no_torchao),
        peers.System(plan.QUAFF, quaff_fx, calibrates=True, activation_max=127),
        peers.System(plan.QUAFF_TF32, partial(with_tf32, quaff_fx), calibrates=True, activation_max=127),
    )
}
"""By the names of `plan.py`."""
