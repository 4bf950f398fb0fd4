"""The benchmark of the card, without one: what it starts and ends, how it sorts and judges, and dry runs of it."""

from __future__ import annotations

import json
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import peers
from benchmarks.card import __main__ as command
from benchmarks.card import checks, parts, plan, report, step, systems, targets
from benchmarks.card.children import ROOT, Budget, Job, Pool
from benchmarks.card.parts import Kernel
from benchmarks.card.targets import Results

ANSWERS = """
import json, sys
for number in range(3):
    print(json.dumps({"number": number}), flush=True)
    sys.stdin.readline()
"""


class Recorder:
    """A pool that remembers what it was told."""

    def __init__(self, tmp_path: Path, budget: float = 30) -> None:
        self.answers: list[tuple[str, dict[str, Any]]] = []
        self.ended: dict[str, str | None] = {}
        self.folder = tmp_path
        self.pool = Pool(
            Budget(budget),
            lambda job, answer: self.answers.append((job.name, answer)),
            lambda job: self.ended.update({job.name: job.reason}),
        )

    def job(self, name: str, code: str, gib: float = 0.0) -> Job:
        return Job(name, [sys.executable, "-c", code], self.folder / f"{name}.log", gib)


@pytest.fixture
def recorder(tmp_path: Path) -> Iterator[Recorder]:
    recorder = Recorder(tmp_path)
    yield recorder
    recorder.pool.close()


class TestPool:
    def test_leads_all_jobs_through_each_stage(self, recorder: Recorder) -> None:
        jobs = [recorder.job(name, ANSWERS) for name in "ab"]
        for stage in range(3):
            recorder.pool.advance(jobs, at_once=2, seconds=20)
            assert sorted(recorder.answers[-2:]) == [("a", {"number": stage}), ("b", {"number": stage})]
        assert recorder.ended == {}

    def test_an_answer_with_more_does_not_end_the_stage(self, recorder: Recorder) -> None:
        code = 'print(\'{"row": 1, "more": true}\\n{"row": 2, "more": true}\\n{"end": true}\', flush=True); input()'
        recorder.pool.advance([recorder.job("rows", code)], at_once=1, seconds=20)
        assert [answer for _, answer in recorder.answers] == [{"row": 1}, {"row": 2}, {"end": True}]

    def test_one_that_hangs_is_ended_with_all_it_has_started(self, recorder: Recorder) -> None:
        code = (
            "import subprocess, time, json\n"
            "child = subprocess.Popen(['sleep', '60'])\n"
            "print(json.dumps({'child': child.pid, 'more': True}), flush=True)\n"
            "time.sleep(60)"
        )
        begin = time.monotonic()
        recorder.pool.advance([recorder.job("hangs", code), recorder.job("works", ANSWERS)], at_once=2, seconds=3)
        assert time.monotonic() - begin < 15
        assert recorder.ended == {"hangs": "gave no answer within 3 s"}
        assert ("works", {"number": 0}) in recorder.answers
        child = next(answer["child"] for name, answer in recorder.answers if name == "hangs")
        assert _is_gone(child)

    def test_a_crash_says_how_it_ended(self, recorder: Recorder) -> None:
        crash = recorder.job("crash", "import sys; print('the card fell off', file=sys.stderr); sys.exit(3)")
        killed = recorder.job("killed", "import os; os.kill(os.getpid(), 9)")
        failed = recorder.job("failed", """print('{"failed": "out of memory: 80 GiB"}', flush=True)""")
        recorder.pool.advance([crash, killed, failed], at_once=3, seconds=20)
        assert recorder.ended == {
            "crash": "its process ended with exit code 3: the card fell off",
            "killed": "its process ended with exit code -9",
            "failed": "out of memory: 80 GiB",
        }

    def test_one_that_died_while_it_waited_is_found(self, recorder: Recorder) -> None:
        job = recorder.job("dies", "print('{}', flush=True); raise SystemExit(5)")
        recorder.pool.advance([job], at_once=1, seconds=20)
        assert job.process is not None
        job.process.wait()
        recorder.pool.advance([job], at_once=1, seconds=20)
        assert recorder.ended == {"dies": "its process ended with exit code 5"}

    def test_what_the_budget_leaves_no_time_for_is_named(self, tmp_path: Path) -> None:
        recorder = Recorder(tmp_path, budget=4)
        jobs = [recorder.job("sleeps", "import time; time.sleep(60)"), recorder.job("never", ANSWERS)]
        recorder.pool.advance(jobs, at_once=1, seconds=60, share=0.5)
        assert 2 <= recorder.pool.budget.used() < 4
        assert recorder.ended == {
            "sleeps": "was not ready when 2 s of 4 s were used",
            "never": "was not begun when 2 s of 4 s were used",
        }
        assert jobs[1].process is None

    @pytest.mark.parametrize(
        ("at_once", "gib", "most"), [(3, 0.0, 3), (1, 0.0, 1), (3, 4.0, 2), (3, 100.0, 1)], ids=str
    )
    def test_no_more_at_once_than_there_is_room_for(
        self, recorder: Recorder, at_once: int, gib: float, most: int
    ) -> None:
        code = (
            "import time, json\nprint('{}', flush=True); input(); begin = time.time(); time.sleep(0.5)\n"
            "print(json.dumps({'begin': begin, 'end': time.time()}), flush=True); input()"
        )
        jobs = [recorder.job(name, code, gib) for name in "abc"]
        recorder.pool.advance(jobs, at_once=3, seconds=20)
        recorder.pool.advance(jobs, at_once=at_once, seconds=20, room=10.0)
        spans = [(answer["begin"], answer["end"]) for _, answer in recorder.answers if answer]
        assert len(spans) == 3
        assert max(sum(begin <= other < end for begin, end in spans) for other, _ in spans) <= most

    def test_each_job_is_started_once(self, recorder: Recorder) -> None:
        job = recorder.job("a", ANSWERS)
        events: queue.Queue[Any] = queue.Queue()
        job.go_on(events)
        first = job.process
        job.go_on(events)
        assert job.process is first
        assert [events.get(timeout=20)[1] for _ in range(2)] == [{"number": 0}, {"number": 1}]
        job.end("")


