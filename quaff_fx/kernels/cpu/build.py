"""Builds the C++ files beside this one into a library, and says what keeps them from being built.

The library is compiled at first use (about 4 s) and kept in Inductor's cache. Torch's private
`torch._inductor.codecache.CppCodeCache` does both; read in torch 2.13. What keeps it from doing so keeps Inductor from
compiling as well, so `obstacle` speaks for both.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import inspect
import os
import platform
import re
import struct
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from quaff_fx.errors import ConfigError

VARIANTS: dict[str, tuple[str, ...]] = {
    "native": (),
    "avx_vnni": ("-march=haswell", "-mavxvnni", "-DQUAFF_ISA_AVX_VNNI"),
    "avx2": ("-march=haswell", "-DQUAFF_ISA_AVX2"),
    "generic": ("-DQUAFF_ISA_GENERIC",),
}
"""Compiler flags of the variants that can be forced, for tests and benchmarks; "native" takes the best there is."""

DEFAULT_VARIANT = os.environ.get("QUAFF_FX_CPU_VARIANT", "native")


class Obstacle(NamedTuple):
    """Why something cannot be compiled here, and the way out, both in words."""

    reason: str
    way_out: str


_NEEDED_CPU_FLAGS = {"avx_vnni": {"avx2", "fma", "f16c", "avx_vnni"}, "avx2": {"avx2", "fma", "f16c"}}


def instruction_set(variant: str = DEFAULT_VARIANT) -> str:
    """Returns "avx512_vnni", "avx_vnni", "avx2", "neon_dotprod" or "generic"; "none" where nothing can be built."""
    if reason_unavailable(variant) is not None:
        return "none"
    name: bytes = library(variant).quaff_instruction_set()
    return name.decode()


def check_variant(variant: str = DEFAULT_VARIANT) -> None:
    """Raises a ConfigError unless `variant`, which the environment may have named, is a key of `VARIANTS`."""
    if variant not in VARIANTS:
        raise ConfigError(
            f"QUAFF_FX_CPU_VARIANT: is {variant!r}, expected one of {', '.join(VARIANTS)}. Unset it, or choose one."
        )


def reason_unavailable(variant: str = DEFAULT_VARIANT) -> str | None:
    """Returns why the library cannot be used, in words, or None if it can. Compiles it at the first call."""
    found = obstacle_to_kernel(variant)
    return None if found is None else found.reason


@functools.cache
def obstacle_to_kernel(variant: str = DEFAULT_VARIANT) -> Obstacle | None:
    """Returns what keeps the library from being used, or None. Compiles it at the first call.

    Raises:
        ConfigError: there is no such variant.
    """
    check_variant(variant)
    missing = _NEEDED_CPU_FLAGS.get(variant, set()) - _cpu_flags()
    if missing:
        return Obstacle(f"this CPU lacks {', '.join(sorted(missing))}", "Choose another QUAFF_FX_CPU_VARIANT.")
    found = obstacle()
    if found is not None:
        return found
    while True:
        try:
            library(variant)
        except Exception as error:  # no OpenMP, a compiler that is too old, a full disk, ...: all mean the same here
            if not remove_cut_off(error):
                return obstacle_of(error) or _broken_compiler(error)
        else:
            return None


def obstacle() -> Obstacle | None:
    """Returns what keeps C++ from being compiled and kept here, as far as it can be told beforehand, or None."""
    from torch._inductor import cpp_builder
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    try:
        cpp_builder.get_cpp_compiler()
    except Exception:
        return _no_compiler()
    try:
        with tempfile.TemporaryFile(dir=cache_dir()) as file:
            file.write(bytes(4096))
    except OSError as error:
        return obstacle_of(error)
    remove_half_written(Path(cache_dir()))
    return None


def obstacle_of(error: BaseException) -> Obstacle | None:
    """Returns what an error in compiling says about this machine; None if it says something about the code."""
    from torch._inductor import exc

    error = getattr(error, "inner_exception", error)  # Inductor wraps what it meets
    if isinstance(error, exc.InvalidCxxCompiler):
        return _no_compiler()
    if isinstance(error, exc.CppCompileError):
        return _broken_compiler(error)
    if isinstance(error, OSError) and error.errno is None:  # of the loader: no library there, or none that may be run
        return Obstacle(
            f"compiled code cannot be loaded ({error}; CXX is {os.environ.get('CXX', 'not set')!r})",
            "Set CXX to the path of a C++ compiler (gcc is none, and PEFT's BOFT sets it where it finds no CUDA), "
            "TORCHINDUCTOR_CACHE_DIR to a folder from which code may be run.",
        )
    if isinstance(error, OSError):
        folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR", "the folder for temporary files")
        return Obstacle(
            f"compiled code cannot be kept in {folder} ({error.strerror or error})",
            "Make room there, or set TORCHINDUCTOR_CACHE_DIR to a folder that can be written.",
        )
    return None


_CUT_OFF = re.compile(r"(.+?\.so): (file too short|invalid ELF header|ELF load command past end|cannot read file data)")


def remove_cut_off(error: BaseException) -> bool:
    """Removes the compiled file that an error names as cut off; tells whether there was one, to be compiled anew.

    A process that is killed while the linker writes leaves such a file in Inductor's cache, which takes it for whole.
    """
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    error = getattr(error, "inner_exception", error)
    found = _CUT_OFF.match(str(error)) if isinstance(error, (ImportError, OSError)) else None
    if found is None or not (path := Path(found[1])).is_relative_to(cache_dir()) or not path.exists():
        return False
    path.unlink()
    return True


@functools.cache
def remove_half_written(folder: Path) -> None:
    """Removes the libraries below a folder that end before their table of sections, to be compiled anew.

    A crash or a full disk leaves such files. Loading one may end the process (SIGBUS) where no error can be caught. One
    that has changed a moment ago may be another process's, whose linker still writes.
    """
    for path in folder.rglob("*.so"):
        with contextlib.suppress(OSError):
            found = path.stat()
            if time.time() - found.st_mtime > _WRITING_S and 0 < found.st_size < _whole_size(path):
                path.unlink()


_WRITING_S = 5.0


def _whole_size(path: Path) -> int:
    """Where the table of sections of a 64-bit ELF file ends, which linkers put last; 0 of any other file."""
    with path.open("rb") as file:
        header = file.read(64)
    if len(header) < 64 or header[:6] != b"\x7fELF\x02\x01":
        return 0
    (start,), (size, count) = struct.unpack_from("<Q", header, 40), struct.unpack_from("<HH", header, 58)
    return int(start + size * count)


def _no_compiler() -> Obstacle:
    return Obstacle(
        f"no C++ compiler runs here (CXX is {os.environ.get('CXX', 'not set')!r})",
        "Install g++, or set CXX to the path of a compiler, without arguments.",
    )


def _broken_compiler(error: BaseException) -> Obstacle:
    lines = [line for line in str(error).splitlines() if "error: " in line] or str(error).splitlines()
    return Obstacle(
        f"C++ cannot be compiled here ({type(error).__name__}: {lines[0] if lines else 'no message'})",
        "Update the C++ compiler, or set CXX to the path of another one.",
    )


def source() -> str:
    """Returns the C++ files joined into one, each local header in place of its first ``#include``."""
    return _with_headers("int8_gemm.cpp", set())


