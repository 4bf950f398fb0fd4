"""Random calls of the compiled kernel: sizes, layouts, values, threads and variants, each beside a reference.

Products are compared with exact integers and with float64, quantizers bit for bit with `numerics`.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quaff_fx import numerics
from quaff_fx.kernels import cpu

FLOAT_EPS = 2.0**-24
RESULT_EPS = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SIZES = (1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 96, 127, 128, 129, 200, 257)
TOKENS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 14, 15, 16, 17, 29, 40, 65)


@dataclass
class Counts:
    """How many cases ran and how many were wrong, with the first case of each way of being wrong."""

    cases: int = 0
    wrong: int = 0
    examples: dict[str, str] = field(default_factory=dict)


def run(cases: int, seed: int, variants: tuple[str, ...] = ()) -> Counts:
    """Runs random cases, each determined by `seed` and its number, on `variants`; on all that run here if empty."""
    usable = variants or tuple(name for name in cpu.VARIANTS if cpu.reason_unavailable(name) is None)
    counts = Counts()
    threads = torch.get_num_threads()
    try:
        for number in range(cases):
            draw = Draw(seed, number)
            check = draw.random.choice(CHECKS)
            variant = draw.random.choice(usable)
            torch.set_num_threads(draw.random.choice((1, 1, 2, 3, 5)))
            try:
                found = check(draw, variant)
            except Exception as error:
                found = f"{type(error).__name__}: {error}"
            counts.cases += 1
            if found:
                counts.wrong += 1
                counts.examples.setdefault(f"{check.__name__}: {found}", f"{variant}, seed {seed}, case {number}")
    finally:
        torch.set_num_threads(threads)
    return counts


class Draw:
    """The random choices of one case."""

    def __init__(self, seed: int, number: int) -> None:
        self.random = random.Random(f"{seed}, {number}")
        self.generator = torch.Generator().manual_seed(self.random.getrandbits(60))

    def size(self) -> int:
        """An in- or out-feature size: near those of vectors and panels, or any up to 300."""
        return self.random.choice(SIZES) if self.random.random() < 0.6 else self.random.randint(0, 300)

    def tokens(self) -> int:
        return self.random.choice(TOKENS)

    def activation_max(self) -> int:
        return self.random.choice((63, 127))

    def rotation(self, features: int) -> int:
        """Any power of two that divides the features."""
        return numerics.rotation_block(features, self.random.choice((1, 2, 8, 16, 64, 256))) if features else 1

    def integers(self, rows: int, columns: int, limit: int) -> Tensor:
        """int8 in ±limit, sometimes only the ends, in runs of one sign."""
        if self.random.random() < 0.3:
            signs = torch.rand(rows, 1, generator=self.generator) < self.random.choice((0.0, 0.5, 1.0))
            return self.laid_out(torch.where(signs, -limit, limit).expand(rows, columns).to(torch.int8))
        values = torch.randint(-limit, limit + 1, (rows, columns), dtype=torch.int8, generator=self.generator)
        return self.laid_out(values)

    def floats(self, *shape: int) -> Tensor:
        return self.laid_out(torch.randn(*shape, generator=self.generator))

    def laid_out(self, values: Tensor) -> Tensor:
        """The same values in memory of another layout: transposed, a part of something larger, at an odd offset."""
        kind = self.random.randrange(5)
        if kind == 0 and values.ndim == 2:
            return values.t().contiguous().t()
        if kind == 1:
            wide = torch.full((*values.shape[:-1], values.shape[-1] + self.random.randint(1, 9)), 9, dtype=values.dtype)
            wide[..., : values.shape[-1]] = values
            return wide[..., : values.shape[-1]]
        if kind == 2:
            flat = torch.empty(values.numel() + 3, dtype=values.dtype)[self.random.randint(0, 3) :][: values.numel()]
            return flat.copy_(values.flatten()).view(values.shape)
        if kind == 3 and values.dtype != torch.int8:
            return torch._neg_view(-values)
        return values.contiguous()

    def activations(self, tokens: int, features: int) -> Tensor:
        """Of any magnitude and dtype, with rows of zeros, of infinities, and of magnitudes of their own."""
        x = torch.randn(tokens, features, generator=self.generator)
        if self.random.random() < 0.5:
            x = x * 10.0 ** self.random.randint(-46, 38)
        if self.random.random() < 0.3:
            x = x * 10.0 ** torch.randint(-40, 38, (tokens, 1), generator=self.generator)
        if tokens and features and self.random.random() < 0.4:
            x[self.random.randrange(tokens)] = 0
            poison = self.random.choice((math.nan, math.inf, -math.inf, 1e-45, 3e38, -0.0))
            x[self.random.randrange(tokens), self.random.randrange(features)] = poison
        if tokens > 1 and features and self.random.random() < 0.1:
            return x[:1].to(self.random.choice(list(RESULT_EPS))).expand(tokens, features)
        return self.laid_out(x.to(self.random.choice(list(RESULT_EPS))))


def check_accumulator(draw: Draw, variant: str) -> str:
    """int32 results are the exact integers."""
    a, w, transpose_w, limit = operands(draw)
    result = cpu.int8_linear(a, w, transpose_w=transpose_w, activation_max=limit, variant=variant)
    return "" if torch.equal(result.double(), exact(a, w, transpose_w)) else "the integers differ"


def check_product(draw: Draw, variant: str) -> str:
    """Scaled results are as near to float64 as the roundings of float32 allow."""
    a, w, transpose_w, limit = operands(draw)
    main = exact(a, w, transpose_w)
    tokens, columns = main.shape
    outliers, rotation = draw.random.choice((0, 1, 3, 17, 70)), draw.rotation(columns)
    a_scale, w_scale = draw.floats(tokens).abs(), draw.floats(columns)
    a_outlier, w_outlier, bias = draw.floats(tokens, outliers), draw.floats(outliers, columns), draw.floats(columns)
    main = main * a_scale.double()[:, None] * w_scale.double()
    thin = a_outlier.double() @ w_outlier.double() + bias.double()
    thin_size = a_outlier.double().abs() @ w_outlier.double().abs() + bias.double().abs()
    out_dtype = draw.random.choice(list(RESULT_EPS))
    result = cpu.int8_linear(
        a,
        w,
        transpose_w=transpose_w,
        activation_max=limit,
        a_scale=a_scale,
        w_scale=w_scale,
        a_outlier=a_outlier,
        w_outlier=w_outlier,
        bias=bias,
        out_dtype=out_dtype,
        rotation=rotation,
        variant=variant,
    )
    wanted = numerics.rotate(main, rotation) + thin
    # A rotated product also rotates the rest, once before and once after.
    size = largest_rotated(main.abs() + (largest_rotated(thin_size, rotation) if rotation > 1 else thin_size), rotation)
    bound = (outliers + 2 * math.log2(rotation) + 8) * FLOAT_EPS * 1.01 * size
    bound = bound + RESULT_EPS[out_dtype] * (wanted.abs() + bound) + 2.0**-25  # subnormal float16
    too_large = wanted.abs() > torch.finfo(out_dtype).max * 0.999  # infinite, or the largest float16: both are right
    return "" if bool((((result.double() - wanted).abs() <= bound) | too_large).all()) else "not within rounding"


def check_activation(draw: Draw, variant: str) -> str:
    """The quantized activation is, bit for bit, the formula's."""
    tokens, features = draw.tokens(), draw.size()
    x, rotation, limit = draw.activations(tokens, features), draw.rotation(features), draw.activation_max()
    count = draw.random.randint(0, min(features, 20))
    channels = torch.randperm(features, generator=draw.generator)[:count]
    smoothing = 1 + 9 * torch.rand(count, generator=draw.generator)
    smoothing[torch.rand(count, generator=draw.generator) < 0.5] = torch.inf
    got = cpu.quantize_activation(x, channels, draw.laid_out(smoothing), limit, rotation, variant=variant)
    return differences(got, numerics.quantize_activation(x, channels, smoothing, limit, rotation))