def _is_gone(pid: int) -> bool:
    """Whether a process has ended; nobody may have waited for it, so it may still be a zombie."""
    for _ in range(50):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.1)
    return False


class TestPlan:
    def test_every_name_has_what_it_names(self) -> None:
        assert set(systems.SYSTEMS) == {pair.system for pair in plan.PAIRS}
        assert tuple(checks.CHECKS) == plan.CHECKS
        assert len({pair.name for pair in plan.PAIRS}) == len(plan.PAIRS)
        assert {pair.shape for pair in plan.PAIRS} == set(plan.SHAPES.values())

    def test_both_that_are_compared_compile_with_empty_caches(self) -> None:
        cold = [(pair.shape, pair.system) for pair in plan.PAIRS if pair.is_cold]
        assert cold == [(plan.LLAMA_8B, plan.QUAFF), (plan.LLAMA_8B, plan.BFLOAT16_COMPILED)]

    @pytest.mark.parametrize("shape", plan.SHAPES.values(), ids=lambda shape: shape.name)
    def test_every_shape_is_a_model(self, shape: plan.Shape) -> None:
        model = step.adapted_model(shape, torch.device("meta"))
        layers = peers.adapted_layers(model)
        assert len(layers) == 7 * shape.layers
        assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, shape.dtype)}
        sizes = {tuple(layer.base_layer.weight.shape) for layer in layers}
        assert (shape.intermediate_size, shape.hidden_size) in sizes
        assert (shape.kv_heads * shape.hidden_size // shape.heads, shape.hidden_size) in sizes
        sequences, length = shape.batch
        assert sequences * length == shape.tokens
        assert torch.get_default_dtype() == torch.float32

    def test_a_dry_run_is_tiny_under_the_same_names(self) -> None:
        tiny = plan.selected(["8b"], is_dry=True)
        assert [pair.name for pair in tiny] == [pair.name for pair in plan.PAIRS if pair.shape == plan.LLAMA_8B]
        assert {pair.shape.hidden_size for pair in tiny} == {64}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the peers
@pytest.mark.parametrize("name", systems.SYSTEMS)
def test_every_system_trains_every_adapter(name: str) -> None:
    system = systems.SYSTEMS[name]
    if reason := plan.reason_missing(name) or system.reason_missing():
        pytest.skip(f"{name}: {reason}")
    precision = torch.get_float32_matmul_precision()
    shape = next(pair.shape for pair in plan.PAIRS if pair.system == name).tiny()
    try:
        with torch.compiler.set_stance("force_eager"):
            trainer = step.Trainer(shape, system, torch.device("cpu"))
            before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
            started = trainer.begin()
        after = dict(trainer.model.named_parameters())
        assert before
        assert [name for name, value in before.items() if torch.equal(value, after[name])] == []
        assert started["first_step_s"] > 0
        if system.activation_max:
            assert any(parameter.dtype == torch.int8 for parameter in trainer.model.parameters())
        assert (torch.get_float32_matmul_precision() == "high") == ("TF32" in name)
    finally:
        torch.set_float32_matmul_precision(precision)


class TestParts:
    @pytest.mark.parametrize(
        ("name", "op", "shapes", "part"),
        [
            ("nvjet_tst_256x128_64x4_1x2_h_bz_coopA_NTT", "aten::mm", ((4096, 4096), (4096, 14336)), targets.FROZEN),
            ("nvjet_tst_64x8_64x16_4x2_h_bz_NNT", "aten::mm", ((4096, 4096), (4096, 16)), targets.ADAPTERS),
            ("sm90_xmma_gemm_bf16bf16_bf16f32_tn", "aten::addmm", ((4096, 16), (16, 4096)), targets.ADAPTERS),
            ("_int8_linear_kernel", "", (), targets.FROZEN),
            ("int8_product", "quaff::int8_linear", ((4096, 4096), (4096, 64)), targets.FROZEN),
            ("void cutlass::Kernel2<cutlass_int8>", "aten::_int_mm", ((4096, 64), (64, 64)), targets.FROZEN),
            ("pytorch_flash::flash_bwd_kernel", "aten::_flash_attention_backward", (), targets.ATTENTION),
            ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma", "", (), targets.ATTENTION),
            ("transpose_kernel", "", (), targets.TRANSPOSES),
            ("triton_poi_fused_mul_silu_1", "", (), targets.GATED),
            ("triton_red_fused__to_copy_abs_amax_mul_round_silu_silu_backward_3", "", (), targets.GATED),
            ("triton_red_fused__to_copy_abs_amax_clamp_mul_round_5", "", (), targets.QUANTIZE),
            ("_quantize_rotated_kernel", "", (), targets.QUANTIZE),
            ("triton_poi_fused__to_copy_2", "", (), targets.COPIES),
            ("triton_poi_fused_cat_constant_pad_nd_7", "", (), targets.COPIES),
            ("Memcpy DtoD (Device -> Device)", "aten::copy_", (), targets.COPIES),
            ("triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_0", "", (), targets.REST),
            ("multi_tensor_apply_kernel", "aten::_fused_adamw_", (), targets.REST),
        ],
    )
    def test_by_name(self, name: str, op: str, shapes: tuple[tuple[int, ...], ...], part: str) -> None:
        assert parts.part_of(Kernel(name, op, shapes, 1.0)) == part

    def test_nothing_is_lost(self) -> None:
        kernels = [
            Kernel("flash_fwd", "", (), 0.5),
            Kernel("what is this", "", (), 0.25),
            Kernel("flash_fwd", "", (), 1),
        ]
        by_part = parts.milliseconds_by_part(kernels)
        assert by_part[targets.ATTENTION] == 1.5
        assert sum(by_part.values()) == sum(kernel.ms for kernel in kernels)
        assert parts.longest(kernels, count=1) == [("flash_fwd", targets.ATTENTION, 1.5)]

    def test_a_profile_is_per_step(self) -> None:
        x = torch.randn(512, 512)
        kernels = parts.profiled_kernels(lambda: x @ x, 2, torch.device("cpu"))
        products = [kernel for kernel in kernels if kernel.name == "aten::mm"]
        assert len(products) == 2
        assert products[0].shapes[:2] == ((512, 512), (512, 512))
        assert parts.part_of(products[0]) == targets.FROZEN
        assert all(kernel.ms > 0 for kernel in products)


def results(**figures: float) -> Results:
    """Steps of Llama-8B: `quaff` and `bfloat16` milliseconds, and peaks."""
    machine = {"card": "NVIDIA H100 (sm_90)", "versions": "torch 2.11"}
    steps = {
        plan.Pair(plan.LLAMA_8B, system).name: {
            "shape": plan.LLAMA_8B.name,
            "system": system,
            "wall_ms": figures[word],
            "fastest_ms": figures[word],
            "peak_mib": figures.get(f"{word}_peak", 0.0),
        }
        for word, system in (("quaff", plan.QUAFF), ("bfloat16", plan.BFLOAT16_COMPILED), ("nf4", plan.NF4[1]))
        if word in figures
    }
    return Results(machine=machine, steps=steps)


def target(what: str) -> targets.Target:
    return next(target for target in targets.TARGETS if what in target.what)


class TestTargets:
    @pytest.mark.parametrize(
        ("quaff", "verdict"), [(20.0, "aim reached"), (22.0, "held"), (24.0, "missed"), (None, "not measured")]
    )
    def test_a_speed(self, quaff: float | None, verdict: str) -> None:
        found = results(bfloat16=30.0) if quaff is None else results(bfloat16=30.0, quaff=quaff)
        assert target("4096 tokens, wall time").verdict(found) == verdict

    @pytest.mark.parametrize(
        ("peak", "verdict"), [(600, "aim reached"), (700, "held"), (701, "missed"), (0, "not measured")]
    )
    def test_a_share_is_at_most(self, peak: float, verdict: str) -> None:
        found = results(bfloat16=30, bfloat16_peak=1000, quaff=20, quaff_peak=peak)
        assert target("peak memory").verdict(found) == verdict

    def test_a_peer_is_its_fastest_form(self) -> None:
        found = results(nf4=40.0, quaff=20.0)
        eager = plan.Pair(plan.LLAMA_8B, plan.NF4[0]).name
        assert target("NF4").ratio(found) == 2.0
        found.steps[eager] = {"wall_ms": 36.0}
        assert target("NF4").ratio(found) == 1.8

    def test_every_check_must_pass_but_one_that_cannot_be_made(self) -> None:
        found = Results(checks={"a": {"status": "passed"}, "b": {"status": "skipped"}})
        assert target("checks").verdict(found) == "held"
        found.checks["c"] = {"status": "failed"}
        assert target("checks").verdict(found) == "missed"

    def test_every_target_is_of_pairs_that_are_run(self) -> None:
        every = Results(
            checks={"a": {"status": "passed"}},
            steps={
                pair.name: {"wall_ms": 1.0, "gpu_ms": 1.0, "peak_mib": 1.0} | ({"cold_s": 1.0} if pair.is_cold else {})
                for pair in plan.PAIRS
            },
        )
        assert [each.ratio(every) for each in targets.TARGETS] == [1.0] * len(targets.TARGETS)


class TestReport:
    def test_is_written_whole_and_names_the_card(self, tmp_path: Path) -> None:
        found = results(quaff=20.0, bfloat16=30.0)
        found.missing["bitsandbytes NF4"] = "not installed | here"
        found.products = [
            {
                "size": "4096 × 4096",
                "tokens": 32,
                "what": "forward, bfloat16",
                "unit": "TOPS",
                "how": "",
                "ms": 2.0,
                "rate": 5,
            },
            {
                "size": "4096 × 4096",
                "tokens": 32,
                "what": "forward, quaff",
                "unit": "TOPS",
                "how": "",
                "ms": 1.0,
                "rate": 9,
            },
            {"size": "4096 × 4096", "tokens": 32, "what": "backward, quaff", "unit": "TOPS", "how": "", "reason": "no"},
        ]
        report.write(found, tmp_path)
        text = (tmp_path / "cuda.md").read_text()
        assert text.startswith("# On NVIDIA H100 (sm_90)")
        assert "not installed / here" in text
        document = json.loads((tmp_path / "cuda.json").read_text())
        assert document["targets"][1]["reached"] == "1.50"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["cuda.json", "cuda.md"]
        assert [row["over bfloat16"] for row in report.product_rows(found)] == ["1.00", "2.00", ""]

    def test_steps_are_beside_the_best_float(self) -> None:
        rows = report.step_rows(results(quaff=20.0, bfloat16=30.0, nf4=60.0))
        assert {row["system"]: row["over best float"] for row in rows} == {
            plan.QUAFF: "1.50",
            plan.BFLOAT16_COMPILED: "1.00",
            plan.NF4[1]: "0.50",
        }

    def test_parts_add_up(self) -> None:
        found = results(quaff=20.0)
        assert report.part_rows(found) == []
        next(iter(found.steps.values()))["parts"] = dict.fromkeys(targets.BUDGET_MS, 2.0)
        *rows, total = report.part_rows(found)
        assert [row["part, ms"] for row in rows] == list(targets.BUDGET_MS)
        assert total[plan.QUAFF] == f"{2.0 * len(rows):.2f}"


class TestChecks:
    def test_what_is_wrong_is_a_failure_and_not_the_end(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def wrong(device: torch.device) -> str:
            raise AssertionError("rows are permuted")

        def missing(device: torch.device) -> str:
            raise checks.MissingError("no accelerate")

        monkeypatch.setattr(checks, "CHECKS", {"wrong": wrong, "missing": missing})
        found = [checks.result_of(name, torch.device("cpu")) for name in checks.CHECKS]
        assert [result["status"] for result in found] == ["failed", "skipped"]
        assert found[0]["detail"] == "AssertionError: rows are permuted"

    @pytest.mark.parametrize("name", ["int8 product", "int8 product with epilogue", "row quantizer"])
    def test_a_kernel_that_is_wrong_fails(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        from benchmarks.card import exactness

        product, quantize = exactness._int8_linear, exactness._quantize

        def shifted(a: torch.Tensor, w: torch.Tensor, *rest: Any, **given: Any) -> torch.Tensor:
            result = product(a, w, *rest, **given)
            result[..., 0] += 1
            return result

        def scaled(x: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, ...]:
            x_int8, x_scale, x_outlier = quantize(x, *rest)
            return x_int8, x_scale * 1.01, x_outlier

        monkeypatch.setattr(exactness, "_int8_linear", shifted)
        monkeypatch.setattr(exactness, "_quantize", scaled)
        monkeypatch.setattr(exactness, "SHAPES", exactness.SHAPES[:3])
        assert checks.result_of(name, torch.device("cpu"))["status"] == "failed"

    def test_a_wrong_gradient_fails(self, monkeypatch: pytest.MonkeyPatch) -> None:
        gradients = iter([torch.tensor([1.0, 1.0]), torch.tensor([1.0, -1.0])])
        monkeypatch.setattr(checks, "gradient", lambda model, autocast=None: next(gradients))
        monkeypatch.setattr(checks, "llama", lambda *_, **__: nn.Identity())
        monkeypatch.setattr(checks, "quantized", lambda model, *_, **__: model)
        result = checks.result_of("float32", torch.device("cpu"))
        assert result["status"] == "failed"
        assert "gradient with float32 0.0000, expected at least" in result["detail"]


def run(tmp_path: Path, *words: str) -> tuple[int, dict[str, Any]]:
    code = command.main(["--dry-run", "--output", str(tmp_path), "--rounds", "2", "--budget", "300", *words])
    return code, json.loads((tmp_path / "cuda.json").read_text())


class TestCommand:
    @pytest.mark.slow
    def test_dry_run_of_steps_and_products(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        _, document = run(tmp_path, "--parts", "steps", "products", "--shapes", "8b")
        there = [pair for pair in plan.selected(["8b"], is_dry=True) if pair.name not in document["missing"]]
        assert {pair.system for pair in there} >= {plan.QUAFF, plan.BFLOAT16_COMPILED, plan.BFLOAT16_EAGER}
        assert set(document["steps"]) == {pair.name for pair in there}
        for name, found in document["steps"].items():
            assert found["wall_ms"] > 0, name
            assert found["gpu_ms"] > 0, name
        with_parts = {name for name, found in document["steps"].items() if "parts" in found}
        assert with_parts == {pair.name for pair in there if pair.has_profile}
        assert len(document["products"]) == 7
        assert all("ms" in row for row in document["products"])
        for reason in document["missing"].values():
            assert "not installed" in reason
        assert "A dry run" in capsys.readouterr().out

    @pytest.mark.slow
    def test_dry_run_of_checks(self, tmp_path: Path) -> None:
        code, document = run(tmp_path, "--parts", "checks")
        assert {name: found for name, found in document["checks"].items() if found["status"] == "failed"} == {}
        assert set(document["checks"]) == set(plan.CHECKS)
        assert code == 0

    @pytest.mark.slow
    def test_an_interrupt_leaves_the_report_and_no_process(self, tmp_path: Path) -> None:
        words = ["--dry-run", "--parts", "products", "checks", "--checks", "kernels", "--output", str(tmp_path)]
        command = [sys.executable, "-m", "benchmarks.card", *words]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if "forward, bfloat16" in line:
                    break
            workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            process.send_signal(signal.SIGTERM)
            out, _ = process.communicate(timeout=30)
        assert process.returncode == 130
        assert "it must show" in out
        assert json.loads((tmp_path / "cuda.json").read_text())["products"]
        assert workers
        assert all(_is_gone(int(pid)) for pid in workers)

    @pytest.mark.parametrize("words", [["--budget", "0"], ["--parts", "everything"], ["--cores", "-1"]])
    def test_options_that_mean_nothing(self, words: list[str]) -> None:
        with pytest.raises(SystemExit):
            command.parse_options(words)
