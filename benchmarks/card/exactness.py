"""Checks of the kernels of a device: products and quantizers of odd shapes beside `kernels.reference`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from quaff_fx.kernels import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = (
    (1, 64, 64),
    (16, 64, 64),
    (17, 64, 128),
    (33, 72, 40),
    (64, 100, 52),
    (129, 192, 320),
    (512, 576, 1536),
    (300, 1536, 577),
    (257, 4096, 1024),
)
"""(T, K, N): few tokens, sizes that no tile divides, sizes of models."""

MIN_SQNR_DB = {torch.float32: 60.0, torch.bfloat16: 44.0, torch.float16: 60.0}
"""Of a product with outlier columns. Rounding the result alone costs bfloat16 about 50 dB and float16 68; three TF32
products cost float32 more than its own rounding, but not this much."""

MAX_MOVED_SHARE = 0.005
"""Of a quantizer's integers that may be one off: the rotation is added up in another order, so ties fall otherwise."""


def product_is_exact(device: torch.device) -> str:
    """The bare int32 product, in both directions, on extreme values: equal."""
    for a, w, transpose in _operands(device, extreme=True):
        found = _int8_linear(a, w, transpose)
        expected = reference.int8_matmul(a.cpu(), w.cpu(), transpose)
        _expect(torch.equal(found.cpu(), expected), f"differs at {_shape(a, w, transpose)}")
    return f"{2 * len(SHAPES)} products equal"


def product_with_scales(device: torch.device) -> str:
    """Both scales and a rotation block of 1: within the rounding of the result."""
    for a, w, transpose in _operands(device):
        a_scale, w_scale = _scales(a, w, transpose)
        for dtype in DTYPES:
            found = _int8_linear(a, w, transpose, a_scale=a_scale, w_scale=w_scale, out_dtype=dtype)
            exact = reference.int8_matmul(a.cpu(), w.cpu(), transpose).double()
            exact = exact * a_scale.cpu().double().unsqueeze(1) * w_scale.cpu().double()
            # Two products round in float32, then the result does in its dtype.
            bound = 2 * torch.finfo(dtype).eps * exact.abs() + 1e-7
            _expect(((found.cpu().double() - exact).abs() <= bound).all(), f"{dtype} at {_shape(a, w, transpose)}")
    return f"{2 * len(SHAPES) * len(DTYPES)} products within rounding"


def product_with_epilogue(device: torch.device) -> str:
    """Scales, outlier columns, a bias forward and the rotation backward: SQNR over the reference."""
    worst = dict.fromkeys(DTYPES, math.inf)
    for a, w, transpose in _operands(device):
        a_scale, w_scale = _scales(a, w, transpose)
        columns = w_scale.shape[0]
        for dtype in DTYPES:
            given = {
                "a_scale": a_scale,
                "w_scale": w_scale,
                # Values of 16 bits: whatever a kernel keeps of them is all there is.
                "a_outlier": torch.randn(a.shape[0], 9, device=device).to(dtype).float(),
                "w_outlier": torch.randn(9, columns, device=device).to(dtype).float(),
                "bias": None if transpose else torch.randn(columns, device=device),
                "rotation": 4 if transpose and columns % 4 == 0 else 1,
            }
            found = _int8_linear(a, w, transpose, out_dtype=dtype, **given)
            on_cpu = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in given.items()}
            expected = reference.int8_linear(
                a.cpu(), w.cpu(), transpose_w=transpose, activation_max=127, out_dtype=torch.float32, **on_cpu
            )
            worst[dtype] = min(worst[dtype], sqnr_db(found.cpu(), expected))
    for dtype, found_db in worst.items():
        _expect(found_db >= MIN_SQNR_DB[dtype], f"{dtype}: {found_db:.0f} dB, expected {MIN_SQNR_DB[dtype]:.0f}")
    return ", ".join(f"{_word(dtype)} {found_db:.0f} dB" for dtype, found_db in worst.items())


