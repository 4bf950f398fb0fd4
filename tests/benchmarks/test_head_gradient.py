"""The table of what is kept apart of a gradient of logits."""

from __future__ import annotations

import pytest
import torch

from benchmarks import head_gradient
from quaff_fx import numerics


def test_it_is_the_gradient_that_the_op_gives_and_better_the_more_is_kept_apart() -> None:
    torch.manual_seed(0)
    weight = torch.randn(3000, 64) + 1  # small values of the gradient count together
    labels = torch.nn.functional.one_hot(torch.randint(3000, (20,)), 3000)
    grad = (2 * torch.randn(20, 3000)).softmax(dim=-1) - labels
    found = head_gradient.rows(grad, weight, (0, 8, 32))
    cosines = [float(str(row[1])) for row in found]
    assert cosines == sorted(cosines)
    assert cosines[0] < 0.98 < 0.995 < cosines[-1]
    w_int8, w_scale = numerics.quantize_weight(weight, 64)
    for count in (0, 32):
        own = torch.ops.quaff.linear_grad_input.default(grad, w_int8, w_scale, 127, 64, count)
        torch.testing.assert_close(head_gradient.grad_input(grad, w_int8, w_scale, 127, 64, count), own)


def test_a_number_of_tokens_below_one_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        head_gradient.main(["--tokens", "0"])
    assert "expected at least 1" in capsys.readouterr().err
