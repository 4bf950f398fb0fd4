"""The training loops that people have: plain PyTorch, autocast, Accelerate, and the Trainer of transformers."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import quaff_fx
from tests.models import Run, cosine, float_llama, tiny_llama, token_ids

pytestmark = [pytest.mark.compile, pytest.mark.slow]

QUIET = {"progress": False, "calibration_steps": 1}
TWO_STEPS = {"progress": False, "calibration_steps": 2}

CURVE = 0.01
"""Largest distance between a quantized and a float loss at the same step, as a share of the float loss."""


def learner() -> nn.Module:
    """Weights five times as large as usual, so that an adapter of rank 4 learns something in some steps."""
    return tiny_llama(initializer_range=0.1)


@pytest.fixture(autouse=True)
def no_state_of_accelerate() -> Iterator[None]:
    """Accelerate keeps its precision and accumulation in singletons, which would leak into the next test."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="module", autouse=True)
def shapes_are_static_at_first() -> None:
    torch._dynamo.pgo.reset_code_state()


@pytest.fixture
def varying_sizes() -> Iterator[None]:
    """Dynamo remembers per code object which sizes varied, across models: one test's sizes would change the next's."""
    yield
    torch._dynamo.pgo.reset_code_state()


@pytest.fixture(autouse=True)
def no_warning_of_ours() -> Iterator[None]:
    """None of these loops does anything that we have to warn of: float weights still held, say."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", quaff_fx.QuaffWarning)
        yield


def on_both(loop: Callable[[nn.Module], list[float]]) -> tuple[list[float], list[float]]:
    """Runs a loop on the float model, then on the quantized one: same weights, same data."""
    return loop(learner()), loop(quaff_fx.compile(learner(), TWO_STEPS))


def assert_curve_follows(got: list[float], expected: list[float], learned: float = 0.1, bound: float = CURVE) -> None:
    assert len(got) == len(expected)
    assert expected[-1] < (1 - learned) * expected[0], "the float run learns nothing, so the comparison says nothing"
    assert got != expected, "the run that should be quantized is the float run"
    distances = [abs(left / right - 1) for left, right in zip(got, expected, strict=True)]
    assert max(distances) < bound, distances


def optimizer_of(model: nn.Module, lr: float = 1e-2) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)


def batches(count: int) -> list[Tensor]:
    """Two batches over and over, so that there is something to learn."""
    return [token_ids(seed=index % 2) for index in range(count)]


def loss_of(model: nn.Module, ids: Tensor | None = None, **kwargs) -> Tensor:
    ids = token_ids() if ids is None else ids
    return model(input_ids=ids, **({"labels": ids} | kwargs)).loss


@pytest.fixture(scope="module")
def quantized() -> nn.Module:
    """Converted, never updated: its parameters are those of `tiny_llama()`."""
    model = quaff_fx.compile(tiny_llama(), QUIET)
    run = Run(model)
    run.step(token_ids())
    run.step(token_ids())
    return model


@pytest.fixture(scope="module")
def reference() -> nn.Module:
    return tiny_llama()


class TestPlainLoop:
    @pytest.mark.compatibility("Training loops", "plain PyTorch: AdamW, schedule, clipping")
    def test_the_loss_curve_follows_float(self):
        def loop(model: nn.Module) -> list[float]:
            optimizer = optimizer_of(model)
            scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
            losses = []
            for ids in batches(10):
                loss = loss_of(model, ids)
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                losses.append(loss.item())
            return losses

        expected, got = on_both(loop)
        assert_curve_follows(got, expected)
        assert got[:2] == pytest.approx(expected[:2], rel=1e-6)

    @pytest.mark.compatibility("Running modes", "several forwards before one backward")
    @pytest.mark.parametrize("smoothing", ["split", "momentum"])
    def test_several_forwards_before_one_backward(self, reference, smoothing):
        """Pairs for a contrastive loss, say: the second forward commits a scale that the first one has read."""
        model = quaff_fx.compile(tiny_llama(), QUIET | {"smoothing": smoothing, "outlier_budget": 0.05})
        Run(model).step(token_ids(seed=1))
        gradients = []
        for each in (model, reference):
            each.zero_grad()
            chosen, rejected = loss_of(each, token_ids(seed=2)), loss_of(each, token_ids(seed=3))
            (-torch.nn.functional.logsigmoid(3 * (rejected - chosen))).backward()
            gradients.append({name: p.grad.clone() for name, p in each.named_parameters() if p.requires_grad})
        assert cosine(*gradients) > 0.99

    @pytest.mark.compatibility("Running modes", "two models in one process")
    def test_two_models_at_once(self):
        def models() -> list[nn.Module]:
            first, second = learner(), tiny_llama()
            return [quaff_fx.compile(first, TWO_STEPS), quaff_fx.compile(second, TWO_STEPS)]

        def train(active: list[nn.Module]) -> list[list[float]]:
            optimizers = [optimizer_of(model) for model in active]
            losses: list[list[float]] = [[] for _ in active]
            for ids in batches(5):
                for model, optimizer, curve in zip(active, optimizers, losses, strict=True):
                    loss = loss_of(model, ids)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    curve.append(loss.item())
            return losses

        together = train(models())
        alone = [train([model])[0] for model in models()]
        assert together == alone
        assert together[0] != together[1]

    @pytest.mark.compatibility("Running modes", "batch sizes vary (one dynamic graph)")
    @pytest.mark.usefixtures("varying_sizes")
    def test_batch_sizes_vary(self, quantized, reference):
        before = len(quaff_fx.graphs(quantized))
        run, expected = Run(quantized), Run(reference)
        for batch in (2, 3, 4, 5, 3, 2):
            for each in (run, expected):
                each.step(token_ids(batch=batch))
            assert run.losses[-1] == pytest.approx(expected.losses[-1], rel=CURVE), batch
            assert cosine(run.gradients[-1], expected.gradients[-1]) > 0.99, batch
        # One dynamic batch size, for the first block and for the others.
        assert len(quaff_fx.graphs(quantized)) - before == 2

    @pytest.mark.compatibility("Running modes", "padding, left and right")
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padding(self, quantized, reference, side):
        ids, mask = token_ids(), torch.ones(2, 24, dtype=torch.long)
        padding = slice(0, 7) if side == "left" else slice(17, 24)
        mask[0, padding] = 0
        ids[0, padding] = 0
        labels = ids.masked_fill(mask == 0, -100)
        run, expected = Run(quantized), Run(reference)
        for each in (run, expected):
            each.model.zero_grad()
            loss = loss_of(each.model, ids, attention_mask=mask, labels=labels)
            loss.backward()
            each.losses.append(loss.item())
            each.gradients.append({n: p.grad.clone() for n, p in each.model.named_parameters() if p.requires_grad})
        assert run.losses[0] == pytest.approx(expected.losses[0], rel=CURVE)
        assert cosine(run.gradients[0], expected.gradients[0]) > 0.99

    def test_what_stands_under_the_padding_does_not_matter(self, quantized):
        """One scale per token: a padding token takes part in no other token's rounding."""
        mask = torch.ones(2, 24, dtype=torch.long)
        mask[0, 17:] = 0
        logits = []
        for filler in (0, 5):
            ids = token_ids().masked_fill(mask == 0, filler)
            logits.append(quantized(input_ids=ids, attention_mask=mask).logits[mask == 1])
        assert torch.equal(*logits)


