"""Random calls of the kernel, and the same under the address and undefined-behaviour sanitizers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from quaff_fx.kernels import cpu
from tests.kernels import fuzz

ROOT = Path(__file__).resolve().parent.parent.parent

SANITIZED = """
import ctypes, sys
import torch
from quaff_fx.kernels import cpu
library, variant, cases = sys.argv[1:]
kernel = cpu.build.with_signatures(ctypes.CDLL(library))
cpu.product.library = lambda _: kernel
from tests.kernels import fuzz
counts = fuzz.run(int(cases), seed=1, variants=(variant,))
print(counts.cases, "cases", counts.wrong, "wrong", counts.examples)
"""


def test_random_calls_are_right() -> None:
    counts = fuzz.run(cases=300, seed=7)
    assert counts.examples == {}
    assert (counts.cases, counts.wrong) == (300, 0)


def test_a_wrong_kernel_is_counted_as_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    multiply, quantize = cpu.int8_linear, cpu.quantize_activation
    monkeypatch.setattr(cpu, "int8_linear", lambda *args, **options: multiply(*args, **options) * 1.001 + 1)
    monkeypatch.setattr(
        cpu, "quantize_activation", lambda *args, **options: [-part for part in quantize(*args, **options)]
    )
    counts = fuzz.run(cases=40, seed=7)
    assert counts.wrong > 20
    kinds = {example.partition(":")[0] for example in counts.examples}
    assert kinds == {"check_accumulator", "check_product", "check_activation"}


@pytest.mark.slow
@pytest.mark.parametrize("variant", list(cpu.VARIANTS))
def test_sanitizers_find_nothing_in_random_calls(tmp_path: Path, variant: str) -> None:
    reason = cpu.reason_unavailable(variant)
    if reason is not None:
        pytest.skip(f"{variant}: {reason}")
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None or sys.platform != "linux":
        pytest.skip("no g++ on Linux here")
    asked = subprocess.run([compiler, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    runtime = Path(asked.stdout.strip())
    if not runtime.is_absolute():
        pytest.skip(f"{compiler} has no address sanitizer")
    library = tmp_path / "kernel.so"
    flags = ["-std=c++17", "-O1", "-g", "-w", "-fopenmp", "-shared", "-fPIC", "-fno-omit-frame-pointer"]
    flags += [
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
        *(cpu.VARIANTS[variant] or ["-march=native"]),
    ]
    subprocess.run(
        [compiler, *flags, "-x", "c++", "-", "-o", str(library)],
        input=cpu.build.source(),
        text=True,
        check=True,
        timeout=600,
    )
    environment = os.environ | {
        "LD_PRELOAD": str(runtime),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "PYTHONPATH": str(ROOT),
        "PYTHONMALLOC": "malloc",
    }
    ran = subprocess.run(
        [sys.executable, "-c", SANITIZED, str(library), variant, "300"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    assert ran.stdout.split()[:4] == ["300", "cases", "0", "wrong"], ran.stdout


def test_cases_are_the_same_for_the_same_seed() -> None:
    first, again, other = (fuzz.Draw(seed, 3).activations(5, 40) for seed in (0, 0, 1))
    assert torch.equal(first.nan_to_num(), again.nan_to_num())
    assert first.shape == other.shape
    assert not torch.equal(first.nan_to_num(), other.nan_to_num())
