"""Speed of the CPU int8 product beside float32 and torch's own int8 product, interleaved in one run.

    python benchmarks/int8_product.py --tokens 128 512 --shapes 576x576 2048x2048 --threads 1
    python benchmarks/int8_product.py --mkl AVX2 --variants avx2     # what a machine without AVX512 and VNNI sees

Products take packing of the weight in every call, both scales and float32 results; `_int_mm` gives bare integers.
`of peak` compares with the product's own instruction in registers, same run. With one thread the time is the CPU time
of the thread, which a busy machine disturbs less than time on the wall.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import time
from collections.abc import Callable

PEAK = r"""
// Runs the dot product of one tile `steps` times without touching memory; returns the number of multiply-adds.
template <class Dot>
static int64_t run_in_registers(int64_t steps) {
  using namespace quaff;
  constexpr int kSums = kMaxRows * kVectors < 12 ? kMaxRows * kVectors : 12;
  vint sums[kSums] = {};
  vint a = vint{} + 0x01020304, w = vint{} + 0x04030201;
  for (int64_t step = 0; step < steps; step++) {
    QUAFF_UNROLL
    for (int i = 0; i < kSums; i++) {
      QUAFF_PIN(a);
      Dot::accumulate(sums[i], a, w);
      QUAFF_PIN(sums[i]);
    }
  }
  vint total = {};
  QUAFF_UNROLL
  for (int i = 0; i < kSums; i++) total += sums[i];
  volatile int32_t sink = total[0];
  (void)sink;
  return steps * kSums * kLanes * 4 / Dot::kSplit;
}
extern "C" int64_t quaff_peak(int64_t steps, int activation_max) {
  return activation_max <= 63 ? run_in_registers<quaff::DotSmall>(steps) : run_in_registers<quaff::DotFull>(steps);
}
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 512, 2048])
    parser.add_argument("--shapes", nargs="+", default=["576x576", "1536x576", "2048x2048"], help="N x K of the weight")
    parser.add_argument("--variants", nargs="+", help="default: all that this CPU can run")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--mkl", metavar="AVX2", help="largest instruction set that float32 products may use")
    parser.add_argument("--quantizers", action="store_true", help="measure the row quantizers instead")
    return parser.parse_args()


ARGUMENTS = parse_arguments()
if ARGUMENTS.mkl:  # read by MKL when torch loads it
    os.environ["MKL_ENABLE_INSTRUCTIONS"] = ARGUMENTS.mkl

import torch  # noqa: E402
from tabulate import tabulate  # noqa: E402

from quaff_fx.kernels import cpu  # noqa: E402

CLOCK = time.thread_time if ARGUMENTS.threads == 1 else time.perf_counter


def medians(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Returns seconds per call, measured in turns so that a change of clock or of load meets all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(ARGUMENTS.repeats + 1):
        for name, call in calls.items():
            start = CLOCK()
            call()
            if repeat:
                seconds[name].append(CLOCK() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


@functools.cache
def peak(variant: str, activation_max: int) -> float:
    """Returns the operations per second and thread of a variant's dot product in registers."""
    library = cpu.build.compiled(cpu.build.source() + PEAK, cpu.VARIANTS[variant])
    rates = []
    for _ in range(7):
        start = time.thread_time()
        products = library.quaff_peak(1_000_000, activation_max)
        rates.append(2 * products / (time.thread_time() - start))
    return statistics.median(rates)


def has_fast_int_mm() -> bool:
    """Whether oneDNN has an int8 product on this CPU; without VNNI `torch._int_mm` is a plain loop."""
    return bool(torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported())


def product_rows(variants: list[str], n: int, k: int, tokens: int) -> list[list[object]]:
    w = torch.randint(-127, 128, (n, k), dtype=torch.int8)
    w_float = w.float()
    rows = []
    for direction, reduction, columns in (("forward", k, n), ("backward", n, k)):
        right_float, right = (w_float, w) if direction == "backward" else (w_float.t(), w.t())
        x = torch.randn(tokens, reduction)
        scales = {"a_scale": torch.rand(tokens), "w_scale": torch.rand(columns), "out_dtype": torch.float32}
        operands = {q: torch.randint(-q, q + 1, (tokens, reduction), dtype=torch.int8) for q in (63, 127)}
        calls: dict[str, Callable[[], object]] = {"float32": functools.partial(torch.mm, x, right_float)}
        if has_fast_int_mm():
            calls["_int_mm"] = functools.partial(torch._int_mm, operands[127], right)
        peaks = {}
        for variant in variants:
            for q, a in operands.items():
                name = f"{variant}, Q={q}"
                peaks[name] = peak(variant, q) * ARGUMENTS.threads
                calls[name] = functools.partial(
                    cpu.int8_linear,
                    a,
                    w,
                    transpose_w=direction == "backward",
                    activation_max=q,
                    variant=variant,
                    **scales,
                )
        measured = medians(calls)
        for name, seconds in measured.items():
            rate = 2 * tokens * n * k / seconds
            of_peak = rate / peaks[name] if name in peaks else None
            ratio = measured["float32"] / seconds
            rows.append([f"{n}x{k}", tokens, direction, name, seconds * 1e3, rate / 1e9, ratio, of_peak])
    return rows


def quantizer_rows(variants: list[str], k: int, tokens: int) -> list[list[object]]:
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(tokens, k).to(dtype)
        channels, smoothing = torch.randperm(k)[: k // 100], torch.ones(k // 100) * 2
        calls: dict[str, Callable[[], object]] = {"copy": x.clone}
        for variant in variants:
            calls[f"activation, {variant}"] = functools.partial(
                cpu.quantize_activation, x, channels, smoothing, 127, variant=variant
            )
        for name, seconds in medians(calls).items():
            read = x.numel() * x.element_size()
            rows.append([f"{tokens}x{k}", str(dtype).removeprefix("torch."), name, seconds * 1e3, read / seconds / 1e9])
    return rows


def main() -> None:
    torch.set_num_threads(ARGUMENTS.threads)
    torch.manual_seed(0)
    usable = [name for name in cpu.VARIANTS if cpu.reason_unavailable(name) is None]
    # "native" and the forced variant of the same instruction set are one thing.
    variants = ARGUMENTS.variants or [name for name in usable if name not in (cpu.instruction_set("native"), "generic")]
    print(f"native is {cpu.instruction_set('native')}; {ARGUMENTS.threads} threads; median of {ARGUMENTS.repeats}")
    rows: list[list[object]] = []
    for shape in ARGUMENTS.shapes:
        n, k = map(int, shape.split("x"))
        for tokens in ARGUMENTS.tokens:
            rows += (
                quantizer_rows(variants, k, tokens) if ARGUMENTS.quantizers else product_rows(variants, n, k, tokens)
            )
    if ARGUMENTS.quantizers:
        print(tabulate(rows, ["x", "dtype", "what", "ms", "GB/s read"], floatfmt=("", "", "", ".3f", ".1f")))
    else:
        headers = ["weight", "tokens", "direction", "what", "ms", "GOPS", "vs float32", "of peak"]
        print(tabulate(rows, headers, floatfmt=("", "", "", "", ".3f", ".0f", ".2f", ".2f")))


if __name__ == "__main__":
    main()