class TestEvaluation:
    @pytest.mark.compatibility("Running modes", "eval(), no_grad, inference_mode")
    def test_between_training_steps(self, quantized, reference):
        run = Run(quantized)
        before = run.step(token_ids())
        steps = quaff_fx.explain(quantized).steps
        quantized.eval()
        reference.eval()
        try:
            with torch.no_grad():
                got, expected = (loss_of(model, token_ids(seed=5)) for model in (quantized, reference))
            with torch.inference_mode():
                in_inference_mode = loss_of(quantized, token_ids(seed=5))
        finally:
            quantized.train()
            reference.train()
        assert got.item() == pytest.approx(expected.item(), rel=CURVE)
        assert got.item() != expected.item()
        assert in_inference_mode.item() == got.item()
        assert run.step(token_ids()) == before
        assert quaff_fx.explain(quantized).steps == steps

    def test_inference_mode_before_the_conversion(self):
        """A first evaluation before any training, then a calibration step: nothing may be left in inference mode."""
        model = quaff_fx.compile(tiny_llama(), QUIET)
        model.eval()
        with torch.inference_mode():
            loss = loss_of(model)
        assert quaff_fx.explain(model).steps == 0
        model.train()
        run = Run(model)
        run.step(token_ids())
        run.step(token_ids())
        assert run.losses[0] == pytest.approx(loss.item(), rel=1e-6)
        assert quaff_fx.explain(model).stage == "quantize"

    def test_hidden_states(self, quantized, reference):
        with torch.no_grad():
            got, expected = (
                model(input_ids=token_ids(), output_hidden_states=True).hidden_states
                for model in (quantized, reference)
            )
        assert len(got) == len(expected) == 3
        for left, right in zip(got, expected, strict=True):
            assert (left - right).norm() < 0.02 * right.norm()


