"""Graphs as text: short names, one argument per line, and a graph that stays as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.fx import Graph, GraphModule

from quaff_fx.passes.readable import _short, readable


def graph_of(*names: str, shapes: bool = True) -> GraphModule:
    """A graph that adds its inputs up; they carry values as Dynamo's do, which gives them annotations."""
    graph = Graph()
    total = None
    for name in names:
        node = graph.placeholder(name)
        if shapes:
            node.meta["example_value"] = torch.empty(2, 3)
        total = node if total is None else graph.call_function(torch.add, (total, node))
    graph.output(total)
    return GraphModule(nn.Module(), graph)


@pytest.mark.parametrize(
    ("traced", "short"),
    [
        ("L_module_modules_q_proj_modules_quaff_weight_parameters_w_int8_", "q_proj_w_int8"),
        (
            "L_module_modules_mlp_modules_up_modules_base_layer_modules_quaff_weight_modules_outliers_buffers_"
            "smoothing_scale_",
            "mlp_up_smoothing_scale",
        ),
        ("L_module_modules_q_proj_modules_lora_A_modules_default_parameters_weight_", "q_proj_lora_A_weight"),
        ("L_self_modules_norm_parameters_weight_", "norm_weight"),
        ("l_self_modules_norm_parameters_weight_", "norm_weight"),
        ("L_args_0_", "arg_0"),
        ("L_kwargs_attention_mask_", "attention_mask"),
        ("L_x_", "x"),
        ("x", "x"),
        ("s77", "s77"),
        ("weight", "weight"),
    ],
)
def test_the_path_of_an_input_becomes_a_short_name(traced: str, short: str) -> None:
    assert _short(traced) == short


@pytest.mark.parametrize("traced", ["L_", "L_module_", "_", "L_kwargs_", "L_default_", "L_args_1_"])
def test_a_name_is_never_empty_nor_a_number(traced: str) -> None:
    assert _short(traced).isidentifier()


def test_a_graph_is_shown_with_short_names_and_one_argument_per_line() -> None:
    shown = readable(
        graph_of("L_module_modules_q_proj_modules_quaff_weight_parameters_w_int8_", "L_kwargs_mask_", "L_args_0_")
    )
    lines = [line.split(";")[0].rstrip() for line in shown.splitlines()]
    assert [line for line in lines if line and not line.lstrip().startswith("#")] == [
        "class Graph(torch.nn.Module):",
        "    def forward(",
        "        self,",
        '        q_proj_w_int8: "f32[2, 3]",',
        '        mask: "f32[2, 3]",',
        '        arg_0: "f32[2, 3]"',
        "    ):",
        "        add = torch.add(q_proj_w_int8, mask)",
        "        add_1 = torch.add(add, arg_0)",
        "        return add_1",
    ]


def test_inputs_whose_short_names_are_equal_stay_apart() -> None:
    shown = readable(graph_of("L_module_modules_q_proj_modules_base_layer_parameters_bias_", "L_self_q_proj_bias_"))
    assert "torch.add(q_proj_bias, q_proj_bias_1)" in shown


def test_an_input_called_like_a_keyword_stays_valid_code() -> None:
    shown = readable(graph_of("L_module_parameters_class_", "L_lambda_", shapes=False))
    compile(shown, "shown", "exec")
    assert "lambda_1" in shown


def test_the_graph_itself_is_left_as_it_is() -> None:
    graph_module = graph_of("L_module_modules_q_proj_parameters_weight_", "L_args_0_")
    code, names = graph_module.code, [(node.name, node.target) for node in graph_module.graph.nodes]
    meta = [dict(node.meta) for node in graph_module.graph.nodes]
    readable(graph_module)
    assert graph_module.code == code
    assert [(node.name, node.target) for node in graph_module.graph.nodes] == names
    assert [set(node.meta) for node in graph_module.graph.nodes] == [set(values) for values in meta]
    assert torch.equal(graph_module(torch.ones(2), torch.ones(2)), torch.full((2,), 2.0))


def test_the_same_graph_is_shown_the_same_way_twice() -> None:
    graph_module = graph_of("L_module_modules_q_proj_parameters_weight_", "L_args_0_")
    assert readable(graph_module) == readable(graph_module)


def test_subgraphs_are_shown_too() -> None:
    """The bodies of activation checkpoints hold the linears; text that leaves them out would hide the rewrite."""
    root, graph = nn.Module(), Graph()
    root.wrap_body_0 = graph_of("L_x_")
    inner = root.wrap_body_0.graph
    (placeholder,) = [node for node in inner.nodes if node.op == "placeholder"]
    with inner.inserting_after(placeholder):
        sine = inner.call_function(torch.sin, (placeholder,))
    next(node for node in inner.nodes if node.op == "output").args = (sine,)
    root.wrap_body_0.recompile()
    x = graph.placeholder("L_x_")
    body = graph.get_attr("wrap_body_0")
    graph.output(graph.call_function(torch.ops.higher_order.tag_activation_checkpoint, (body, x)))
    shown = readable(GraphModule(root, graph))
    assert "tag_activation_checkpoint(wrap_body_0, x)" in shown
    assert "torch.sin(" in shown
