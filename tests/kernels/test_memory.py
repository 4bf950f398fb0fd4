"""What surrounds a call of the kernel, and tensors that are not what they seem: no pointer goes to C++ unchecked."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from quaff_fx import numerics
from quaff_fx.errors import ShapeError
from quaff_fx.kernels import cpu, reference

TOKENS, N, K, OUTLIERS = 9, 70, 96, 3
CHANNELS = torch.tensor([5, 0, 95])
SMOOTHING = torch.tensor([2.0, torch.inf, 1.5])


GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(TOKENS, K, generator=GENERATOR)
OPERANDS = {
    "a_int8": torch.randint(-63, 64, (TOKENS, K), dtype=torch.int8, generator=GENERATOR),
    "w_int8": torch.randint(-127, 128, (N, K), dtype=torch.int8, generator=GENERATOR),
    "a_scale": torch.rand(TOKENS, generator=GENERATOR),
    "w_scale": torch.rand(N, generator=GENERATOR),
    "a_outlier": torch.randn(TOKENS, OUTLIERS, generator=GENERATOR),
    "w_outlier": torch.randn(OUTLIERS, N, generator=GENERATOR),
    "bias": torch.randn(N, generator=GENERATOR),
}
EPILOGUE = ("a_scale", "w_scale", "a_outlier", "w_outlier", "bias")


def linear(linear_of: Callable[..., Tensor] = cpu.int8_linear, **changed: Any) -> Tensor:
    options = {"transpose_w": False, "activation_max": 63, "out_dtype": torch.float32}
    return linear_of(**{**OPERANDS, **options, **changed})


def activation(x: Tensor = X, channels: Tensor = CHANNELS, smoothing: Tensor = SMOOTHING) -> tuple[Tensor, ...]:
    return cpu.quantize_activation(x, channels, smoothing, 127, 32)


def everything() -> list[Tensor]:
    """The results of every function on numbers that a step, a conversion or a loading calls."""
    weight, one = X[:, :64].contiguous(), SMOOTHING[[2]].expand(K)
    accumulator = reference.int8_matmul(OPERANDS["a_int8"], OPERANDS["w_int8"], False)
    return [
        linear(),
        linear(reference.int8_linear),
        linear(reference.int8_linear, out_dtype=torch.float16, rotation=2),
        accumulator,
        *activation(),
        *numerics.quantize_activation(X, CHANNELS, SMOOTHING, 127, 32),
        *numerics.quantize_activation(X, CHANNELS[:0], SMOOTHING[:0], 127, 1),
        *numerics.quantize_gradient(X, one, 127),
        *numerics.quantize_rows(X[:, :0], 127),
        *numerics.quantize_weight(weight, 8),
        *numerics.quantize_weight(weight[:, :0]),
        numerics.dequantize_weight(
            *numerics.quantize_weight(weight, 8), numerics.outlier_rows(weight[:, :3]), CHANNELS.clamp(max=63), 8
        ),
        numerics.smoothing_target(X[0].abs(), torch.zeros_like(X[0])),
        numerics.updated_smoothing_scale(X[0].abs(), X[1].abs(), 0.9),
        numerics.channel_absmax(X),
        numerics.channel_absmax(X[:0]),
        numerics.outlier_hits(X[0].abs(), 4),
        numerics.stable_outlier_channels(X[0].abs(), X[1].abs(), 4),
    ]


WANTED = everything()


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def default_device(name: str) -> Iterator[None]:
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize(
    "surroundings",
    [
        pytest.param(lambda: default_dtype(torch.bfloat16), id="bfloat16"),
        pytest.param(lambda: default_dtype(torch.float16), id="float16"),
        pytest.param(lambda: default_dtype(torch.float64), id="float64"),
        pytest.param(lambda: default_device("meta"), id="meta"),
        pytest.param(torch.inference_mode, id="inference-mode"),
        pytest.param(torch.no_grad, id="no-grad"),
        pytest.param(lambda: torch.autocast("cpu", torch.bfloat16), id="autocast"),
    ],
)
def test_what_is_on_around_a_call_changes_nothing(surroundings: Callable[[], Any]) -> None:
    """With bfloat16 as the default dtype the quantizer wrote past its buffers and the process aborted."""
    with surroundings():
        results = everything()
    for result, wanted in zip(results, WANTED, strict=True):
        assert (result.dtype, result.device) == (wanted.dtype, wanted.device)
        assert torch.equal(result, wanted)


# --- tensors that are read right -------------------------------------------------------------------------------------


def negated_view(x: Tensor) -> Tensor:
    """The same values as x, as a tensor whose memory holds the opposite and which has the bit that says so."""
    view = torch._neg_view(-x)
    assert view.is_neg()
    return view


@pytest.mark.parametrize("name", EPILOGUE)
def test_a_tensor_that_is_marked_as_negated_is_read_with_its_sign(name: str) -> None:
    assert torch.equal(linear(**{name: negated_view(OPERANDS[name])}), linear())


def test_activations_that_are_marked_as_negated_are_read_with_their_sign() -> None:
    imaginary = torch.complex(torch.zeros_like(X), -X).conj().imag
    assert imaginary.is_neg()
    for x in (negated_view(X), imaginary):
        assert all(torch.equal(*pair) for pair in zip(activation(x), activation(), strict=True))
    smoothing = negated_view(SMOOTHING)
    assert all(torch.equal(*pair) for pair in zip(activation(smoothing=smoothing), activation(), strict=True))


def test_expanded_and_overlapping_operands_are_read_in_their_order() -> None:
    one = torch.tensor([0.5])
    assert torch.equal(linear(a_scale=one.expand(TOKENS)), linear(a_scale=torch.full((TOKENS,), 0.5)))
    overlapping = torch.arange(TOKENS + K, dtype=torch.float32).as_strided((TOKENS, K), (1, 1))
    for view in (X[:1].expand(TOKENS, K), X[:, :1].expand(TOKENS, K), overlapping):
        wanted = activation(view.clone(memory_format=torch.contiguous_format))
        assert all(torch.equal(*pair) for pair in zip(activation(view), wanted, strict=True))


def test_the_strides_of_single_rows_and_columns_do_not_matter() -> None:
    row = torch.randn(500)
    for size, stride in (((1, 1), (7, 9)), ((3, 1), (100, 77)), ((1, 64), (10**9, 1))):
        view = row.as_strided(size, stride)
        channels = torch.zeros(0, dtype=torch.int64)
        got = cpu.quantize_activation(view, channels, torch.zeros(0), 127, 1)
        assert torch.equal(got[0], numerics.quantize_rows(view.clone(), 127)[0])


def test_parameters_that_want_gradients_are_read_and_results_want_none() -> None:
    y = linear(bias=torch.nn.Parameter(OPERANDS["bias"]), a_outlier=OPERANDS["a_outlier"].clone().requires_grad_())
    assert torch.equal(y, linear())
    assert not y.requires_grad
    assert not any(result.requires_grad for result in activation(X.clone().requires_grad_()))


def test_tensors_of_inference_mode_are_read() -> None:
    with torch.inference_mode():
        x = X.clone()
    assert all(torch.equal(*pair) for pair in zip(activation(x), activation(), strict=True))


# --- tensors that have no memory -------------------------------------------------------------------------------------


class Wrapper(Tensor):
    """A subclass with a shape, a dtype, a CPU device and no memory, as distributed tensors are."""

    @staticmethod
    def __new__(cls, shape: tuple[int, ...], dtype: torch.dtype) -> Wrapper:
        return Tensor._make_wrapper_subclass(cls, shape, dtype=dtype)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return cls(tuple(args[0].shape), args[0].dtype)


def freed(tensor: Tensor) -> Tensor:
    """As FSDP leaves a parameter: its shape is there, its storage is empty."""
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(0)
    return tensor


def shortened(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(tensor.untyped_storage().nbytes() - 1)
    return tensor


def fake(tensor: Tensor) -> Tensor:
    with FakeTensorMode():
        return torch.empty(tensor.shape, dtype=tensor.dtype)


WITHOUT_MEMORY: dict[str, Callable[[Tensor], Tensor]] = {
    "freed": freed,
    "shortened": shortened,
    "fake": fake,
    "wrapper": lambda tensor: Wrapper(tuple(tensor.shape), tensor.dtype),
}


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor:UserWarning")
@pytest.mark.parametrize("kind", WITHOUT_MEMORY)
@pytest.mark.parametrize("name", OPERANDS)
def test_an_operand_without_memory_is_refused(name: str, kind: str) -> None:
    with pytest.raises(ShapeError, match=rf"^{name}: is a \w+ of shape \(.*\) with \d+ bytes of memory, expected at "):
        linear(**{name: WITHOUT_MEMORY[kind](OPERANDS[name])})


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor:UserWarning")
@pytest.mark.parametrize("kind", WITHOUT_MEMORY)
def test_an_activation_without_memory_is_refused(kind: str) -> None:
    lost = WITHOUT_MEMORY[kind]
    for name, call in {
        "x": lambda: activation(lost(X)),
        "outlier_channels": lambda: activation(channels=lost(CHANNELS)),
        "smoothing_scale": lambda: activation(smoothing=lost(SMOOTHING)),
    }.items():
        with pytest.raises(ShapeError, match=rf"^{name}: is a \w+ of shape .* bytes of memory, expected at least"):
            call()


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor:UserWarning")
def test_a_call_under_a_fake_mode_is_refused() -> None:
    """Its results would have no memory to write to."""
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(ShapeError, match=r"^\w+: is a FakeTensor of shape"):
        linear()


def test_tensors_of_vmap_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"^x: is a Tensor of shape"):
        torch.vmap(activation)(X.expand(2, TOKENS, K))


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize(
    "convert",
    [
        pytest.param(Tensor.to_sparse, id="sparse"),
        pytest.param(Tensor.to_mkldnn, id="mkldnn"),
        pytest.param(lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), id="quantized"),
        pytest.param(lambda x: x.to(torch.complex64), id="complex"),
        pytest.param(lambda x: torch.nested.nested_tensor([x, x[:2]], layout=torch.jagged), id="nested"),
    ],
)
def test_other_layouts_and_dtypes_are_refused(convert: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(ShapeError, match=r"^x: (is|has) .*, expected .*\. (Convert|Move|Pass)"):
        activation(convert(X))


@pytest.mark.parametrize("rotation", [2**33, 2**63])
def test_a_rotation_beyond_the_integers_of_c_is_refused(rotation: int) -> None:
    for features in (0, 8):
        with pytest.raises(ShapeError, match=rf"^rotation: is {rotation}, expected a power of two that divides"):
            cpu.quantize_activation(torch.zeros(2, features), CHANNELS[:0], SMOOTHING[:0], 127, rotation)