class TestAutocast:
    @pytest.fixture(scope="class")
    @classmethod
    def runs(cls) -> tuple[Run, Run]:
        runs = Run(quaff_fx.compile(tiny_llama(), QUIET)), Run(tiny_llama())
        for run in runs:
            for _ in range(2):
                with torch.autocast("cpu", torch.bfloat16):
                    run.step(token_ids())
        return runs

    @pytest.mark.compatibility("Running modes", "torch.autocast")
    def test_loss_and_gradients_follow_float_under_autocast(self, runs):
        run, reference = runs
        assert run.losses[0] == pytest.approx(reference.losses[0], rel=1e-6)
        assert run.losses[1] == pytest.approx(reference.losses[1], rel=CURVE)
        assert cosine(run.gradients[1], reference.gradients[1]) > 0.99
        assert {g.dtype for g in run.gradients[1].values()} == {torch.float32}

    def test_every_linear_is_int8(self, runs):
        assert quaff_fx.explain(runs[0].model).int8_share > 0.8

    def test_block_outputs_have_the_dtype_of_autocast(self, runs):
        dtypes = []
        for run in runs:
            inputs_of_norm: list[torch.dtype] = []
            hook = run.model.base_model.model.model.norm.register_forward_pre_hook(
                lambda _, args, seen=inputs_of_norm: seen.append(args[0].dtype)
            )
            with hook, torch.autocast("cpu", torch.bfloat16):
                inputs_of_norm.append(run.model(input_ids=token_ids(), labels=token_ids()).logits.dtype)
            dtypes.append(inputs_of_norm)
        assert len(dtypes[0]) == 2
        assert dtypes[0] == dtypes[1]

    def test_linear_outputs_have_the_dtype_of_autocast(self, runs):
        graph = quaff_fx.graphs(runs[0].model)[0]
        linears = [line for line in graph.rewritten.splitlines() if "torch.ops.quaff.linear.default(" in line]
        assert len(linears) == 7
        assert all('"bf16[' in line for line in linears), linears
        products = [line for line in graph.lowered[0].splitlines() if "torch.ops.quaff.int8_linear.default(" in line]
        # The last one gives float32 in its epilogue: it goes into the sum with the float32 residual, and nowhere else.
        assert ['"bf16[' in line for line in products] == [True] * 6 + [False], products

    def test_graphs_are_lowered_as_they_were_captured(self, runs):
        """`graphs` is asked for text after training, outside autocast."""
        graph = quaff_fx.graphs(runs[0].model)[0]
        with torch.autocast("cpu", torch.float16):
            elsewhere = graph.lowered
        assert len(elsewhere) == 2
        assert elsewhere == graph.lowered

    def test_eager_products_have_the_dtype_of_autocast(self, runs):
        """A forward with a KV cache runs eagerly, on the same int8 weights."""
        dtypes, logits = [], []
        for run in runs:
            seen: list[torch.dtype] = []
            module = run.model.base_model.model.model.layers[1].self_attn.k_proj.base_layer
            hook = module.register_forward_hook(lambda _, args, y, seen=seen: seen.append(y.dtype))
            with hook, torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                logits.append(run.model(input_ids=token_ids(), use_cache=True).logits.float())
            dtypes.append(seen)
        assert dtypes == [[torch.bfloat16], [torch.bfloat16]]
        assert (logits[0] - logits[1]).norm() < 0.02 * logits[1].norm()

    def test_the_observed_step_is_the_float_step(self, runs):
        """It runs under the autocast of the loop: the same products in the same dtype."""
        run, reference = runs
        assert run.losses[0] == reference.losses[0]
        assert run.gradients[0].keys() == reference.gradients[0].keys()
        for name, gradient in reference.gradients[0].items():
            assert torch.equal(run.gradients[0][name], gradient), name


@pytest.mark.compatibility("Training loops", "Accelerate: accumulation, clipping")
def test_accelerate():
    def loop(model: nn.Module) -> list[float]:
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        loader = torch.utils.data.DataLoader(torch.cat(batches(12)), batch_size=2)
        model, optimizer, loader = accelerator.prepare(model, optimizer_of(model), loader)
        losses = []
        for ids in loader:
            with accelerator.accumulate(model):
                loss = loss_of(model, ids)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
        unwrapped = accelerator.unwrap_model(model)
        assert not any("_orig_mod" in name for name in accelerator.get_state_dict(unwrapped))
        return losses

    expected, got = on_both(loop)
    assert_curve_follows(got, expected)


