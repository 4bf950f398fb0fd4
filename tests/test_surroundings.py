"""What a process finds around it: locale, compiler, cache folder, home, and how the package finds its own parts."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

TRAIN = """
import warnings
import torch
from torch import nn
import quaff_fx

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)
        self.requires_grad_(False).scale = nn.Parameter(torch.ones(64))
    def forward(self, x):
        return x + self.down(self.up(x).relu()) * self.scale

torch.manual_seed(0)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    model = quaff_fx.compile(nn.Sequential(Block(), Block()), {"calibration_steps": 1, "progress": False})
    for _ in range(3):
        loss = model(torch.randn(4, 8, 64)).square().mean()
        loss.backward()
print("loss", loss.item(), "gradient", model[0].scale.grad.norm().item())
print("int8", all(row.stage == "int8" for row in quaff_fx.explain(model).rows))
for warning in caught:
    if issubclass(warning.category, quaff_fx.QuaffWarning):
        print("warning", warning.message)
"""
"""Two blocks of two linears, one calibration step, two int8 steps; prints what they gave and every QuaffWarning."""

WAY_OUT = (
    "expected code compiled for this machine. The model runs without it: right, in int8, but slower than in float32."
)


def python(code: str, environment: dict[str, str | None], cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs code with an environment changed: None takes a variable away."""
    changed = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    kept = {name: value for name, value in os.environ.items() if name not in changed}
    whole = kept | {name: value for name, value in changed.items() if value is not None}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=whole, cwd=cwd, capture_output=True, text=True, timeout=600, check=False)


def trained(environment: dict[str, str | None], before: str = "") -> tuple[float, float, list[str]]:
    """Trains in a process of its own; returns loss, norm of a gradient, and the warnings."""
    ran = python(before + TRAIN, environment)
    assert ran.returncode == 0, ran.stderr[-3000:]
    lines = ran.stdout.splitlines()
    assert "int8 True" in lines
    words = next(line.split() for line in lines if line.startswith("loss "))
    return float(words[1]), float(words[3]), [line.removeprefix("warning ") for line in lines if "warning " in line]


@pytest.fixture(scope="module")
def as_usual(tmp_path_factory: pytest.TempPathFactory) -> tuple[float, float]:
    loss, gradient, warned = trained({"TORCHINDUCTOR_CACHE_DIR": str(tmp_path_factory.mktemp("cache"))})
    assert warned == [], "\n".join(warned)
    return loss, gradient


def assert_slow_path(result: tuple[float, float, list[str]], as_usual: tuple[float, float], *texts: str) -> None:
    """The same numbers but for the order of sums, and one warning that says why and what to do."""
    loss, gradient, warned = result
    assert (loss, gradient) == pytest.approx(as_usual, rel=1e-3)
    assert len(warned) == 1
    assert warned[0].startswith("compilation: ")
    for text in (WAY_OUT, *texts):
        assert text in warned[0]


@pytest.fixture
def without_compiler(tmp_path: Path) -> str:
    """A PATH with nothing on it that compiles."""
    folder = tmp_path / "bin"
    folder.mkdir()
    return str(folder)


@pytest.mark.compile
@pytest.mark.slow
def test_no_compiler_is_slow_and_said_once(
    as_usual: tuple[float, float], tmp_path: Path, without_compiler: str
) -> None:
    result = trained({"PATH": without_compiler, "CXX": None, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)})
    assert_slow_path(result, as_usual, "no C++ compiler runs here (CXX is 'not set')", "Install g++, or set CXX")


@pytest.mark.compile
@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["ccache g++", "/no/such/compiler", os.sep])
def test_a_compiler_that_cannot_be_run_is_slow_and_said_once(
    as_usual: tuple[float, float], tmp_path: Path, compiler: str
) -> None:
    result = trained({"CXX": compiler, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)})
    assert_slow_path(result, as_usual, f"CXX is {compiler!r}", "set CXX to the path of a compiler, without arguments.")


@pytest.mark.compile
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("true") is None, reason="no program that does nothing here")
def test_a_program_that_is_no_compiler_is_slow_and_said_once(as_usual: tuple[float, float], tmp_path: Path) -> None:
    result = trained({"CXX": shutil.which("true"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)})
    assert_slow_path(result, as_usual, "compiled code cannot be loaded", "Set CXX to the path of a C++ compiler")