def _with_headers(name: str, seen: set[str]) -> str:
    seen.add(name)
    lines = []
    for line in (Path(__file__).parent / name).read_text(encoding="utf-8").splitlines():
        header = re.fullmatch(r'#include "(\w+\.h)"', line)
        if header is None:
            lines.append(line if line != "#pragma once" else "")
        elif header[1] not in seen:
            lines.append(_with_headers(header[1], seen))
    return "\n".join(lines) + "\n"


@functools.cache
def library(variant: str) -> ctypes.CDLL:
    """Returns the library of a variant, compiled at the first call."""
    check_variant(variant)
    # Inductor's cache key holds "-march=native" but not what that means; a cache folder shared between machines would
    # hand one machine's code to another.
    processor = hashlib.sha256(" ".join(sorted(_cpu_flags())).encode()).hexdigest()
    # The warnings are gcc bug 105593, in its own AVX512 headers.
    flags = (*VARIANTS[variant], "-ffp-contract=fast", "-Wno-uninitialized", "-Wno-maybe-uninitialized")
    code = f"// CPU features: {processor}\n{source()}"
    return with_signatures(compiled(code, flags))


def compiled(code: str, flags: tuple[str, ...]) -> ctypes.CDLL:
    """Returns the library that C++ `code` makes with `flags` beside Inductor's own, or takes it from its cache."""
    from torch._inductor.codecache import CppCodeCache

    options: dict[str, Any] = {"extra_flags": flags, "needs_vec_isa": False}
    if "needs_vec_isa" not in inspect.signature(CppCodeCache.load_async).parameters:
        del options["needs_vec_isa"]  # torch 2.11 and 2.12 add the flags of the best instruction set instead
    library: ctypes.CDLL = CppCodeCache.load(code, **options)
    return library


def with_signatures(library: ctypes.CDLL) -> ctypes.CDLL:
    """Returns a library made from `source`, told what its functions take."""
    library.quaff_instruction_set.restype = ctypes.c_char_p
    pointer, size, integer = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    library.quaff_int8_linear.argtypes = (
        *(pointer, pointer, size, size, size, integer, integer),  # a, w, sizes, transpose_w, activation_max
        *(pointer, pointer, pointer, pointer, size, pointer),  # scales, outlier operands, outliers, bias
        *(pointer, integer, integer, integer),  # out, out_kind, rotation, threads
    )
    library.quaff_quantize_rows.argtypes = (
        *(pointer, integer, size, size, size),  # x, x_kind, tokens, width, row_stride
        *(pointer, pointer, size),  # channels, smoothing, outliers
        *(integer, integer),  # activation_max, rotation
        *(pointer, pointer, pointer, integer),  # x_int8, x_scale, x_outlier, threads
    )
    return library


@functools.cache
def _cpu_flags() -> frozenset[str]:
    """The features the kernel reports for this CPU; elsewhere than on Linux just its name."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return frozenset([platform.machine(), platform.processor()])
    lines = re.findall(r"^(?:flags|Features)\s*:(.*)$", text, flags=re.MULTILINE)
    return frozenset([platform.machine(), *(lines[0].split() if lines else [])])
