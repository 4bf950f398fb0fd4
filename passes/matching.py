"""How passes recognise things: by target and by use, never by the names of nodes."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import Argument

from quaff_fx import ops

DEQUANTIZE_WEIGHT = ops.dequantize_weight.target

LINEAR = torch.nn.functional.linear
_LINEARS = (LINEAR, torch.ops.aten.linear.default)
_PRODUCTS = (torch.matmul, torch.mm, operator.matmul, torch.ops.aten.mm.default, torch.ops.aten.matmul.default)
_BIASED_PRODUCTS = (torch.addmm, torch.ops.aten.addmm.default)
_TRANSPOSES = (torch.t, torch.ops.aten.t.default)
COPIES = ("to", "float", "half", "bfloat16", "type_as", "detach")
"""Names of functions that give the same values, perhaps in another dtype."""
_SWAPS = {(0, 1), (1, 0), (-1, -2), (-2, -1), (0, -1), (-1, 0), (1, -2), (-2, 1)}
_SWAPPING_ORDERS = {(1, 0), (-1, -2), (-1, 0), (1, -2)}

# fmt: off
VALUE_READS = {
    "abs", "add", "amax", "amin", "clamp", "div", "exp", "isfinite", "isnan", "linalg_matrix_norm", "linalg_norm",
    "linalg_vector_norm", "log", "matrix_norm", "max", "maximum", "mean", "min", "minimum", "mul", "neg", "norm",
    "normalize", "pow", "sqrt", "square", "std", "sub", "sum", "truediv", "var", "vector_norm",
}
# fmt: on
"""Names of functions that compute from values one by one, or reduce them."""

PRODUCTS = {
    *("linear", "matmul", "mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "grouped_mm", "einsum"),
}
"""Names of functions that multiply by a weight, each value of whose result is a sum over one dimension of it."""
CONVOLUTIONS = {"conv1d", "conv2d", "conv3d"}
"""Names of functions each value of whose result is a sum over all but the first dimension of a weight."""
LAYERS = {
    *("lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"),
    *("multi_head_attention_forward", "bilinear"),
}
"""Names of functions that multiply each token of their first operand by all of a weight, among other things."""

METADATA = {
    *("empty_like", "full_like", "ones_like", "rand_like", "randint_like", "randn_like", "zeros_like"),
    *("new_empty", "new_full", "new_ones", "new_tensor", "new_zeros", "requires_grad_"),
}
"""Names of functions that take the shape, dtype and device of a tensor, and none of its values."""
METADATA_OF_OTHER = {"to", "type_as", "view_as", "reshape_as", "expand_as"}
"""Names of functions that take these of their second operand, and none of its values."""
EDITS = {"setitem", "set_data"}
"""Names of functions that edit their first operand and give nothing."""


def is_call(node: object, *targets: object) -> bool:
    """Tells whether `node` calls one of these functions, or one of these method names."""
    return isinstance(node, Node) and node.op in ("call_function", "call_method") and node.target in targets


def operands(node: object) -> ops.Operands:
    """Returns the operands of a call of an op of torch, by the names in its schema."""
    assert isinstance(node, Node)
    return ops.operands(node.target, node.args, node.kwargs)


def call(graph: Graph, target: Any, **operands: Any) -> Node:
    """Inserts a call of an op of torch, whose operands are named as in its schema."""
    return graph.call_function(target, ops.arguments(target, **operands))


def first_operand(node: Node) -> Argument:
    """Returns what a function or a method is called on; None of a call without operands."""
    return node.args[0] if node.args else None


def element(node: object) -> tuple[Argument, Argument] | None:
    """Returns what a node takes an element of, and its index; None of any other node."""
    return (node.args[0], node.args[1]) if isinstance(node, Node) and is_call(node, operator.getitem) else None


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
        orders = _SWAPPING_ORDERS if node.target in ("permute", torch.permute) else _SWAPS
        if _dims(rest) in orders and not node.kwargs:
            return operand
    return None


def _dims(rest: Sequence[object]) -> tuple[object, ...]:
    """Dimensions as they stand behind the tensor in a call: one by one, or in a list."""
    return tuple(rest[0]) if len(rest) == 1 and isinstance(rest[0], (tuple, list)) else tuple(rest)


def is_transpose(name: str, rest: Sequence[object], kwargs: Mapping[str, object]) -> bool:
    """Tells whether the function called `name` swaps the two dimensions of a matrix, `rest` being behind it."""
    if kwargs:
        return False
    if name in ("transpose", "swapaxes"):
        return _dims(rest) in _SWAPS
    return name in ("t", "T", "mT") or (name == "permute" and _dims(rest) in _SWAPPING_ORDERS)


def function_name(func: object) -> str:
    """Returns the name of a function as `__torch_function__` gets it: ``add`` of ``__radd__``.

    A property is called by its own name, ``data``, where it is read, and ``set_data`` where it is set.
    """
    name = str(getattr(func, "__name__", func))
    if name in ("__get__", "__set__"):
        of = str(getattr(getattr(func, "__self__", None), "__name__", name))
        return of if name == "__get__" else f"set_{of}"
    if not (name.startswith("__") and name.endswith("__")):
        return name
    bare = name.strip("_")
    return bare[1:] if bare[:1] == "r" and bare[1:] in VALUE_READS else bare


def copied_operand(node: object) -> Node | None:
    """Returns what `node` casts, value for value, or None if it does not, or if the result may be edited."""
    if not isinstance(node, Node) or not is_call(node, *COPIES) or not isinstance(node.args[0], Node):
        return None
    to = dtype(node)
    is_floating = to is None or to.is_floating_point
    return node.args[0] if is_floating and _is_only_read(node) else None


def _is_only_read(node: Node) -> bool:
    """Tells whether every use of `node` is known to leave it as it is, also through its transposes and casts."""
    return all(
        linear_operands(user) is not None
        or product_operands(user) is not None
        or reads_values(user)
        or ((transposed_operand(user) is node or is_call(user, *COPIES)) and _is_only_read(user))
        for user in node.users
    )


def marked_weight(node: object) -> tuple[Node, bool] | None:
    """Returns the marker whose weight `node` is, transposes or casts, and whether it is transposed, else None."""
    transposed = False
    while isinstance(node, Node) and not is_call(node, DEQUANTIZE_WEIGHT):
        if (copied := copied_operand(node)) is not None:
            node = copied
        else:
            node, transposed = transposed_operand(node), not transposed
    return (node, transposed) if isinstance(node, Node) else None


def int8_weight(node: object) -> Node | None:
    """Returns the marker of a quantized weight that `node` is or casts, not transposed; None otherwise."""
    marker, transposed = marked_weight(node) or (None, False)
    return marker if is_call(marker, DEQUANTIZE_WEIGHT) and not transposed else None


def uses(marker: Node) -> list[tuple[Node, int | None]]:
    """Returns what reads a marker's weight, also through transposes and casts.

    Each with the dimension that it reduces over as a linear: 1, 0 (transposed), None: it is no linear.
    """
    found: list[tuple[Node, int | None]] = []
    views: list[tuple[Node, int]] = [(marker, 1)]
    for view, in_dim in views:
        for user in view.users:
            if transposed_operand(user) is not None:
                views.append((user, 1 - in_dim))
            elif copied_operand(user) is view:
                views.append((user, in_dim))
            else:
                operands = linear_operands(user)
                is_weight = operands is not None and operands[1] is view and operands[0] is not view
                found.append((user, in_dim if is_weight else None))
    return found


def reads_values(node: Node) -> bool:
    """Tells whether a node computes from the values of its operands: no product, no lookup, no edit, no view.

    For such a reader of a weight (a norm, a sum with an update) a dequantized weight is as good; of a node that is not
    known the answer is no.
    """
    return node.op in ("call_function", "call_method") and describe_use(node) in VALUE_READS


def edits_weight(node: Node) -> bool:
    """Tells whether a node edits a marked weight in place: what it is called on, or its ``out``."""
    edited = [*node.args[:1], node.kwargs.get("out")]
    return any(marked_weight(target) is not None for target in edited) and may_mutate(node) and _is_in_place(node)


def _is_in_place(node: Node) -> bool:
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    name = describe_use(node)
    is_operator = getattr(node.target, "__module__", "") == "_operator" and (name[:1] == "i" or name == "setitem")
    is_named_so = (name.endswith("_") and not name.endswith("__")) or name in ("__setitem__", "__iadd__", "__imul__")
    return is_named_so or is_operator or node.kwargs.get("out") is not None


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


def value(node: object) -> Any:
    """Returns a node's traced value, in Dynamo's or AOTAutograd's graph; None if it was not recorded."""
    return node.meta.get("example_value", node.meta.get("val")) if isinstance(node, Node) else None


