"""`quaff_fx.compile` end to end on tiny models."""

from __future__ import annotations

import copy
import gc
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

import quaff_fx
from quaff_fx.api import stages_of
from quaff_fx.weights import QuantizedWeight, owners
from tests.models import Run, cosine, float_llama, int8_products, tiny_llama, token_ids, with_lora

pytestmark = pytest.mark.compile

QUIET = {"progress": False, "calibration_steps": 1}


def quantized_weights(model: nn.Module) -> list[QuantizedWeight]:
    return [module for module in model.modules() if isinstance(module, QuantizedWeight)]


class TestRewriting:
    def test_every_linear_of_the_blocks_is_int8(self, quantized_llama):
        explanation = quaff_fx.explain(quantized_llama.model)
        assert sum(row.stage == "int8" for row in explanation.rows) == 3 * 7
        assert len(quantized_weights(quantized_llama.model)) == 3 * 7

    def test_forward_and_backward_hold_exactly_the_expected_int8_products(self, quantized_llama):
        first, later = [graph.lowered for graph in quaff_fx.graphs(quantized_llama.model)][:2]
        # The first block's input needs no gradient: q, k and v have none to give back.
        assert int8_products(first) == [7, 4]
        assert int8_products(later) == [7, 7]

    def test_no_float_product_of_a_frozen_weight_is_left(self, quantized_llama):
        graph = quaff_fx.graphs(quantized_llama.model)[-1]
        assert "dequantize_weight" not in graph.rewritten
        assert graph.rewritten.count("torch.ops.quaff.linear.default(") == 7
        # q, k, v share one quantized activation, gate and up another; o and down have their own.
        assert graph.rewritten.count("torch.ops.quaff.quantize_activation.default(") == 4

    def test_two_training_graphs_however_many_blocks(self, quantized_llama):
        counts = []
        for blocks in (2, 12):
            model = quaff_fx.compile(tiny_llama(blocks), QUIET)
            run = Run(model)
            for _ in range(3):
                run.step(token_ids())
            counts.append(len(quaff_fx.graphs(model)))
        assert counts == [2, 2]

    def test_no_recompile_after_the_first_quantized_step(self, quantized_llama):
        before = len(quaff_fx.graphs(quantized_llama.model))
        with torch._dynamo.config.patch(error_on_recompile=True):
            for seed in range(3):
                quantized_llama.step(token_ids(seed=seed))
        assert len(quaff_fx.graphs(quantized_llama.model)) == before

    def test_float_weights_are_freed(self):
        model = tiny_llama(2)
        frozen = {
            name: p.numel() * 4 for name, p in model.named_parameters() if ".layers." in name and "base_layer" in name
        }
        shapes = {tuple(p.shape) for name, p in model.named_parameters() if name in frozen}
        quaff_fx.compile(model, QUIET | {"outlier_budget": 0.02})
        run = Run(model)
        run.step(token_ids())
        run.gradients.clear()
        run.step(token_ids())
        gc.collect()
        live = [t for t in gc.get_objects() if type(t) is nn.Parameter and t.is_floating_point()]
        base = {id(p) for p in model.parameters()}
        assert not [t for t in live if id(t) in base and tuple(t.shape) in shapes and not t.requires_grad]
        assert sum(weight.w_int8.numel() for weight in quantized_weights(model)) * 4 == sum(frozen.values())

    def test_weight_bytes_are_at_most_0_3_of_float32(self):
        model = quaff_fx.compile(tiny_llama(1, hidden_size=256, intermediate_size=512), QUIET)
        quaff_fx.calibrate(model, [{"input_ids": token_ids()}])
        explanation = quaff_fx.explain(model)
        assert explanation.bytes_before == 4 * sum(w.w_int8.numel() for w in quantized_weights(model))
        assert explanation.bytes_after / explanation.bytes_before <= 0.30


