"""What many tests share: tiny models, and one model that is compiled and quantized once per session."""

from __future__ import annotations

import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if (workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))) > 1:
    # Threads of several processes that spin for the same cores take five times as long.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

import pytest
import torch

import quaff_fx
from tests import compatibility
from tests.models import Run, chat_llama, tiny_llama, token_ids, trained_tokenizer


def pytest_addoption(parser):
    parser.addoption(
        "--write-compatibility", action="store_true", help="write docs/compatibility.md from the tests of this run"
    )


def pytest_configure(config):
    if config.getoption("--write-compatibility"):
        if config.getoption("numprocesses", None):
            raise pytest.UsageError("--write-compatibility: is given with -n, expected one process. Leave -n out.")
        config.pluginmanager.register(compatibility.Collector(), "compatibility")


def pytest_terminal_summary(terminalreporter, exitstatus, config):
    collector = config.pluginmanager.get_plugin("compatibility")
    if collector is not None:
        terminalreporter.write_line(compatibility.write(collector, exitstatus))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol():
    """Takes back what a test and its fixtures change in the environment.

    PEFT's BOFT leaves CXX=gcc behind where it finds no CUDA; later tests would compile C++ with it.
    """
    before = dict(os.environ)
    try:
        return (yield)
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def eager():
    """int8 products without Inductor, in the numbers of the compiled ones: what is counted and when is the same."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level tokenizer of 512 tokens, learnt from held-out problems; it pads with its end-of-turn token."""
    from workloads import word_problems  # some seconds, which most tests do without

    return trained_tokenizer([problem.question for problem in word_problems.held_out_problems(200)])


@pytest.fixture(scope="session")
def folder(tmp_path_factory, tokenizer):
    """A tiny random Llama with its tokenizer, as `save_pretrained` writes them."""
    path = tmp_path_factory.mktemp("tiny_llama")
    chat_llama().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def quantized_llama():
    """A tiny Llama with LoRA after two calibration and two quantized steps, with what it did on the way."""
    torch.manual_seed(0)
    model = tiny_llama(blocks=3)
    quaff_fx.compile(model, quaff_fx.QuaffConfig(calibration_steps=2, outlier_budget=0.04, progress=False))
    run = Run(model)
    for _ in range(4):
        run.step(token_ids())
    return run