def dimensions(node: object) -> int | None:
    """Returns the number of dimensions of a node's traced value, None if it was not recorded."""
    traced = value(node)
    return traced.dim() if isinstance(traced, Tensor) else None


def dtype(node: object) -> torch.dtype | None:
    """Returns the dtype of a node's traced value, None if it was not recorded."""
    traced = value(node)
    return traced.dtype if isinstance(traced, Tensor) else None


def site_name(marker: Node) -> str:
    """Returns the name of a marker's weight in the traced module: ``self_attn.q_proj.weight``."""
    weight = operands(marker).w_int8
    assert isinstance(weight, Node)
    grapharg = weight.meta.get("grapharg")
    if grapharg is None or grapharg.source is None:
        return str(weight.target)
    parts = re.findall(r"_modules\['([^']*)'\]|_parameters\['([^']*)'\]", str(grapharg.source.name))
    path = [module or parameter for module, parameter in parts]
    if len(path) > 1 and path[-2].startswith("quaff_"):
        path[-2:] = [path[-2].removeprefix("quaff_")]
    return ".".join(path) or str(weight.target)


SITE = "quaff_site"
"""Under this key a node that was made from a site's linear has its name, in the ``custom`` that torch hands on."""


def name_site(node: Node, site: str) -> None:
    """Writes the name of its site on a node, from which AOTAutograd takes it to what it makes of the node."""
    node.meta["custom"] = {**node.meta.get("custom", {}), SITE: site}


def named_site(node: Node) -> str:
    """Returns the name that `name_site` wrote, or else the name of the node."""
    return str(node.meta.get("custom", {}).get(SITE, node.name))


def describe_use(user: Node) -> str:
    """Returns a reader's word for what a node does: ``embedding``, ``conv1d``."""
    target = user.target
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))