class TestNumbers:
    def test_calibration_steps_are_float_steps(self, quantized_llama):
        reference = Run(tiny_llama(3))
        reference.step(token_ids())
        assert quantized_llama.losses[:2] == [reference.losses[0]] * 2
        for step in quantized_llama.gradients[:2]:
            assert all(torch.equal(gradient, step[name]) for name, gradient in reference.gradients[0].items())

    @pytest.mark.parametrize(("bits", "least"), [(8, 0.999), (7, 0.997)])
    def test_gradients_follow_float(self, bits, least):
        reference = Run(tiny_llama(2))
        reference.step(token_ids())
        run = Run(quaff_fx.compile(tiny_llama(2), QUIET | {"activation_bits": bits}))
        run.step(token_ids())
        run.step(token_ids())
        assert cosine(run.gradients[1], reference.gradients[0]) > least
        for name, gradient in reference.gradients[0].items():
            assert gradient.abs().max() > 0
            assert run.gradients[1][name].abs().max() > 0, name

    @pytest.mark.parametrize("smoothing", ["split", "momentum"])
    def test_eager_and_compiled_agree(self, smoothing):
        model = quaff_fx.compile(tiny_llama(2), QUIET | {"smoothing": smoothing, "outlier_budget": 0.05})
        run = Run(model)
        run.step(token_ids())
        compiled = run.step(token_ids())
        in_float = copy.deepcopy(model)
        quaff_fx.dequantize(in_float)
        for block in stages_of(model).blocks:
            block.__dict__[owners.RUN] = lambda block, args, kwargs: block.quaff_forward(*args, **kwargs)
        eager = run.step(token_ids())
        # The same integers, up to a rounding tie decided by the order of float operations.
        assert eager == pytest.approx(compiled, rel=1e-4)
        assert cosine(run.gradients[1], run.gradients[2]) > 0.9999
        # The markers alone: weights dequantized, activations in float.
        markers_only = Run(in_float).step(token_ids())
        assert markers_only == pytest.approx(compiled, rel=2e-3)
        assert markers_only != compiled

    def test_planted_outliers_do_not_hurt(self):
        def planted() -> nn.Module:
            model = float_llama(2)
            for layer in model.model.layers:
                with torch.no_grad():
                    layer.input_layernorm.weight[:2] *= 300
                    layer.post_attention_layernorm.weight[:2] *= 300
                    for linear in (*list(layer.self_attn.children())[:3], layer.mlp.gate_proj, layer.mlp.up_proj):
                        linear.weight[:, :2] /= 300
            return with_lora(model, target_modules=["o_proj", "down_proj"]).train()

        reference = Run(planted())
        reference.step(token_ids())
        similarity = {}
        for name, budget in (("plain int8", 0.0), ("outlier channels", 0.05)):
            # Without the rotation, which mixes these columns' weights, 300 times smaller than the others, with them.
            run = Run(quaff_fx.compile(planted(), QUIET | {"outlier_budget": budget, "rotation": 1}))
            run.step(token_ids())
            run.step(token_ids())
            similarity[name] = cosine(run.gradients[1], reference.gradients[0])
        assert similarity["plain int8"] < 0.98 < 0.99 < similarity["outlier channels"]


class TestSteps:
    def test_smoothing_scale_follows_the_activations_between_steps_only(self):
        config = QUIET | {"smoothing": "momentum", "outlier_budget": 0.05, "momentum": 0.5}
        model = quaff_fx.compile(tiny_llama(2), config)
        run = Run(model)
        run.step(token_ids(seed=1))
        run.step(token_ids(seed=2))
        outliers = quantized_weights(model)[0].outliers
        read, written = outliers.smoothing_scale.clone(), outliers.next_smoothing_scale.clone()
        assert not torch.equal(read, written)
        model.eval()
        with torch.no_grad():
            model(input_ids=token_ids(seed=3))
        assert torch.equal(outliers.smoothing_scale, read)
        assert torch.equal(outliers.next_smoothing_scale, written)
        model.train()
        run.step(token_ids(seed=2))
        assert torch.equal(outliers.smoothing_scale, written)

    @pytest.mark.compatibility("Running modes", "gradient checkpointing of transformers, both kinds")
    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_checkpointing_changes_neither_loss_nor_scale(self, use_reentrant):
        config = QUIET | {"smoothing": "momentum", "outlier_budget": 0.05}
        runs, scales = [], []
        for checkpointing in (False, True):
            model = tiny_llama(2)
            if checkpointing:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
                model.enable_input_require_grads()
            run = Run(quaff_fx.compile(model, config))
            for seed in (1, 2, 3):
                run.step(token_ids(seed=seed))
            runs.append(run)
            scales.append(torch.cat([weight.outliers.next_smoothing_scale for weight in quantized_weights(model)]))
        assert quaff_fx.explain(runs[1].model).int8_share == quaff_fx.explain(runs[0].model).int8_share > 0.8
        assert runs[0].losses == pytest.approx(runs[1].losses, rel=1e-5)
        assert cosine(runs[0].gradients[-1], runs[1].gradients[-1]) > 0.9999
        assert torch.allclose(scales[0], scales[1], rtol=1e-4)

    def test_calibrate_before_training(self):
        model = quaff_fx.compile(tiny_llama(2), {"progress": False})
        quaff_fx.calibrate(model, [{"input_ids": token_ids(seed=seed)} for seed in range(3)])
        assert model.training
        explanation = quaff_fx.explain(model)
        assert (explanation.stage, explanation.steps) == ("quantize", 3)
        assert Run(model).step(token_ids()) > 0

    def test_evaluation_and_generation(self, quantized_llama):
        model = quantized_llama.model.eval()
        try:
            with torch.no_grad():
                loss = model(input_ids=token_ids(), labels=token_ids()).loss
                graphs = len(quaff_fx.graphs(model))
                generated = model.generate(
                    input_ids=token_ids(tokens=6), attention_mask=torch.ones(2, 6), max_new_tokens=5, do_sample=False
                )
                reference = tiny_llama(3).eval()
                expected = reference(input_ids=token_ids(), labels=token_ids()).loss
            assert generated.shape == (2, 11)
            assert len(quaff_fx.graphs(model)) == graphs
            assert loss.item() == pytest.approx(expected.item(), rel=1e-3)
        finally:
            model.train()

    @pytest.mark.compatibility("Running modes", "sequence lengths vary (four graphs at most)")
    def test_sequence_lengths_are_dynamic_after_the_second(self):
        model = quaff_fx.compile(tiny_llama(2), QUIET)
        run = Run(model)
        for tokens in (24, 24, 20, 28, 17, 30):
            run.step(token_ids(tokens=tokens))
        assert len(quaff_fx.graphs(model)) == 4  # first block and the others, static and dynamic

    def test_a_root_that_keeps_its_own_cache_setting_gets_it_back(self):
        model = quaff_fx.compile(tiny_llama(2), QUIET)
        Run(model).step(token_ids())
        assert model.config.use_cache is True


