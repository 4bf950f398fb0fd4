"""The library of the CPU kernel: its variants, its sources as one file, and what keeps it from being built."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from quaff_fx.errors import ConfigError
from quaff_fx.kernels import cpu
from quaff_fx.kernels.cpu import build


def test_native_variant_is_available_here() -> None:
    assert cpu.reason_unavailable("native") is None
    assert cpu.instruction_set("native") in {"avx512_vnni", "avx_vnni", "avx2", "neon_dotprod", "generic"}


def test_reason_unavailable_says_what_the_compiler_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cpu.VARIANTS, "broken", ("-DQUAFF_ISA_AVX2", "-mno-such-flag"))
    reason = cpu.reason_unavailable("broken")
    assert reason is not None
    assert "cannot be compiled" in reason
    assert "-mno-such-flag" in reason
    assert cpu.instruction_set("broken") == "none"


EMULATED_CHECK = r"""
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <vector>
static int32_t next(uint32_t& state, int limit) {
  state = state * 1664525u + 1013904223u;
  return static_cast<int32_t>((state >> 8) % (2 * limit + 1)) - limit;
}
int main() {
  uint32_t state = 1;
  int wrong = 0;
  for (int tokens : {1, 3, 4, 9, 22}) for (int reduction : {1, 5, 16, 67, 130}) for (int columns : {1, 15, 16, 70}) {
    for (int transposed : {0, 1}) for (int limit : {63, 127}) {
      std::vector<int8_t> a(tokens * reduction), w(reduction * columns);
      for (auto& value : a) value = next(state, limit);
      for (auto& value : w) value = next(state, 127);
      std::vector<int32_t> out(tokens * columns);
      if (quaff_int8_linear(a.data(), w.data(), tokens, reduction, columns, transposed, limit, nullptr, nullptr,
                            nullptr, nullptr, 0, nullptr, out.data(), quaff::kInt32, 1, 2)) wrong++;
      for (int t = 0; t < tokens; t++) for (int c = 0; c < columns; c++) {
        int32_t sum = 0;
        for (int r = 0; r < reduction; r++) {
          sum += a[t * reduction + r] * w[transposed ? r * columns + c : c * reduction + r];
        }
        wrong += sum != out[t * columns + c];
      }
      std::vector<float> x(tokens * reduction), scale(tokens);
      std::vector<int8_t> x_int8(tokens * reduction);
      for (auto& value : x) value = next(state, 1000000) * 1e-3f;
      if (quaff_quantize_rows(x.data(), quaff::kFloat32, tokens, reduction, reduction, nullptr, nullptr, 0,
                              limit, 1, x_int8.data(), scale.data(), nullptr, 2)) wrong++;
      for (int i = 0; i < tokens * reduction; i++) {
        const float* const row = x.data() + i / reduction * reduction;
        float absmax = 0;
        for (int r = 0; r < reduction; r++) absmax = std::max(absmax, std::abs(row[r]));
        const float product = x[i] * (1.0f / absmax * limit);
        wrong += scale[i / reduction] != absmax * static_cast<float>(1.0 / limit);
        wrong += x_int8[i] != (absmax == 0 ? 0 : static_cast<int>(std::nearbyint(product)));
      }
    }
  }
  for (int block = 1; block <= 512; block *= 2) {
    const int width = 3 * block;
    std::vector<float> x(width);
    for (auto& value : x) value = next(state, 1000000) * 1e-3f;
    std::vector<float> rotated = x;
    quaff::rotate_row(rotated.data(), width, block);
    for (int i = 0; i < width; i++) {
      double sum = 0;
      for (int j = i / block * block, k = 0; k < block; j++, k++) {
        sum += (__builtin_popcount(i % block & k) % 2 ? -1.0 : 1.0) * x[j];
      }
      wrong += !(std::abs(rotated[i] - sum / std::sqrt(block)) < 1e-2);
    }
  }
  std::printf("%s %d wrong\n", quaff_instruction_set(), wrong);
  return wrong != 0;
}
"""


@pytest.mark.parametrize(
    ("flags", "name"),
    [(["-march=armv8.2-a+dotprod+fp16"], "neon_dotprod"), (["-march=armv8-a"], "generic")],
)
def test_arm_build_is_exact(tmp_path: Path, flags: list[str], name: str) -> None:
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if compiler is None:
        pytest.skip("no aarch64-linux-gnu-g++ here (Debian: g++-aarch64-linux-gnu)")
    program = f"{tmp_path}/check"
    strict = ["-Wall", "-Wextra", "-Werror", "-Wno-maybe-uninitialized", "-Wno-uninitialized"]
    subprocess.run(
        [compiler, "-std=c++17", "-O2", "-fopenmp", "-static", *strict, *flags, "-x", "c++", "-", "-o", program],
        input=cpu.build.source() + EMULATED_CHECK,
        text=True,
        check=True,
    )
    if emulator is None:
        pytest.skip("compiled, not run: no qemu-aarch64 here (Debian: qemu-user)")
    ran = subprocess.run([emulator, program], capture_output=True, text=True, timeout=120, check=False)
    assert ran.stdout.strip() == f"{name} 0 wrong"


def test_a_variant_that_is_none_is_refused_with_the_names() -> None:
    with pytest.raises(ConfigError, match=r"^QUAFF_FX_CPU_VARIANT: is 'avx9', expected one of native, avx_vnni, avx2"):
        build.check_variant("avx9")
    with pytest.raises(ConfigError):
        build.obstacle_to_kernel("avx9")


def test_a_variant_that_this_cpu_cannot_run_names_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_cpu_flags", lambda: frozenset(["avx2", "f16c"]))
    found = build.obstacle_to_kernel.__wrapped__("avx_vnni")
    assert found is not None
    assert found.reason == "this CPU lacks avx_vnni, fma"


def test_the_sources_become_one_file_with_each_header_once() -> None:
    source = build.source()
    assert '#include "' not in source
    assert "#pragma once" not in source
    folder = Path(build.__file__).parent
    files = [*folder.glob("*.h"), *folder.glob("*.cpp")]
    assert len(files) > 2
    for file in files:
        title = file.read_text(encoding="utf-8").splitlines()[0]
        assert source.splitlines().count(title) == 1, file.name


def test_what_an_error_in_compiling_says_about_this_machine() -> None:
    full = build.obstacle_of(OSError(28, "No space left on device"))
    assert full is not None
    assert re.match(r"compiled code cannot be kept in .* \(No space left on device\)", full.reason)
    unloadable = build.obstacle_of(OSError("no.so: cannot open shared object file"))
    assert unloadable is not None
    assert unloadable.reason.startswith("compiled code cannot be loaded (no.so: ")
    assert build.obstacle_of(RuntimeError("a shape that does not fit")) is None, "that is about the code"


@pytest.mark.skipif(sys.platform != "linux", reason="ELF is the form of Linux's libraries")
def test_only_half_written_libraries_that_nobody_writes_are_removed(tmp_path: Path) -> None:
    import _ctypes

    whole = Path(_ctypes.__file__).read_bytes()
    contents = {
        "whole": whole,
        "half": whole[: len(whole) // 2],
        "now": whole[:5000],
        "text": b"no library",
        "empty": b"",
    }
    paths = {name: tmp_path / name / "code.so" for name in contents}
    for name, path in paths.items():
        path.parent.mkdir()
        path.write_bytes(contents[name])
        if name != "now":
            os.utime(path, (time.time() - 60,) * 2)
    build.remove_half_written(tmp_path)
    assert {name for name, path in paths.items() if not path.exists()} == {"half"}


def test_only_a_cut_off_file_in_the_cache_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    cached, other = tmp_path / "cache" / "a.so", tmp_path / "a.so"
    cached.parent.mkdir()
    cached.touch()
    other.touch()
    assert not build.remove_cut_off(OSError(f"{cached}: undefined symbol: quaff"))
    assert not build.remove_cut_off(OSError(f"{other}: file too short"))
    assert not build.remove_cut_off(RuntimeError(f"{cached}: file too short"))
    assert cached.exists()
    assert other.exists()
    assert build.remove_cut_off(OSError(f"{cached}: file too short"))
    assert not cached.exists()
    assert not build.remove_cut_off(OSError(f"{cached}: file too short")), "it is there no more"
