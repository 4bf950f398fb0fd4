"""The order of imports, the few files that may touch torch's private modules, and where the tests of each are."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "quaff_fx"

ORDER = (
    "errors",
    "config",
    "numerics",
    "inductor",
    "kernels",
    "kernels.reference",
    "kernels.cpu.build",
    "kernels.cpu.product",
    "kernels.cpu",
    "kernels.cuda.tiles",
    "kernels.cuda.hadamard",
    "kernels.cuda.transpose",
    "kernels.cuda.rows",
    "kernels.cuda.product",
    "kernels.cuda.int_mm",
    "kernels.cuda",
    "kernels.dispatch",
    "ops",
    "decompositions",
    "distributed",
    "weights.layout",
    "weights.logits",
    "weights.int8_weight",
    "weights.state",
    "weights.quantized",
    "weights.loaded",
    "weights.float",
    "weights.owners",
    "weights",
    "hosts.peft",
    "hosts.transformers",
    "hosts.torch",
    "hosts",
    "sites",
    "passes.infrastructure",
    "passes.matching",
    "passes.readable",
    "passes.normalize",
    "passes.quantize",
    "passes.lowered",
    "passes.fold",
    "passes.factors",
    "passes.join",
    "passes.launch",
    "passes.spec",
    "passes.pipeline",
    "passes",
    "backend",
    "observe",
    "convert",
    "calls",
    "forwards",
    "notices",
    "heads",
    "stages",
    "api",
    "files",
    "files.stored_tensor",
    "files.checkpoint",
    "files.loading",
    "files.merging",
    "files.saved_state",
    "files.snapshot",
    "trainer",
    "reports",
    "reports.explain",
    "reports.graphs",
)
"""A file may import only what stands above it; the same list is in docs/architecture.md."""

MAY_USE_PRIVATE_TORCH = {
    "kernels.cpu.build": {"torch._inductor"},
    "decompositions": {"torch._inductor"},
    "backend": {"torch._dynamo", "torch._functorch", "torch._guards", "torch._inductor"},
    "calls": {"torch._dynamo"},
    "forwards": {"torch._C"},
    "hosts.torch": {"torch._dynamo"},
    "inductor": {"torch._inductor"},
    "observe": {"torch._C"},
    "weights.int8_weight": {"torch._C", "torch.utils._pytree"},
    "weights.logits": {"torch._C"},
    "passes.launch": {"torch.utils._pytree"},
    "passes.lowered": {"torch._guards"},
    "passes.matching": {"torch._ops"},
}
"""The private modules that a file may touch; each is named in docs/architecture.md."""


def sources() -> dict[str, Path]:
    """Every file of the package by its module's name below the package; the package itself is the empty name."""
    found = {}
    for folder, prefix in ((ROOT / PACKAGE, ""), (ROOT / "passes", "passes")):
        for path in folder.rglob("*.py"):
            parts = [prefix, *path.relative_to(folder).with_suffix("").parts]
            found[".".join(part for part in parts if part and part != "__init__")] = path
    return found


SOURCES = sources()


