"""All passes in their order: what one makes is what the next one knows, and what is kept of each as text."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from quaff_fx.errors import PassError
from quaff_fx.passes import pipeline
from tests.passes.tracing import nodes, trace_use

quaff = torch.ops.quaff


@pytest.mark.parametrize(
    "use", [lambda x, w, b: torch.nn.functional.linear(x, w, b), lambda x, w, b: x @ w.t() + b], ids=["linear", "@"]
)
def test_a_product_in_any_form_is_normalized_before_it_is_quantized(use: Any) -> None:
    """`QuantizeLinears` knows one form, which `NormalizeProducts` makes of the others."""
    result = pipeline.quantize(trace_use(use))
    assert len(nodes(result.graph_module, quaff.linear.default)) == 1
    assert nodes(result.graph_module, quaff.dequantize_weight.default) == []
    assert [stage.name for stage in result.stages] == ["captured", "NormalizeProducts", "QuantizeLinears"]
    captured, normalized, quantized = (stage.text for stage in result.stages)
    assert "dequantize_weight" in captured
    assert "linear(" in normalized
    assert "quaff.linear.default(" in quantized


def test_a_lowered_graph_is_kept_as_text_only_where_it_is_wanted() -> None:
    for is_kept in (True, False):
        result = pipeline.lower(torch.fx.symbolic_trace(lambda x: x + 1), before="forward", is_kept=is_kept)
        passes = ["FoldLowRankProducts", "JoinFirstFactors", "JoinTerms", "LaunchKernels"]
        assert [stage.name for stage in result.stages] == ["forward", *passes]
        assert [bool(stage.text) for stage in result.stages] == [is_kept] * 5


def test_what_breaks_the_rules_is_refused_with_its_passes() -> None:
    def program(x: Any, w: Any) -> Any:
        return torch.ops.quaff.linear.default(x, x, x, x, w, w, w, None, 127, 1)

    with pytest.raises(PassError, match=r"^after NormalizeProducts, QuantizeLinears: "):
        pipeline.quantize(torch.fx.symbolic_trace(program))