class TestCopies:
    @pytest.mark.compatibility("Running modes", "deepcopy and pickle of int8 weights")
    def test_deepcopy_and_pickle_go_on_quantized(self, quantized_llama):
        expected = quantized_llama.step(token_ids())
        for copied in (copy.deepcopy(quantized_llama.model), pickle.loads(pickle.dumps(quantized_llama.model))):
            assert len(quantized_weights(copied)) == 21
            assert stages_of(copied).model is copied
            assert Run(copied).step(token_ids()) == pytest.approx(expected, rel=1e-6)
            assert len(quaff_fx.graphs(copied)) == 2

    def test_state_dict_round_trip_is_bit_for_bit(self, quantized_llama):
        saved = {name: tensor.clone() for name, tensor in quantized_llama.model.state_dict().items()}
        other = copy.deepcopy(quantized_llama.model)
        for parameter in other.parameters():
            parameter.data.zero_()
        other.load_state_dict(saved)
        assert all(torch.equal(tensor, saved[name]) for name, tensor in other.state_dict().items())

    def test_class_signature_and_trainable_state_stay(self, quantized_llama):
        plain = tiny_llama(3)
        model = quantized_llama.model
        assert type(model) is type(plain)
        assert model.forward.__func__ is plain.forward.__func__
        trainable = {name: p.shape for name, p in plain.named_parameters() if p.requires_grad}
        assert {name: p.shape for name, p in model.named_parameters() if p.requires_grad} == trainable
        assert not any("_orig_mod" in name for name, _ in model.named_modules())

    def test_dequantize_gives_plain_linears_back(self):
        model = quaff_fx.compile(tiny_llama(2), QUIET)
        run = Run(model)
        run.step(token_ids())
        quantized = run.step(token_ids())
        quaff_fx.dequantize(model)
        assert type(model.base_model.model.model.layers[0].mlp.up_proj.base_layer) is nn.Linear
        assert run.step(token_ids()) == pytest.approx(quantized, rel=2e-3)
        model.merge_and_unload()

    def test_merging_into_int8_refuses_instead_of_losing_the_adapter(self, quantized_llama):
        with pytest.raises(quaff_fx.QuaffError, match="is int8 and rebuilt at each read"):
            quantized_llama.model.merge_adapter()


@pytest.mark.slow
def test_compile_caches_are_hit_in_a_second_process(tmp_path):
    program = """
        import torch, quaff_fx
        from torch._dynamo.utils import counters
        from tests.models import Run, tiny_llama, token_ids
        run = Run(quaff_fx.compile(tiny_llama(2), {"calibration_steps": 1, "progress": False}))
        run.step(token_ids()); run.step(token_ids())
        inductor, aot = counters["inductor"], counters["aot_autograd"]
        print(aot["autograd_cache_hit"], aot["autograd_cache_miss"], aot["autograd_cache_bypass"],
              inductor["fxgraph_cache_bypass"], run.losses[-1])
    """
    environment = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    outputs = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program)],
            capture_output=True,
            text=True,
            env=environment,
            check=True,
        )
        outputs.append(done.stdout.split())
    first, second = outputs
    assert first[:4] == ["0", "2", "0", "0"]
    assert second[:4] == ["2", "0", "0", "0"]
    assert first[4] == second[4]