def imports(name: str) -> Iterator[tuple[str, int]]:
    """Yields the modules of the package that a file imports, anywhere in it, with the line."""
    for node in ast.walk(ast.parse(SOURCES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{SOURCES[name]}:{node.lineno}: relative import"
            submodules = [f"{node.module}.{alias.name}" for alias in node.names]
            known = [s for s in submodules if s.removeprefix(f"{PACKAGE}.") in SOURCES]
            # `from quaff_fx import ops` imports ops, `from quaff_fx.passes import Pass` the package passes.
            targets = [*known, *([str(node.module)] if len(known) < len(submodules) else [])]
        else:
            continue
        for target in targets:
            if target == PACKAGE or target.startswith(f"{PACKAGE}."):
                yield target.removeprefix(PACKAGE).removeprefix("."), node.lineno


def private_torch(name: str) -> Iterator[tuple[str, int]]:
    """Yields the private modules of torch that a file imports or reaches by attributes, with the line."""
    for node in ast.walk(ast.parse(SOURCES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            paths = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            paths = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            paths = [ast.unparse(node)]
        else:
            continue
        for path in paths:
            private = re.match(r"torch(\.[a-z]\w*)*\._\w+", path)
            if private is not None and is_module(private[0]):
                yield private[0], node.lineno


def is_module(path: str) -> bool:
    """Is this dotted path of torch a module, and not a function or an attribute of one?"""
    value: object = torch
    for part in path.split(".")[1:]:
        value = getattr(value, part, None)
    if value is None:
        try:
            importlib.import_module(path)
        except ImportError:
            return False
        return True
    return isinstance(value, ModuleType)


def is_all_imports(name: str) -> bool:
    """Is a file nothing but its docstring, imports and the list of what it passes on?"""
    return all(
        isinstance(node, (ast.Import, ast.ImportFrom))
        or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
        or (isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__")
        for node in ast.parse(SOURCES[name].read_text(encoding="utf-8")).body
    )


def path_of_tests(name: str) -> Path:
    """Where the tests of a file are: ``weights.layout`` in tests/weights/test_layout.py."""
    *rooms, file = name.split(".")
    return ROOT.joinpath("tests", *rooms, f"test_{file}.py")


def test_every_file_has_its_place_in_the_order() -> None:
    assert sorted(set(SOURCES) - {""}) == sorted(ORDER)
    assert len(set(ORDER)) == len(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_every_file_has_its_tests_at_the_same_place(name: str) -> None:
    """But for the `__init__` of a room, which may hold imports alone."""
    if SOURCES[name].name == "__init__.py":
        assert is_all_imports(name)
    else:
        assert "def test_" in path_of_tests(name).read_text(encoding="utf-8")


def test_every_folder_of_tests_is_a_package() -> None:
    """Or two test files of one name in two rooms could not both be imported."""
    folders = {path.parent for path in (ROOT / "tests").rglob("test_*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []


@pytest.mark.parametrize("name", ORDER)
def test_a_file_imports_only_what_stands_above_it(name: str) -> None:
    above = ORDER[: ORDER.index(name)]
    wrong = [f"{SOURCES[name].relative_to(ROOT)}:{line} imports {target}" for target, line in imports(name)]
    assert [text for text in wrong if text.rsplit(" ", 1)[1] not in above] == []


def test_the_maths_knows_no_module_config_or_graph() -> None:
    maths = {"numerics", *(name for name in SOURCES if name.split(".")[0] == "kernels")}
    for name in maths:
        assert {target for target, _ in imports(name)} <= {"errors", *maths}, name
        assert not re.search(r"\bnn\.Module\b|\btorch\.fx\b", SOURCES[name].read_text(encoding="utf-8")), name


def test_only_dispatch_asks_for_the_kind_of_a_device() -> None:
    """The kernels of a device check that their own operands are on it; the rest asks `kernels.dispatch`."""
    kinds = re.compile(r"device\.type\s*(==|!=|in\b|not in\b)|\.is_(cpu|cuda|xpu|mps)\b")
    asking = {name for name, path in SOURCES.items() if kinds.search(path.read_text(encoding="utf-8"))}
    assert asking - {"kernels.cpu.product"} == {"kernels.dispatch"}


def test_no_pass_indexes_operands_by_number() -> None:
    """They have names (`matching.operands`); only `matching` looks into calls of plain functions."""
    for name in SOURCES:
        if not name.startswith("passes") or name == "passes.matching":
            continue
        for node in ast.walk(ast.parse(SOURCES[name].read_text(encoding="utf-8"))):
            is_indexed = isinstance(node, ast.Subscript) and isinstance(node.value, ast.Attribute)
            assert not (is_indexed and node.value.attr == "args"), f"{name}:{node.lineno}"
            is_unpacked = isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple)
            value = node.value if isinstance(node, ast.Assign) else None
            assert not (is_unpacked and isinstance(value, ast.Attribute) and value.attr == "args"), (
                f"{name}:{node.lineno}"
            )


def test_only_the_files_room_knows_the_disk() -> None:
    """Beside it only what puts its files into the checkpoints of a Trainer."""
    reading = {
        name
        for name, path in SOURCES.items()
        if re.search(r"^\s*(from|import) safetensors", path.read_text("utf-8"), re.M)
    }
    assert {name for name in reading if not name.startswith("files.")} == set()
    using = {name for name in SOURCES if any(target.startswith("files.") for target, _ in imports(name))}
    assert {name for name in using if name and not name.startswith("files.")} == {"trainer"}


@pytest.mark.parametrize(("folder", "other"), [("benchmarks", "examples"), ("examples", "benchmarks")])
def test_benchmarks_and_examples_import_nothing_of_each_other(folder: str, other: str) -> None:
    """What both need is in workloads/."""
    others = {other, *(path.stem for path in (ROOT / other).glob("*.py"))} - {"__init__"}
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            assert {name.split(".")[0] for name in names} & others == set(), f"{path}:{node.lineno}"


def test_private_modules_of_torch_are_used_only_where_it_is_allowed() -> None:
    found = {
        f"{SOURCES[name].relative_to(ROOT)}:{line} uses {module}"
        for name in SOURCES
        for module, line in private_torch(name)
        if not any((module + ".").startswith(allowed + ".") for allowed in MAY_USE_PRIVATE_TORCH.get(name, ()))
    }
    assert found == set()


def test_no_permission_is_left_over() -> None:
    for name, allowed in MAY_USE_PRIVATE_TORCH.items():
        used = {module for module, _ in private_torch(name)}
        assert {a for a in allowed if not any((u + ".").startswith(a + ".") for u in used)} == set(), name


def test_the_documented_order_is_this_one() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    section = re.search(r"^#+ Order of imports\s*$.*?^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert section is not None, "docs/architecture.md: has no section 'Order of imports' with a fenced list"
    documented = [line.split()[0].removesuffix(".py").replace("/", ".") for line in section[1].splitlines() if line]
    assert tuple(documented) == ORDER


def test_the_documentation_names_the_files_that_touch_private_modules() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    paragraph = re.search(r"^Torch's private modules.*?\n\n", text, re.MULTILINE | re.DOTALL)
    assert paragraph is not None, 'docs/architecture.md: has no paragraph that starts with "Torch\'s private modules"'
    documented = {name.removesuffix(".py").replace("/", ".") for name in re.findall(r"`([\w/]+\.py)`", paragraph[0])}
    assert documented == set(MAY_USE_PRIVATE_TORCH)
