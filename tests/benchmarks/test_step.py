"""The step benchmark on a tiny model: every peer trains, the paper's module swap is right, the table adds up."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import peers, step, step_results, step_worker
from tests.data import normal, planted_outliers, quaff_error_bound, quaff_output

TOKENS = 24


def options(*words: str) -> list[str]:
    return ["--shape", "tiny", "--tokens", str(TOKENS), "--threads", "1", *words]


@pytest.fixture
def adapted() -> tuple[nn.Module, list[torch.Tensor]]:
    return step_worker.adapted_model(step.parse_options(options()))


def needs_compiler(system: peers.System) -> bool:
    """Only quaff_fx needs its compiled form here; the others are the same model with and without Inductor."""
    return system.activation_max is not None


class TestSystems:
    @pytest.mark.filterwarnings("ignore")  # of the peers
    @pytest.mark.parametrize(
        "system",
        [
            pytest.param(system, marks=[pytest.mark.compile, pytest.mark.slow] if needs_compiler(system) else ())
            for system in peers.SYSTEMS
        ],
        ids=lambda system: system.name,
    )
    def test_trains_every_adapter_and_nothing_else(
        self, system: peers.System, adapted: tuple[nn.Module, list[torch.Tensor]]
    ) -> None:
        reason = system.reason_missing()
        if reason is not None:
            pytest.skip(f"{system.name}: {reason}")
        model, batches = adapted
        expected = step_worker.Trainer(model, batches).step()[3]
        model, batches = step_worker.adapted_model(step.parse_options(options()))
        trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        with torch.compiler.set_stance("default" if needs_compiler(system) else "force_eager"):
            trainer = step_worker.Trainer(system.prepare(model), batches)
            for _ in range(2):
                *_, loss = trainer.step()
                # Random weights, hence a loss near that of guessing, whatever the weights' form.
                assert loss == pytest.approx(expected, abs=0.1)
            ids = batches[0]
            trainer.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients = {name for name, parameter in trainer.model.named_parameters() if parameter.grad is not None}
        assert gradients == trainable

    def test_frozen_bytes_are_those_of_the_form(self, adapted: tuple[nn.Module, list[torch.Tensor]]) -> None:
        model, batches = adapted
        weights = sum(layer.base_layer.weight.numel() for layer in peers.adapted_layers(model))
        assert peers.frozen_bytes(model) == 4 * weights
        trainer = step_worker.Trainer(peers.quaff_eager(model), batches)
        trainer.step()
        # int8, and per layer 4 outlier columns with what belongs to them.
        outlier_values = sum(
            4 * (layer.base_layer.out_features + 2) + 1 for layer in peers.adapted_layers(trainer.model)
        )
        indices = 4 * len(peers.adapted_layers(model))
        assert peers.frozen_bytes(model) == weights + 4 * outlier_values + 8 * indices

    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize(
        ("name", "bits"), [("bitsandbytes LLM.int8", 8), ("bitsandbytes NF4", 4), ("torchao NF4", 4)]
    )
    def test_frozen_bytes_look_into_the_peers(
        self, name: str, bits: int, adapted: tuple[nn.Module, list[torch.Tensor]]
    ) -> None:
        model, _ = adapted
        system = next(system for system in peers.SYSTEMS if system.name == name)
        if reason := system.reason_missing():
            pytest.skip(f"{name}: {reason}")
        weights = sum(layer.base_layer.weight.numel() for layer in peers.adapted_layers(model))
        system.prepare(model)
        least = weights * bits / 8
        # Scales on top; the tables of 16 and 256 values weigh in such small layers.
        assert least < peers.frozen_bytes(model) < 1.8 * least

    def test_a_config_without_gradient_says_so(self) -> None:
        pytest.importorskip("torchao")
        reason = peers.reason_no_gradient(peers.int8_dynamic)
        assert reason is None or "no gradient comes through" in reason
        assert peers.reason_no_gradient(peers.int8_weight_only) is None


class TestQuaffLinear:
    CHANNELS = (3, 17)

    def x(self, seed: int) -> torch.Tensor:
        return planted_outliers(20, 64, list(self.CHANNELS), factor=300, seed=seed)

    def linear(self) -> nn.Linear:
        linear = nn.Linear(64, 48)
        linear.weight.data = normal(48, 64, seed=3, std=0.05)
        return linear.requires_grad_(False)

    def test_the_first_forward_is_float_and_chooses_the_planted_channels(self) -> None:
        linear, x = self.linear(), self.x(seed=1)
        quaff = peers.QuaffLinear(linear)
        assert torch.equal(quaff(x), linear(x))
        assert set(self.CHANNELS) <= set(quaff.outlier_channels.tolist())
        assert len(quaff.outlier_channels) == 4
        assert quaff.weight is None

    def test_equals_the_formula_in_float64(self) -> None:
        linear, x = self.linear(), self.x(seed=2)
        quaff = peers.QuaffLinear(linear)
        quaff(self.x(seed=1))
        before = quaff.smoothing_scale.double()
        y = quaff(x) - linear.bias

        channels = quaff.outlier_channels
        w = linear.weight.double()
        target = (x[:, channels].double().abs().amax(0) / w[:, channels].abs().amax(0)).sqrt().clamp(min=1)
        s = 0.1 * before + 0.9 * target
        torch.testing.assert_close(quaff.smoothing_scale.double(), s, rtol=1e-6, atol=0)

        x_hat = x.double()
        x_hat[:, channels] /= s
        x_scale = x_hat.abs().amax(dim=1) / 127
        w_scale = (w.abs().amax() / 127).expand(48)
        x_int8 = (x_hat / x_scale.unsqueeze(1)).round().to(torch.int8)
        expected = quaff_output(
            x_int8, x_scale, x_hat[:, channels] * (s - 1), quaff.w_int8, w_scale, w[:, channels].t()
        )
        # float32 against float64; a value on a rounding edge may fall to either side of it.
        edge = x_scale.max() * w.abs().max() * 1.01
        assert (y.double() - expected).abs().max() <= edge
        bound = quaff_error_bound(x, channels, s, x_scale, quaff.w_int8, w_scale)
        assert ((y.double() - x.double() @ w.t()).abs() <= bound + 1e-5).all()

    def test_grad_input_is_within_rounding_of_float64(self) -> None:
        linear, x = self.linear(), self.x(seed=2).requires_grad_()
        quaff = peers.QuaffLinear(linear)
        quaff(self.x(seed=1))
        grad_output = normal(20, 48, seed=4)
        quaff(x).backward(grad_output)
        w = linear.weight.double()
        w_scale = w.abs().amax() / 127
        g_scale = grad_output.double().abs().amax(dim=1, keepdim=True) / 127
        # Half a scale for each rounded factor, summed over the out-features.
        bound = g_scale / 2 * (w.abs() + w_scale / 2).sum(0) + (
            grad_output.double().abs().sum(1, keepdim=True) * w_scale / 2
        )
        error = (x.grad.double() - grad_output.double() @ w).abs()
        assert (error <= 1.001 * bound).all()

    def test_a_zero_row_stays_zero(self) -> None:
        quaff = peers.QuaffLinear(self.linear())
        quaff(self.x(seed=1))
        x = self.x(seed=2)
        x[5] = 0
        assert torch.equal(quaff(x)[5], quaff.bias)

    @pytest.mark.parametrize("has_fast_int_mm", [True, False])
    def test_the_product_is_exact_on_either_way(self, has_fast_int_mm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(peers, "has_fast_int_mm", lambda: has_fast_int_mm)
        a, b = (torch.randint(-127, 128, size, dtype=torch.int8) for size in ((20, 64), (64, 48)))
        expected = (a.long() @ b.long()).float()
        assert torch.equal(peers.int8_product(a, b), expected)


def record(name: str, milliseconds: list[float], *, is_float32: bool = False) -> step_results.Record:
    started = step_worker.Started(
        1.5, 2**20, 2**21, (step_worker.Linear(8, 4, 16, True), step_worker.Linear(8, 4, 16, False))
    )
    turns = [
        step_worker.Turn((0.6 * ms / 1e3,), (0.3 * ms / 1e3,), (0.1 * ms / 1e3,), 500.0 + ms, 3.25, 0.002)
        for ms in milliseconds
    ]
    return step_results.Record(peers.System(name, peers.eager, is_float32=is_float32), started, turns)


class TestTable:
    RECORDS = (
        record("slow float", [40, 40, 50], is_float32=True),
        record("float", [20, 20, 40], is_float32=True),
        record("ours", [10, 16, 20]),
    )

    def test_ratios_are_per_round_to_the_best_float32(self) -> None:
        *_, row = step_results.table_rows(list(self.RECORDS), tokens=8)
        assert row["step ms"] == pytest.approx(16)
        assert row["fastest ms"] == pytest.approx(10)
        assert row["forward ms"] == pytest.approx(0.6 * 16)
        assert row["tokens/s"] == pytest.approx(500)
        # 20 / 10, 20 / 16, 40 / 20
        assert row["times as fast as best float32"] == pytest.approx(2.0)
        assert (row["lowest"], row["highest"]) == (pytest.approx(1.25), pytest.approx(2.0))
        assert row["peak MiB"] == 520

    def test_printed(self) -> None:
        *_, line = step_results.printed_table(step_results.table_rows(list(self.RECORDS), tokens=8)).splitlines()
        cells = ["ours", "16", "10", "10", "5", "2", "500", "2.00", "(1.25-2.00)", "520", "2", "1.0", "1.5", "3.2500"]
        assert line.split() == cells

    def test_operations_count_backward_only_where_there_is_one(self) -> None:
        assert self.RECORDS[2].gops == pytest.approx(2 * 3 * 16 * 8 * 4 / 16e-3 / 1e9)

    def test_footer_names_what_is_missing(self) -> None:
        text = step_results.footer(list(self.RECORDS), {"other": "not installed"}, {}, step.parse_options([]))
        assert text.endswith("\nNot run: other: not installed")
        assert "Ratios to float: median" in text
        assert "Loss at step 16" in text


class TestModel:
    def test_only_the_first_block_has_linears_without_backward(
        self, adapted: tuple[nn.Module, list[torch.Tensor]]
    ) -> None:
        model, batches = adapted
        linears = step_worker.frozen_linears(model, batches[0])
        assert len(linears) == 2 * 7
        assert [linear.has_backward for linear in linears] == [False] * 3 + [True] * 11
        assert all(linear.tokens == TOKENS for linear in linears)

    def test_is_the_same_every_time(self, adapted: tuple[nn.Module, list[torch.Tensor]]) -> None:
        model, batches = adapted
        again, same = step_worker.adapted_model(step.parse_options(options()))
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
        assert all(torch.equal(a, b) for a, b in zip(batches, same, strict=True))


class TestOptions:
    @pytest.mark.parametrize(
        ("words", "text"),
        [
            (["--rounds", "0"], "argument --rounds: is 0, expected at least 1."),
            (["--systems", "jax"], "argument --systems: jax matches none, expected part of one of"),
            (["--profile", "jax"], "argument --profile: 'jax' is not measured, expected the whole name"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else "",
    )
    def test_a_bad_option_is_named(self, words: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            step.parse_options(words)
        assert text in capsys.readouterr().err


def test_systems_are_chosen_by_words_or_whole_names() -> None:
    def chosen(*words: str) -> list[str]:
        return [system.name for system in step.selected_systems(step.parse_options(["--systems", *words]))]

    float32 = ["float32, eager", "float32, compiled", "float32, compiled whole"]
    assert chosen("float32", "NF4") == [*float32, "bitsandbytes NF4", "torchao NF4"]
    assert chosen("quaff_fx, 8 bits") == ["quaff_fx, 8 bits"]


@pytest.mark.slow
@pytest.mark.compile
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = options("--systems", "float32, eager", "quaff_fx, 8 bits", "int8 dynamic", "--output", str(tmp_path))
    assert step.main([*words, "--rounds", "2", "--steps", "1", "--profile", "float32, eager"]) == 0
    printed = capsys.readouterr().out
    assert "\nquaff_fx, 8 bits" in printed
    assert "GOPS in registers" in printed
    assert "CPU time total" in printed
    with tmp_path.joinpath(f"step-tiny-1x{TOKENS}.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["system"] == "float32, eager"
    assert float(rows[0]["times as fast as best float32"]) == 1.0