def operands(draw: Draw) -> tuple[Tensor, Tensor, bool, int]:
    transpose_w, limit = draw.random.random() < 0.5, draw.activation_max()
    n, k = draw.size(), draw.size()
    a = draw.integers(draw.tokens(), n if transpose_w else k, limit)
    return a, draw.integers(n, k, 127), transpose_w, limit


def exact(a: Tensor, w: Tensor, transpose_w: bool) -> Tensor:
    """In float64, which holds all these integers."""
    return a.double() @ (w if transpose_w else w.t()).double()


def largest_rotated(size: Tensor, rotation: int) -> Tensor:
    """What `numerics.rotate` can make of values of these magnitudes."""
    if rotation == 1:
        return size
    tokens, features = size.shape
    sums = size.view(tokens, features // rotation, rotation).sum(dim=2, keepdim=True) / math.sqrt(rotation)
    return sums.expand(tokens, features // rotation, rotation).reshape(tokens, features)


def differences(got: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> str:
    for name, left, right in zip(("integers", "scales", "outliers"), got, wanted, strict=False):
        if left.dtype != right.dtype or left.shape != right.shape:
            return f"the {name} are {left.dtype} of shape {tuple(left.shape)}"
        if not bool(((left == right) | (left.isnan() & right.isnan())).all()):
            return f"the {name} differ"
    return ""


CHECKS: tuple[Callable[[Draw, str], str], ...] = (check_accumulator, check_product, check_activation)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    counted = run(options.cases, options.seed)
    print(f"{counted.cases} cases, {counted.wrong} wrong")
    for example, where in counted.examples.items():
        print(f"{example} ({where})")
