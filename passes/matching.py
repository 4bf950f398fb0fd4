"""How passes recognise things: by target and by use, never by the names of nodes."""

from __future__ import annotations

import operator
import re

import torch
from torch.fx import Node
from torch.fx.node import Argument

from quaff_fx import ops  # noqa: F401  (defines torch.ops.quaff)

OBSERVE_WEIGHT = torch.ops.quaff.observe_weight.default
OBSERVE_INT8_WEIGHT = torch.ops.quaff.observe_int8_weight.default
DEQUANTIZE_WEIGHT = torch.ops.quaff.dequantize_weight.default
MARKERS = (OBSERVE_WEIGHT, OBSERVE_INT8_WEIGHT, DEQUANTIZE_WEIGHT)

LINEAR = torch.nn.functional.linear
_LINEARS = (LINEAR, torch.ops.aten.linear.default)
_PRODUCTS = (torch.matmul, torch.mm, operator.matmul, torch.ops.aten.mm.default, torch.ops.aten.matmul.default)
_BIASED_PRODUCTS = (torch.addmm, torch.ops.aten.addmm.default)
_TRANSPOSES = (torch.t, torch.ops.aten.t.default)


def is_call(node: object, *targets: object) -> bool:
    """Tells whether `node` calls one of these functions, or one of these method names."""
    return isinstance(node, Node) and node.op in ("call_function", "call_method") and node.target in targets


def transposed_operand(node: object) -> Node | None:
    """Returns what `node` swaps the two dimensions of, or None if it is no transpose of a matrix."""
    if not isinstance(node, Node) or not node.args or not isinstance(node.args[0], Node):
        return None
    operand: Node = node.args[0]
    rest = node.args[1:]
    if is_call(node, *_TRANSPOSES, "t") and not rest:
        return operand
    if is_call(node, getattr) and rest and rest[0] in ("T", "mT"):
        return operand
    if is_call(node, torch.transpose, "transpose", "swapaxes", "permute", torch.permute, torch.ops.aten.transpose.int):
        dims = rest[0] if len(rest) == 1 and isinstance(rest[0], (tuple, list)) else rest
        swaps = {(0, 1), (1, 0), (-1, -2), (-2, -1), (0, -1), (-1, 0), (1, -2), (-2, 1)}
        is_permute = node.target in ("permute", torch.permute)
        swaps = {(1, 0), (-1, -2), (-1, 0), (1, -2)} if is_permute else swaps
        if tuple(dims) in swaps and not node.kwargs:
            return operand
    return None


def marked_weight(node: object) -> tuple[Node, bool] | None:
    """Returns the marker that `node` is or transposes, and whether it is transposed; None if it is neither."""
    transposed = False
    while isinstance(node, Node) and not is_call(node, *MARKERS):
        node, transposed = transposed_operand(node), not transposed
    return (node, transposed) if isinstance(node, Node) else None


def product_operands(node: Node) -> tuple[Argument, Argument, Argument] | None:
    """Returns x, w, bias of any form of a product x w that can stand for a linear, None for any other node.

    ``w`` has the layout (in, out): of a linear it is the transpose of the second argument.
    """
    arguments = list(node.args)
    if is_call(node, *_PRODUCTS, "matmul", "mm", "__matmul__") and len(arguments) == 2 and not node.kwargs:
        return arguments[0], arguments[1], None
    if is_call(node, *_BIASED_PRODUCTS, "addmm") and len(arguments) == 3 and not node.kwargs:
        return arguments[1], arguments[2], arguments[0]
    return None


def linear_operands(node: Node) -> tuple[Argument, Argument, Argument] | None:
    """Returns x, w (out, in), bias of a linear call, None for any other node."""
    if not is_call(node, *_LINEARS):
        return None
    names = ("input", "weight", "bias")
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    x, w, bias = (given.get(name) for name in names)
    return x, w, bias


def may_mutate(node: Node) -> bool:
    """Tells whether a node may edit a tensor in place; errs on the side of yes."""
    target = node.target
    if node.op == "call_method":
        name = str(target)
        return (name.endswith("_") and not name.endswith("__")) or name in ("__setitem__", "__iadd__", "__imul__")
    if node.op != "call_function":
        return node.op == "call_module"
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.is_mutable
    if isinstance(target, (torch._ops.OpOverloadPacket, torch._ops.HigherOrderOperator)):
        return True
    name = getattr(target, "__name__", "")
    in_place_operator = getattr(target, "__module__", "") == "_operator" and (name[:1] == "i" or name == "setitem")
    keywords = node.kwargs.get("inplace") or node.kwargs.get("out") is not None
    return bool(
        (in_place_operator and name not in ("invert", "index", "is_", "is_not", "itemgetter"))
        or (name.endswith("_") and not name.endswith("__"))
        or keywords
        or any(argument is True for argument in node.args)
    )


def dimensions(node: object) -> int | None:
    """Returns the number of dimensions of a node's traced value, None if it was not recorded."""
    if not isinstance(node, Node):
        return None
    value = node.meta.get("example_value", node.meta.get("val"))
    return value.dim() if isinstance(value, torch.Tensor) else None


def site_name(marker: Node) -> str:
    """Returns the name of a marker's weight in the traced module: ``self_attn.q_proj.weight``."""
    weight = marker.args[0]
    assert isinstance(weight, Node)
    grapharg = weight.meta.get("grapharg")
    if grapharg is None or grapharg.source is None:
        return str(weight.target)
    parts = re.findall(r"_modules\['([^']*)'\]|_parameters\['([^']*)'\]", str(grapharg.source.name))
    path = [module or parameter for module, parameter in parts]
    if len(path) > 1 and path[-2].startswith("quaff_"):
        path[-2:] = [path[-2].removeprefix("quaff_")]
    return ".".join(path) or str(weight.target)


def describe_use(user: Node) -> str:
    """Returns a reader's word for what a node does: ``embedding``, ``conv1d``."""
    target = user.target
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))