@pytest.mark.compile
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc here")
def test_a_compiler_of_c_is_slow_and_said_once(as_usual: tuple[float, float], tmp_path: Path) -> None:
    """What it links cannot be loaded. PEFT's BOFT leaves it behind in the environment."""
    result = trained({"CXX": "gcc", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)})
    assert_slow_path(result, as_usual, "CXX is 'gcc'", "Set CXX to the path of a C++ compiler (gcc is none")


@pytest.mark.compile
@pytest.mark.slow
def test_libraries_that_a_killed_process_left_cut_off_are_compiled_anew(
    as_usual: tuple[float, float], tmp_path: Path
) -> None:
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    trained(cache)
    libraries = list(tmp_path.rglob("*.main.so"))
    for index, library in enumerate(libraries):
        with library.open("r+b") as file:
            file.truncate((0, 20, library.stat().st_size // 2)[index % 3])
        os.utime(library, (time.time() - 60,) * 2)
    assert len(libraries) > 3
    assert trained(cache) == (*as_usual, [])


@pytest.mark.compile
@pytest.mark.slow
def test_a_cache_folder_that_cannot_be_made_is_said_at_import(tmp_path: Path) -> None:
    """PyTorch makes it when its compiler is imported. Below a file, since root may write into any folder."""
    (tmp_path / "file").touch()
    ran = python("import quaff_fx", {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "file" / "cache")})
    assert ran.returncode != 0
    assert ran.stderr.splitlines()[-1] == (
        f"quaff_fx.errors.ConfigError: TORCHINDUCTOR_CACHE_DIR: is {tmp_path}/file/cache, which cannot be made (Not a "
        "directory), expected a folder that can be written. Set it to one."
    )


@pytest.mark.compile
@pytest.mark.slow
def test_a_cache_folder_that_cannot_be_written_is_slow_and_said_once(
    as_usual: tuple[float, float], tmp_path: Path
) -> None:
    before = """
import errno, tempfile
def refuse(*_, dir=None, **__):
    raise PermissionError(errno.EACCES, "Permission denied", dir)
tempfile.TemporaryFile = refuse
"""
    result = trained({"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}, before)
    assert_slow_path(result, as_usual, f"compiled code cannot be kept in {tmp_path} (Permission denied)")


@pytest.mark.compile
@pytest.mark.slow
@pytest.mark.parametrize("files", [0, 1, 3, 6])
def test_a_disk_that_gets_full_while_compiling_is_slow_and_said_once(
    as_usual: tuple[float, float], tmp_path: Path, files: int
) -> None:
    """After the check, before or after the kernel or the forward graph was compiled."""
    before = f"""
import errno
import torch._inductor.codecache as codecache
write_atomic, left = codecache.write_atomic, [{files}]
def write(*args, **kwargs):
    left[0] -= 1
    if left[0] < 0:
        raise OSError(errno.ENOSPC, "No space left on device")
    return write_atomic(*args, **kwargs)
codecache.write_atomic = write
"""
    result = trained({"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}, before)
    assert_slow_path(result, as_usual, f"compiled code cannot be kept in {tmp_path} (No space left on device)")


@pytest.mark.compile
@pytest.mark.slow
@pytest.mark.parametrize(
    "environment",
    [
        pytest.param({"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, id="ascii"),
        pytest.param({"LC_ALL": "POSIX"}, id="posix"),
        pytest.param({"HOME": None, "USER": None, "LOGNAME": None, "LNAME": None, "USERNAME": None}, id="no-home"),
    ],
)
def test_other_locales_and_users_change_nothing(
    as_usual: tuple[float, float], tmp_path: Path, environment: dict[str, str | None]
) -> None:
    """Inductor reads files of its own in the locale's encoding: a UnicodeDecodeError."""
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    loss, gradient, warned = trained(cache | environment)
    assert (loss, gradient) == pytest.approx(as_usual, rel=1e-6)
    assert warned == [], "\n".join(warned)


@pytest.mark.compile
@pytest.mark.slow
def test_a_user_without_a_name_gets_a_cache_folder_of_its_own(tmp_path: Path) -> None:
    before = """
import getpass
def getuser():
    raise KeyError("getpwuid(): uid not found: 12345")
getpass.getuser = getuser
"""
    assert trained({"TORCHINDUCTOR_CACHE_DIR": None, "TMPDIR": str(tmp_path), "HOME": None}, before)[2] == []
    assert [path.name.startswith("torchinductor_uid_") for path in tmp_path.glob("torchinductor*")] == [True]


@pytest.mark.slow
def test_an_unknown_variant_of_the_kernel_is_refused_with_the_names() -> None:
    ran = python(
        "import quaff_fx\nfrom quaff_fx.kernels import dispatch\nprint(dispatch.activation_max('auto', "
        "__import__('torch').device('cpu')))",
        {"QUAFF_FX_CPU_VARIANT": "avx"},
    )
    assert ran.stderr.splitlines()[-1] == (
        "quaff_fx.errors.ConfigError: QUAFF_FX_CPU_VARIANT: is 'avx', expected one of native, avx_vnni, avx2, generic. "
        "Unset it, or choose one."
    )


# --- how the package finds its passes --------------------------------------------------------------------------------

WALK = """
import pkgutil
import quaff_fx
print(*sorted(module.name for module in pkgutil.walk_packages(quaff_fx.__path__, "quaff_fx.")), sep="\\n")
"""


def expected_modules() -> list[str]:
    """Every file of the package, by where it lies in the checkout."""
    names = []
    for folder, prefix in ((ROOT / "quaff_fx", ("quaff_fx",)), (ROOT / "passes", ("quaff_fx", "passes"))):
        for path in folder.glob("**/*.py"):
            if "passes" in path.relative_to(folder).parts:
                continue  # through the link
            parts = (*prefix, *path.relative_to(folder).with_suffix("").parts)
            names.append(".".join(part for part in parts if part != "__init__"))
    return sorted(set(names) - {"quaff_fx"})


def test_walking_the_package_sees_each_module_once_and_nothing_else() -> None:
    """The package's path held its parent, so that a walk went through the tests."""
    assert python(WALK, {}).stdout.split() == expected_modules()


@pytest.mark.parametrize("cwd", [ROOT, Path(os.sep)], ids=["checkout", "elsewhere"])
def test_the_logs_of_the_package_can_be_turned_on(cwd: Path) -> None:
    """PyTorch imports all modules of a package that TORCH_LOGS names; in a checkout it did not come back."""
    ran = python("import quaff_fx\nprint('imported')", {"TORCH_LOGS": "+quaff_fx"}, cwd)
    assert ran.stdout.split() == ["imported"], ran.stderr[-2000:]


@pytest.mark.slow
def test_a_checkout_without_symbolic_links_finds_its_passes(tmp_path: Path) -> None:
    """git writes a small text file in place of the link then."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "passes", tmp_path / "passes", ignore=ignored)
    shutil.copytree(ROOT / "quaff_fx", tmp_path / "quaff_fx", symlinks=True, ignore=ignored)
    link = tmp_path / "quaff_fx" / "passes"
    assert link.is_symlink()
    assert link.readlink() == Path("../passes")
    link.unlink()
    link.write_text("../passes")
    code = "import quaff_fx.passes.pipeline as p\nprint(p.__file__, quaff_fx.passes.pipeline is p, *quaff_fx.__path__)"
    code = f"import quaff_fx\n{code}"
    ran = python(code, {"PYTHONPATH": str(tmp_path)}, tmp_path)
    assert ran.stdout.split() == [str(tmp_path / "passes" / "pipeline.py"), "True", str(tmp_path / "quaff_fx")], (
        ran.stderr
    )


@pytest.mark.slow
def test_a_wheel_holds_each_module_once_and_can_be_imported(tmp_path: Path) -> None:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("no git checkout")
    pytest.importorskip("setuptools")
    source = tmp_path / "source"
    for name in ("quaff_fx", "passes", "pyproject.toml", "README.md", "LICENSE"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        source.mkdir(exist_ok=True)
        options = {"symlinks": True, "ignore": shutil.ignore_patterns("__pycache__")} if copy is shutil.copytree else {}
        copy(ROOT / name, source / name, **options)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        str(source),
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=600)
    (wheel,) = tmp_path.glob("*.whl")
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".py")]
        assert {"quaff_fx/py.typed", "quaff_fx/kernels/cpu/int8_gemm.cpp"} <= set(archive.namelist())
        archive.extractall(installed)
    modules = sorted(name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in names)
    assert modules == sorted(["quaff_fx", *expected_modules()])
    # -S: without the site packages, whose editable installation would be found as well; PyTorch lies there, too.
    site = sysconfig.get_path("purelib")
    ran = python(WALK, {"PYTHONPATH": os.pathsep.join([str(installed), site])}, tmp_path)
    assert ran.stdout.split() == expected_modules(), ran.stderr