def quantizer(device: torch.device) -> str:
    """Integers, scales and outliers of rows, rotated and not, beside the reference."""
    moved_most = 0.0
    for tokens, k, _ in SHAPES:
        for dtype in DTYPES:
            for rotation in {1, math.gcd(k, 64)}:
                x = torch.randn(tokens, k).to(dtype)
                x[:, 3] *= 40
                x[0] = 0
                channels = torch.tensor([3, k // 2])
                smoothing = torch.full((2,), torch.inf)
                found = _quantize(x.to(device), channels.to(device), smoothing.to(device), rotation)
                x_int8, x_scale, x_outlier = (part.cpu() for part in found)
                expected = reference.quantize_activation(x, channels, smoothing, 127, rotation)
                where = f"{_word(dtype)} {tokens}x{k}, rotation {rotation}"
                difference = (x_int8.int() - expected[0].int()).abs()
                _expect(difference.max() <= 1, f"{where}: integers {int(difference.max())} off")
                moved_most = max(moved_most, float((difference > 0).double().mean()))
                torch.testing.assert_close(x_scale, expected[1], rtol=1e-5, atol=0, msg=lambda m, w=where: f"{w}: {m}")
                # With an infinite smoothing scale they are values of x, which 16 bits hold if x has them; then zeros.
                _expect(torch.equal(x_outlier[:, :2].float(), expected[2]), f"{where}: outliers differ")
                _expect(not x_outlier[:, 2:].any(), f"{where}: columns past the outliers are not zero")
    _expect(moved_most <= MAX_MOVED_SHARE, f"{moved_most:.2%} of the integers are one off")
    return f"at most {moved_most:.3%} of the integers are one off"


CHECKS: dict[str, Callable[[torch.device], str]] = {
    "int8 product": product_is_exact,
    "int8 product with scales": product_with_scales,
    "int8 product with epilogue": product_with_epilogue,
    "row quantizer": quantizer,
}
"""Each returns what it found in words, or raises `AssertionError`."""


def sqnr_db(found: Tensor, expected: Tensor) -> float:
    """Returns 20 log10(‖expected‖ / ‖found - expected‖)."""
    expected = expected.double()
    noise = (found.double() - expected).norm()
    return math.inf if noise == 0 else float(20 * torch.log10(expected.norm() / noise))


def _operands(device: torch.device, extreme: bool = False) -> Iterator[tuple[Tensor, Tensor, bool]]:
    for tokens, k, n in SHAPES:
        for transpose in (False, True):
            shape = (tokens, n if transpose else k)
            a = torch.full(shape, 127) if extreme else torch.randint(-127, 128, shape)
            w = torch.randint(-127, 128, (n, k))
            if extreme:  # the longest sums that int32 must hold, of either sign
                a[::2] = -127
                w[:, ::3] = 127
            yield a.to(device, torch.int8), w.to(device, torch.int8), transpose


def _scales(a: Tensor, w: Tensor, transpose: bool) -> tuple[Tensor, Tensor]:
    columns = w.shape[1 if transpose else 0]
    return torch.rand(a.shape[0], device=a.device) / 500, torch.rand(columns, device=a.device) / 500


def _int8_linear(
    a: Tensor, w: Tensor, transpose: bool, out_dtype: torch.dtype = torch.int32, **given: object
) -> Tensor:
    names = ("a_scale", "w_scale", "a_outlier", "w_outlier", "bias")
    result: Tensor = torch.ops.quaff.int8_linear(
        a, w, transpose, *(given.get(name) for name in names), out_dtype, 127, given.get("rotation", 1)
    )
    return result


def _quantize(x: Tensor, channels: Tensor, smoothing: Tensor, rotation: int) -> tuple[Tensor, Tensor, Tensor]:
    result: tuple[Tensor, Tensor, Tensor] = torch.ops.quaff.quantize_rows(x, channels, smoothing, 127, rotation)
    return result


def _expect(is_met: Tensor | bool, what: str) -> None:
    if not is_met:
        raise AssertionError(what)


def _shape(a: Tensor, w: Tensor, transpose: bool) -> str:
    return f"T, K, N = {a.shape[0]}, {w.shape[1]}, {w.shape[0]}, {'backward' if transpose else 'forward'}"


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
