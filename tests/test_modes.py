"""The ways in which people run a model: checkpointing, dtypes, generation, copies, saved states, threads."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import quaff_fx
from quaff_fx.api import stages_of
from quaff_fx.weights import QuantizedWeight
from quaff_fx.weights.owners import RUN, int8_places
from tests.models import Run, cosine, float_llama, tiny_llama, token_ids, with_lora

pytestmark = [pytest.mark.compile, pytest.mark.slow]

QUIET = {"progress": False, "calibration_steps": 1}


@pytest.fixture(scope="module", autouse=True)
def shapes_are_static_at_first() -> None:
    torch._dynamo.pgo.reset_code_state()


def llama() -> nn.Module:
    """The input of the first block needs a gradient, so that one graph serves all blocks."""
    model = float_llama()
    model.enable_input_require_grads()
    return with_lora(model).train()


@pytest.fixture(scope="module")
def quantized() -> nn.Module:
    """Converted, never updated: its parameters are those of `llama()`."""
    model = quaff_fx.compile(llama(), QUIET)
    run = Run(model)
    run.step(token_ids())
    run.step(token_ids())
    return model


@pytest.fixture(scope="module")
def reference() -> nn.Module:
    return llama()


class Block(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.up = nn.Linear(size, 2 * size).requires_grad_(False)
        self.down = nn.Linear(2 * size, size).requires_grad_(False)
        self.gain = nn.Parameter(torch.ones(2 * size))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x) * self.gain))


class Checkpointed(nn.Module):
    """Blocks that are called through `torch.utils.checkpoint`, as models outside transformers do."""

    def __init__(self, use_reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.use_reentrant = use_reentrant
        self.embed = nn.Linear(8, 32)
        self.blocks = nn.ModuleList(Block(32) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x) if self.use_reentrant is None else checkpoint(block, x, use_reentrant=self.use_reentrant)
        return x


@pytest.mark.compatibility("Running modes")
@pytest.mark.parametrize(
    "use_reentrant",
    [
        pytest.param(False, id="torch.utils.checkpoint around blocks"),
        pytest.param(True, id="torch.utils.checkpoint around blocks, reentrant"),
    ],
)
def test_checkpoints_around_compiled_blocks(use_reentrant):
    """A replayed forward may neither count as a step nor move the smoothing scale that backward reads."""
    x = torch.randn(12, 8)
    config = QUIET | {"smoothing": "momentum", "outlier_budget": 0.05}
    gradients, scales = [], []
    for mode in (None, use_reentrant):
        model = quaff_fx.compile(Checkpointed(mode), config)
        for step in range(3):
            model.zero_grad()
            model(x * (1 + step)).square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
        weights = [module for module in model.modules() if isinstance(module, QuantizedWeight)]
        scales.append(torch.cat([weight.outliers.next_smoothing_scale for weight in weights]))
        assert quaff_fx.explain(model).steps == 1
        assert len(weights) == 6
    assert cosine(*gradients) > 0.99999
    torch.testing.assert_close(scales[0], scales[1])


class TestDtypes:
    @pytest.mark.compatibility("Running modes")
    @pytest.mark.parametrize(
        ("dtype", "is_compiled"),
        [
            pytest.param(torch.bfloat16, True, id="bfloat16 model"),
            pytest.param(torch.float16, False, id="float16 model"),
        ],
    )
    def test_half_precision(self, dtype, is_compiled):
        reference = Run(llama().to(dtype))
        reference.step(token_ids())
        model = quaff_fx.compile(llama().to(dtype), QUIET)
        run = Run(model)
        run.step(token_ids())
        if not is_compiled:  # the same numbers, without Inductor
            stages_of(model).convert()
            call_blocks_eagerly(model)
        run.step(token_ids())
        assert run.losses[0] == pytest.approx(reference.losses[0], rel=1e-6)
        assert run.losses[1] == pytest.approx(reference.losses[0], rel=0.01)
        assert cosine(run.gradients[1], reference.gradients[0]) > 0.98
        assert {gradient.dtype for gradient in run.gradients[1].values()} == {dtype}
        assert quaff_fx.explain(model).int8_share > 0.8

    @pytest.mark.compatibility("Running modes")
    @pytest.mark.parametrize(
        "is_converted",
        [
            pytest.param(False, id="model.to(dtype) after compile"),
            pytest.param(True, id="model.to(dtype) after conversion"),
        ],
    )
    def test_moved_after_compile(self, is_converted):
        reference = Run(llama().to(torch.bfloat16))
        reference.step(token_ids())
        model = quaff_fx.compile(llama(), QUIET)
        run = Run(model)
        if is_converted:
            run.step(token_ids())
            stages_of(model).convert()
        model.to(torch.bfloat16)
        run.step(token_ids())
        run.step(token_ids())
        assert run.losses[-1] == pytest.approx(reference.losses[0], rel=0.01)
        assert cosine(run.gradients[-1], reference.gradients[0]) > 0.98
        weights = [module for module in model.modules() if isinstance(module, QuantizedWeight)]
        assert len(weights) == 14
        assert {weight.w_scale.dtype for weight in weights} == {torch.float32}
        assert {weight.w_int8.dtype for weight in weights} == {torch.int8}


def call_blocks_eagerly(model: nn.Module) -> None:
    for block in stages_of(model).blocks:
        del block.__dict__[RUN]


class TestGeneration:
    PADDING = 3

    def generate(self, model: nn.Module, ids: Tensor, mask: Tensor, cache: str) -> tuple[Tensor, Tensor]:
        """Returns the new tokens and the logits of the first of them."""
        model.eval()
        try:
            output = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=5,
                min_new_tokens=5,
                do_sample=False,
                pad_token_id=0,
                cache_implementation=cache,
                output_logits=True,
                return_dict_in_generate=True,
            )
        finally:
            model.train()
        return output.sequences[:, ids.shape[1] :], output.logits[0]

    @pytest.mark.compatibility("Running modes")
    @pytest.mark.parametrize(
        "cache",
        [
            pytest.param("dynamic", id="generate(), dynamic KV cache, left padding"),
            pytest.param("static", id="generate(), static KV cache, left padding"),
        ],
    )
    def test_with_a_cache(self, quantized, reference, cache):
        graphs = len(quaff_fx.graphs(quantized))
        ids, mask = token_ids(tokens=10), torch.ones(2, 10, dtype=torch.long)
        mask[0, : self.PADDING] = 0
        tokens, logits = self.generate(quantized, ids, mask, cache)
        _, expected = self.generate(reference, ids, mask, cache)
        assert (logits - expected).norm() < 0.05 * expected.norm()
        assert not torch.equal(logits, expected)
        # Padding is not seen: the first prompt alone, without it, goes on in the same way.
        alone, logits_alone = self.generate(quantized, ids[:1, self.PADDING :], mask[:1, self.PADDING :], cache)
        torch.testing.assert_close(logits_alone[0], logits[0], rtol=1e-3, atol=1e-4)
        assert torch.equal(alone[0], tokens[0])
        assert len(quaff_fx.graphs(quantized)) == graphs

    def test_both_caches_give_the_same_tokens(self, quantized):
        ids, mask = token_ids(tokens=10), torch.ones(2, 10, dtype=torch.long)
        dynamic, static = (self.generate(quantized, ids, mask, cache) for cache in ("dynamic", "static"))
        assert torch.equal(dynamic[0], static[0])


@pytest.mark.compatibility("Running modes", "gradients of inputs")
def test_gradients_of_inputs(quantized, reference):
    gradients = []
    for model in (quantized, reference):
        embeddings = model.get_input_embeddings()(token_ids()).detach().requires_grad_()
        model.zero_grad()
        model(inputs_embeds=embeddings, labels=token_ids()).loss.backward()
        gradients.append({"inputs": embeddings.grad})
    assert cosine(*gradients) > 0.99
    assert not torch.equal(gradients[0]["inputs"], gradients[1]["inputs"])


def pickled(module: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(module))


class TestCopiesAndStates:
    @pytest.mark.compatibility("Running modes", "deepcopy while observing")
    def test_a_copy_goes_on_observing(self):
        model = quaff_fx.compile(llama(), QUIET | {"calibration_steps": 3})
        Run(model).step(token_ids(seed=1))
        copied = copy.deepcopy(model)
        for each in (model, copied):
            Run(each).step(token_ids(seed=2))
        for each in (model, copied):
            stages_of(each).convert()
        channels = [[row.outlier_channels for row in quaff_fx.explain(each).rows] for each in (model, copied)]
        assert channels[0] == channels[1]
        assert sum(bool(outliers) for outliers in channels[0]) == 14
        assert [quaff_fx.explain(each).steps for each in (model, copied)] == [2, 2]

    def test_a_copy_that_does_not_train_is_converted_with_the_model(self):
        """A reference model, or an average of weights, has to have the parameters of the model that it is a copy of."""
        model = quaff_fx.compile(llama(), QUIET)
        copied, other = copy.deepcopy(model), copy.deepcopy(model)
        Run(other).step(token_ids(seed=3))  # this one trains: it goes its own way
        Run(model).step(token_ids(seed=1))
        Run(model).step(token_ids(seed=2))
        assert [quaff_fx.explain(each).stage for each in (model, copied, other)] == ["quantize", "quantize", "observe"]
        state, expected = copied.state_dict(), model.state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())
        assert not any(tensor.data_ptr() == expected[name].data_ptr() for name, tensor in state.items())
        with torch.no_grad():
            assert torch.equal(*(each(input_ids=token_ids()).logits for each in (model, copied)))

    @pytest.mark.parametrize("is_int8", [False, True], ids=["observing", "converted"])
    @pytest.mark.parametrize("copied", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
    @pytest.mark.parametrize("part", ["model", "inner", "block"])
    def test_copies_of_the_whole_and_of_parts(self, part, copied, is_int8):
        """Each runs on its own: what is done with it leaves the original as it is."""
        model = quaff_fx.compile(tiny_llama(), QUIET)
        if is_int8:
            quaff_fx.calibrate(model, [token_ids()])
        inner = model.base_model.model.model
        original = {"model": model, "inner": inner, "block": inner.layers[1]}[part]
        other = copied(original)
        assert type(other) is type(original)
        assert [type(module) for module in other.modules()] == [type(module) for module in original.modules()]
        state, expected = other.state_dict(), original.state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())
        if part == "block":
            x = torch.randn(2, 24, 48)
            positions = inner.rotary_emb(x, torch.arange(24)[None])
            with torch.no_grad():
                outputs = [block.quaff_forward(x, position_embeddings=positions) for block in (original, other)]
                assert torch.equal(outputs[0], other(x, position_embeddings=positions))
            assert torch.equal(*outputs)
            assert len(int8_places(other)) == 7 * is_int8
            return
        with torch.no_grad():
            assert torch.equal(*(each(input_ids=token_ids())[0] for each in (original, other)))
        stages = stages_of(other)
        assert stages is not stages_of(original)
        assert stages.stage == ("quantize" if is_int8 else "observe")
        steps = stages.steps
        other(input_ids=token_ids())[0].sum().backward()
        assert stages.steps == steps + (not is_int8)
        assert stages_of(original).steps == steps
        assert all(p.grad is None for p in original.parameters())
        quaff_fx.dequantize(other)
        assert int8_places(other) == []
        assert len(int8_places(original)) == 14 * is_int8
        assert quaff_fx.explain(original).stage == ("quantize" if is_int8 else "observe")

    @pytest.mark.compatibility("Running modes", "state dict through torch.save and torch.load")
    def test_state_dict_on_disk(self, quantized, tmp_path):
        expected = Run(quantized).step(token_ids())
        torch.save(quantized.state_dict(), tmp_path / "state.pt")
        saved = torch.load(tmp_path / "state.pt", weights_only=True)
        # Another base model that was calibrated on other batches.
        other = quaff_fx.compile(llama(), QUIET)
        for parameter in other.parameters():
            parameter.data *= 1.1
        quaff_fx.calibrate(other, [token_ids(seed=9)])
        assert Run(other).step(token_ids()) != expected
        other.load_state_dict(saved)
        assert Run(other).step(token_ids()) == expected

    def test_states_of_another_stage_are_refused(self, quantized, reference):
        observed = quaff_fx.compile(llama(), QUIET)
        for model, state in (
            (reference, quantized.state_dict()),
            (observed, quantized.state_dict()),
            (quantized, reference.state_dict()),
        ):
            with pytest.raises(RuntimeError, match=r"self_attn\.q_proj\.base_layer\.quaff_weight\.w_int8"):
                model.load_state_dict(state)


@pytest.mark.compatibility("Running modes", "two models in two threads")
def test_two_models_in_two_threads():
    def runs() -> list[Run]:
        # transformers leaves the mask out with "sdpa", but not while any thread traces: other numbers in the last bit.
        first, second = (float_llama(attn_implementation="eager") for _ in range(2))
        first.enable_input_require_grads()
        return [Run(quaff_fx.compile(with_lora(model).train(), QUIET)) for model in (first, second)]

    def train(run: Run) -> None:
        for seed in range(4):
            run.step(token_ids(seed=seed))

    alone, together = runs(), runs()
    for run in alone:
        train(run)
    torch._dynamo.reset()  # both threads trace, as in a new process
    threads = [threading.Thread(target=train, args=(run,)) for run in together]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert [run.losses for run in together] == [run.losses for run in alone]
    assert len(together[0].losses) == len(together[1].losses) == 4
    for left, right in zip(together, alone, strict=True):
        assert cosine(left.gradients[-1], right.gradients[-1]) > 0.99999


def test_calibration_and_generation_while_another_thread_compiles(quantized):
    """What torch says of compiling, it says to all threads."""
    torch._dynamo.reset()
    tracing, done = threading.Event(), threading.Event()

    def trace(graph_module: torch.fx.GraphModule, _: list[Tensor]) -> object:
        tracing.set()
        done.wait()
        return graph_module.forward

    thread = threading.Thread(target=torch.compile(lambda x: x + 1, backend=trace), args=(torch.ones(2),))
    thread.start()
    try:
        assert tracing.wait(60)
        assert torch.compiler.is_compiling()
        run = Run(quaff_fx.compile(llama(), QUIET))
        run.step(token_ids())
        with torch.no_grad():
            logits = quantized(input_ids=token_ids(), use_cache=True).logits
    finally:
        done.set()
        thread.join()
    assert quaff_fx.explain(run.model).steps == 1
    stages_of(run.model).convert()
    assert sum(row.stage == "int8" for row in quaff_fx.explain(run.model).rows) == 14
    with torch.no_grad():
        assert torch.equal(logits, quantized(input_ids=token_ids(), use_cache=True).logits), "eager products are int8"


def test_attention_of_torch_is_never_fused_away():
    """In evaluation torch would run a whole encoder layer as one kernel, past the linears and past their adapters."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True)
        model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        return with_lora(model, target_modules=["linear1", "linear2"]).train()

    x = torch.randn(2, 5, 32)
    expected = build()(x)
    model = quaff_fx.compile(build(), QUIET)
    model.eval()
    with torch.no_grad():
        before_training = model(x)
    model.train()
    model(x).sum().backward()
    stages_of(model).convert()
    call_blocks_eagerly(model)
    model.eval()
    with torch.no_grad():
        after_conversion = model(x)
    torch.testing.assert_close(before_training, expected)
    assert (after_conversion - expected).norm() < 0.05 * expected.norm()
    stages = {row.name: row.stage for row in quaff_fx.explain(model).rows}
    assert stages["layers.0.linear1"] == stages["layers.1.linear2"] == "int8"
    assert torch.backends.mha.get_fastpath_enabled()
