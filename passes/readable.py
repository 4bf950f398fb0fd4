"""Graph modules as text that a person can read."""

from __future__ import annotations

import re

from torch.fx import Graph, GraphModule

from quaff_fx.hosts.peft import BASE_LAYER, DEFAULT_ADAPTER

_INSERTED = (BASE_LAYER, DEFAULT_ADAPTER, "quaff_weight", "outliers")
"""Parts of a path that say nothing of the model: PEFT's, and those of an int8 weight's own state."""


def readable(graph_module: GraphModule) -> str:
    """Returns the code of a graph module and its subgraphs with shapes, short names, and one argument per line.

    Dynamo names an input after its path in the traced program,
    ``L_module_modules_q_proj_modules_quaff_weight_parameters_w_int8_``; here it is ``q_proj_w_int8``. The graph itself
    is left as it is.
    """
    graph = Graph()
    graph.output(graph.graph_copy(graph_module.graph, {}))
    copied = GraphModule(graph_module, graph, class_name="Graph")
    for node in copied.graph.nodes:
        if node.op == "placeholder":
            name = _short(str(node.target))
            node._rename(name)
            node.target = node.name
    copied.recompile()
    return _one_argument_per_line(copied.print_readable(print_output=False))


def _short(name: str) -> str:
    name = re.sub(r"^[Ll]_(module|args|kwargs|self)?_*", "", name).strip("_")
    name = re.sub(r"(^|_)(modules|parameters|buffers)(?=_)", "", name).strip("_")
    name = re.sub(rf"(^|_)({'|'.join(_INSERTED)})(?=_|$)", "", name).strip("_")
    return name if name and not name[0].isdigit() else f"arg_{name}"


def _one_argument_per_line(text: str) -> str:
    def split(match: re.Match[str]) -> str:
        indent = " " * (len(match[1]) + 4)
        arguments = re.sub(r", (?=\w+: \")", f",\n{indent}", match[3])
        arguments = re.sub(r"^self, ", f"self,\n{indent}", arguments)
        return f"{match[1]}{match[2]}(\n{indent}{arguments}\n{match[1]}):"

    return re.sub(r"^( *)(def forward)\((.*)\):$", split, text, flags=re.MULTILINE)
