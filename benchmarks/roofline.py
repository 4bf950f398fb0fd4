"""What int8 products can reach on this CPU, beside what they reach and need in a training step."""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from collections import Counter
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch

from benchmarks.step_worker import Linear
from quaff_fx.kernels import cpu


@dataclass(frozen=True)
class Roofline:
    """What int8 products can reach here, in 1e9 operations per second, and what they and float32 need for a step."""

    peak_gops: float
    kernel_gops: float
    kernel_seconds: float
    float32_seconds: float


def int8_roofline(
    connection: Connection, linears: tuple[Linear, ...], activation_maxes: tuple[int, ...], threads: int
) -> None:
    """Sends a `Roofline` per activation_max: the bare products of one step, forward and backward."""
    # That program reads its options when it is imported.
    sys.argv = ["int8_product.py", "--threads", str(threads), "--repeats", "5"]
    from benchmarks import int8_product

    torch.set_num_threads(threads)
    forward = Counter((linear.out_features, linear.in_features, linear.tokens) for linear in linears)
    backward = Counter(
        (linear.out_features, linear.in_features, linear.tokens) for linear in linears if linear.has_backward
    )
    seconds: Counter[str] = Counter()
    for n, k, tokens in forward:
        for _, _, direction, name, milliseconds, *_ in int8_product.product_rows([cpu.DEFAULT_VARIANT], n, k, tokens):
            times = (forward if direction == "forward" else backward)[n, k, tokens]
            seconds[str(name)] += times * float(str(milliseconds)) / 1e3  # type: ignore[assignment]
    operations = 2 * sum(linear.multiply_adds for linear in linears)
    connection.send(
        {
            q: Roofline(
                int8_product.peak(cpu.DEFAULT_VARIANT, q) * threads / 1e9,
                operations / seconds[f"{cpu.DEFAULT_VARIANT}, Q={q}"] / 1e9,
                seconds[f"{cpu.DEFAULT_VARIANT}, Q={q}"],
                seconds["float32"],
            )
            for q in activation_maxes
        }
    )


def rooflines(
    activation_maxes: set[int | None], linears: tuple[Linear, ...], options: argparse.Namespace
) -> dict[int, Roofline]:
    """Returns a roofline per activation_max, in a process of its own; none on CUDA or without the compiled kernel."""
    wanted = tuple(sorted(q for q in activation_maxes if q))
    if not wanted or options.device != "cpu" or cpu.reason_unavailable() is not None:
        return {}
    context = multiprocessing.get_context("spawn")
    near, far = context.Pipe()
    threads = options.threads or torch.get_num_threads()
    process = context.Process(target=int8_roofline, args=(far, linears, wanted, threads))
    process.start()
    far.close()
    try:
        result: dict[int, Roofline] = near.recv()
    except EOFError:
        return {}
    finally:
        process.join()
    return result
