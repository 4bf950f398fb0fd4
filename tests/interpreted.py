"""Runs Triton's kernels on the CPU, in this process: through Triton's interpreter, numpy in place of a compiler.

The interpreter's own switch, TRITON_INTERPRET, is read when Triton is first imported and holds for the process; torch's
compiler, which other tests use, would break under it. So here compiled functions are made to interpret themselves.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

ARCHITECTURE = 90
"""The card that product code believes to run on."""


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes every `@triton.jit` function interpret itself, in its tensors' bounds, until `monkeypatch` is undone."""
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder
    from triton.runtime.jit import JITFunction

    from quaff_fx.kernels.cuda import tiles

    spans: list[tuple[int, int]] = []

    def call(function: Any, *args: Any, **kwargs: Any) -> Any:
        """As `InterpretedFunction.__call__`, which leaves the language as it has patched it: nothing would compile."""
        scope = interpreter._patch_lang(function.fn)
        try:
            return InterpretedFunction(function.fn).rewrite()(*args, **kwargs)
        finally:
            scope.restore()

    def run(function: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        spans[:] = [(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) for t in tensors]
        with np.errstate(all="ignore"):  # rows that are not finite are of interest
            InterpretedFunction(function.fn).run(*args, grid=grid, warmup=warmup, **kwargs)

    def checked(access: Any, mask_at: int) -> Any:
        def checked_access(builder: Any, pointers: Any, *operands: Any) -> Any:
            touched = pointers.data[np.broadcast_to(operands[mask_at].data, pointers.data.shape)]
            size = pointers.get_element_ty().primitive_bitwidth // 8
            inside = [(touched >= start) & (touched + np.uint64(size) <= start + length) for start, length in spans]
            assert np.any(inside, axis=0).all(), "a kernel reaches past its tensors"
            return access(builder, pointers, *operands)

        return checked_access

    def patched(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        # Triton 3.6 converts arrays of one element, which numpy 2.4 refuses.
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    patch_tensor = interpreter._patch_lang_tensor
    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", checked(load, 0))
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", checked(store, 1))
    monkeypatch.setattr(JITFunction, "__call__", call)
    monkeypatch.setattr(JITFunction, "run", run)
    cast = InterpreterBuilder.cast_impl
    monkeypatch.setattr(InterpreterBuilder, "create_dot", _dot)
    monkeypatch.setattr(InterpreterBuilder, "cast_impl", lambda *operands: _cast(cast, *operands))
    monkeypatch.setattr(tiles, "architecture", lambda device: ARCHITECTURE)


def _dot(builder: Any, a: Any, b: Any, total: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    """A tile's product. The interpreter's own takes the bits of bfloat16 for integers, and is slow with int8.

    float64 holds the integers exactly. Float products are added up in float32, as tensor cores do.
    """
    from triton.runtime.interpreter import TensorHandle

    is_integer = total.dtype.scalar.is_int()
    product = _values(a) @ _values(b) if is_integer else _values(a).astype(np.float32) @ _values(b).astype(np.float32)
    return TensorHandle(product.astype(total.data.dtype) + total.data, total.dtype.scalar)


def _cast(cast: Any, builder: Any, value: Any, dtype: Any) -> Any:
    """A change of dtype. The interpreter's own cuts float32 off to bfloat16; cards round it to the nearest."""
    from triton import language as tl
    from triton.runtime.interpreter import TensorHandle

    if value.dtype.scalar != tl.float32 or dtype.scalar != tl.bfloat16:
        return cast(builder, value, dtype)
    rounded = torch.from_numpy(np.ascontiguousarray(value.data)).to(torch.bfloat16)
    return TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)


def _values(handle: Any) -> np.ndarray:
    if handle.dtype.scalar.is_bf16():
        return (handle.data.astype(np.uint32) << 16).view(np.float32)
    return handle.data.astype(np.float64)


def rotated(x: torch.Tensor, block: int) -> torch.Tensor:
    """Returns x (..., K) with each block of `block` neighbouring features times the orthogonal Hadamard matrix."""
    matrix = torch.ones(1, 1, dtype=x.dtype)
    while matrix.shape[0] < block:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    blocks = x.reshape(*x.shape[:-1], x.shape[-1] // block, block)
    return (blocks @ matrix / block**0.5).reshape(x.shape)