class Records:
    """Runs a Trainer and keeps what it logged, and the adapters that it saved."""

    def __init__(self, model: nn.Module, folder: Path, **arguments) -> None:
        settings = {
            "max_steps": 6,
            "per_device_train_batch_size": 2,
            "per_device_eval_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-2,
            "max_grad_norm": 1.0,
            "logging_steps": 1,
            "eval_strategy": "steps",
            "eval_steps": 3,
            "save_steps": 3,
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": True,
            "dataloader_pin_memory": False,
            "seed": 0,
        } | arguments
        rows = [{"input_ids": row, "labels": row} for row in torch.cat(batches(2))]
        self.trainer = Trainer(
            model=model,
            args=TrainingArguments(output_dir=str(folder), **settings),
            train_dataset=rows * 8,
            eval_dataset=rows,
        )
        self.trainer.train()
        history = self.trainer.state.log_history
        self.losses = [entry["loss"] for entry in history if "loss" in entry]
        self.evaluations = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
        self.model = model
        self.adapter = folder / "checkpoint-6"


class TestTrainer:
    @pytest.fixture(scope="class")
    @classmethod
    def records(cls, tmp_path_factory) -> tuple[Records, Records]:
        """The quantized run and the float run with the same seed."""
        folder = tmp_path_factory.mktemp("trainer")
        quantized = Records(quaff_fx.compile(learner(), TWO_STEPS), folder / "quantized")
        return quantized, Records(learner(), folder / "float")

    @pytest.mark.compatibility("Training loops", "Trainer: accumulation, clipping, evaluation")
    def test_losses_follow_the_float_run(self, records):
        quantized, plain = records
        assert len(plain.losses) == 6
        assert_curve_follows(quantized.losses, plain.losses)
        assert quantized.losses[0] == pytest.approx(plain.losses[0], rel=1e-4)  # two accumulated calibration steps
        assert len(plain.evaluations) == 2
        assert quantized.evaluations == pytest.approx(plain.evaluations, rel=CURVE)
        assert quaff_fx.explain(quantized.model).int8_share > 0.8

    def test_saved_adapter_has_the_names_of_the_float_run(self, records):
        names = []
        for run in records:
            saved = load_file(run.adapter / "adapter_model.safetensors")
            names.append({name: tensor.shape for name, tensor in saved.items()})
            assert (run.adapter / "optimizer.pt").exists()
        assert names[0] == names[1]
        assert not any("_orig_mod" in name or "quaff" in name for name in names[0])
        configs = [json.loads((run.adapter / "adapter_config.json").read_text()) for run in records]
        assert configs[0].keys() == configs[1].keys()

    def test_saved_adapter_loads_on_the_plain_model(self, records):
        """Trained on int8 weights, deployed on the float ones, by stock PEFT."""
        quantized, _ = records
        loaded = PeftModel.from_pretrained(float_llama(initializer_range=0.1), quantized.adapter).eval()
        saved = load_file(quantized.adapter / "adapter_model.safetensors")
        parameters = dict(loaded.named_parameters())
        for name, tensor in saved.items():
            assert torch.equal(parameters[name.replace(".weight", ".default.weight")], tensor)
        losses = [loss_of(loaded, ids).item() for ids in batches(2)]
        assert sum(losses) / 2 == pytest.approx(quantized.evaluations[-1], rel=CURVE)

    def test_adapter_of_a_float_run_loads_on_int8_weights(self, records):
        quantized, plain = records
        quantized.model.load_adapter(plain.adapter, "of_float_run")
        quantized.model.set_adapter("of_float_run")
        quantized.model.eval()
        try:
            with torch.no_grad():
                losses = [loss_of(quantized.model, ids).item() for ids in batches(2)]
        finally:
            quantized.model.set_adapter("default")
            quantized.model.delete_adapter("of_float_run")
        assert sum(losses) / 2 == pytest.approx(plain.evaluations[-1], rel=CURVE)

    @pytest.mark.compatibility("Training loops", "Trainer, bf16=True")
    def test_bf16(self, tmp_path):
        quantized = Records(quaff_fx.compile(learner(), TWO_STEPS), tmp_path / "quantized", bf16=True)
        plain = Records(learner(), tmp_path / "float", bf16=True)
        assert_curve_follows(quantized.losses, plain.losses, bound=2 * CURVE)  # bfloat16 rounds at 0.4 % as well
        assert quantized.evaluations == pytest.approx(plain.evaluations, rel=2 * CURVE)
        assert quaff_fx.explain(quantized.model).int8_share > 0.8

    @pytest.mark.compatibility("Training loops", "Trainer, gradient_checkpointing=True")
    def test_gradient_checkpointing(self, tmp_path):
        arguments = {"gradient_checkpointing": True, "max_steps": 4, "eval_strategy": "no", "save_strategy": "no"}
        quantized = Records(quaff_fx.compile(learner(), TWO_STEPS), tmp_path / "quantized", **arguments)
        plain = Records(learner(), tmp_path / "float", **arguments)
        assert_curve_follows(quantized.losses, plain.losses, learned=0.05)
        assert quaff_fx.explain(quantized.model).int8_share > 0.8
        assert all(math.isfinite(loss) for loss in quantized.losses)
