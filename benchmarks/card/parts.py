"""What a step's time on the card goes into: the kernels of a profile, sorted into parts by what they are called."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.card.targets import (
    ADAPTERS,
    ATTENTION,
    BUDGET_MS,
    COPIES,
    FROZEN,
    GATED,
    QUANTIZE,
    REST,
    TRANSPOSES,
)

LARGEST_RANK = 64
"""A product with a side of at most this is an adapter's; outlier columns and padding are within it."""

_PRODUCT = re.compile(
    r"gemm|nvjet|cutlass|cublas|wgmma|_mm_|\bmm\b|addmm|int_mm|\bbmm\b|matmul|int8_linear|int8_product"
)
_PATTERNS = (
    (ATTENTION, re.compile(r"flash|fmha|attention|sdpa")),
    (TRANSPOSES, re.compile(r"^_?transpose|quaff.*transpose")),
    # A fused kernel bears the names of all that is in it: a gradient that is quantized on the way is the gate's.
    (GATED, re.compile(r"silu|sigmoid|gelu|swiglu")),
    (QUANTIZE, re.compile(r"quantize|rotate|hadamard|amax.*round|round.*amax|_to_copy.*round")),
    (COPIES, re.compile(r"memcpy|memset|copy_kernel|catarray|aten::(copy_|cat|constant_pad_nd)$")),
    (
        COPIES,
        re.compile(r"^triton_\w{3}_fused_(_?(to_copy|clone|cat|constant_pad_nd|slice|view|t|permute|unsqueeze|\d+))+$"),
    ),
)


@dataclass(frozen=True)
class Kernel:
    """What ran on the device: its name, the op that launched it with the shapes of its operands, its time in a step."""

    name: str
    op: str
    shapes: tuple[tuple[int, ...], ...]
    ms: float


def part_of(kernel: Kernel) -> str:
    """Returns the part that a kernel belongs to."""
    words = (kernel.name.lower(), kernel.op.lower())
    for part, pattern in _PATTERNS[:2]:
        if any(pattern.search(word) for word in words):
            return part
    if any(_PRODUCT.search(word) for word in words):
        if any("int8" in word or "int_mm" in word for word in words):
            return FROZEN  # an adapter's product in its epilogue is not one of its own
        matrices = [shape for shape in kernel.shapes if len(shape) >= 2]
        return ADAPTERS if any(min(shape[-2:]) <= LARGEST_RANK for shape in matrices) else FROZEN
    for part, pattern in _PATTERNS[2:]:
        if any(pattern.search(word) for word in words):
            return part
    return REST


def milliseconds_by_part(kernels: Sequence[Kernel]) -> dict[str, float]:
    """Returns the time of every part, in the order of `BUDGET_MS`."""
    sums = dict.fromkeys(BUDGET_MS, 0.0)
    for kernel in kernels:
        sums[part_of(kernel)] += kernel.ms
    return sums


def longest(kernels: Sequence[Kernel], count: int = 40) -> list[tuple[str, str, float]]:
    """Returns name, part and milliseconds of the kernels that take longest, all launches of one together."""
    sums: defaultdict[tuple[str, str], float] = defaultdict(float)
    for kernel in kernels:
        sums[kernel.name[:120], part_of(kernel)] += kernel.ms
    ordered = sorted(sums.items(), key=lambda item: -item[1])
    return [(name, part, ms) for (name, part), ms in ordered[:count]]


def profiled_kernels(step: Callable[[], object], steps: int, device: torch.device) -> list[Kernel]:
    """Returns what ran on the device in a step, the mean over some; empty if the profiler sees none of it.

    On a CPU, ops take the place of kernels.
    """
    is_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]
    with profile(activities=activities, record_shapes=True) as profiler:
        for _ in range(steps):
            step()
        if is_cuda:
            torch.cuda.synchronize(device)
    events = list(profiler.events() or ())
    hosts = [event for event in events if event.device_type == DeviceType.CPU]
    if not is_cuda:
        return [
            Kernel(event.name, event.name, _shapes(event.input_shapes), event.self_cpu_time_total / 1e3 / steps)
            for event in hosts
        ]
    launched = [(kernel, event) for event in hosts for kernel in event.kernels]
    kernels = [
        Kernel(kernel.name, event.name, _shapes(event.input_shapes), kernel.duration / 1e3 / steps)
        for kernel, event in launched
    ]
    # Kernels that no op launched, as Triton's, and without the ranges that a profile draws over others.
    remaining: defaultdict[str, float] = defaultdict(float)
    for event in events:
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            remaining[event.name] += event.time_range.elapsed_us() / 1e3 / steps
    for kernel in kernels:
        remaining[kernel.name] -= kernel.ms
    return kernels + [Kernel(name, "", (), ms) for name, ms in remaining.items() if ms > 1e-4]


def _shapes(shapes: Sequence[object] | None) -> tuple[tuple[int, ...], ...]:
    """The shapes of tensors among an op's operands; those of lists of tensors are left out."""
    tensors = [shape for shape in shapes or () if isinstance(shape, list | tuple)]
    return tuple(tuple(shape) for shape in tensors if shape and all(isinstance(size, int) for size in shape))
