"""Fine-tuning with int8 weights and activations (Quaff), as a compiler pass: ``model = quaff_fx.compile(model)``."""

import importlib.util as _util
import os as _os
import sys as _sys
from pathlib import Path as _Path
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

# In a checkout `quaff_fx/passes` is a symbolic link to `passes/` beside this folder; an installed package has the
# folder itself. Where git makes no links (Windows) it is a small text file, and the folder is imported from its place.
_passes = _Path(__file__).resolve().parent.parent / "passes"
if not _Path(__file__).with_name("passes").is_dir() and (_passes / "pipeline.py").is_file():
    _spec = _util.spec_from_file_location(
        "quaff_fx.passes", _passes / "__init__.py", submodule_search_locations=[str(_passes)]
    )
    assert _spec is not None
    assert _spec.loader is not None
    passes = _sys.modules["quaff_fx.passes"] = _util.module_from_spec(_spec)
    _spec.loader.exec_module(passes)

try:
    from quaff_fx import api as api  # imports PyTorch's compiler, which makes the folder for compiled code
except OSError as _error:
    _folder = _os.environ.get("TORCHINDUCTOR_CACHE_DIR", "")
    if not _folder or not str(_error.filename or "?").startswith((_folder, str(_Path(_folder).parent))):
        raise
    from quaff_fx.errors import ConfigError as _ConfigError

    raise _ConfigError(
        f"TORCHINDUCTOR_CACHE_DIR: is {_folder}, which cannot be made ({_error.strerror}), expected a folder that can "
        "be written. Set it to one."
    ) from _error

from quaff_fx.api import calibrate as calibrate
from quaff_fx.api import compile as compile
from quaff_fx.api import dequantize as dequantize
from quaff_fx.config import QuaffConfig as QuaffConfig
from quaff_fx.errors import QuaffError as QuaffError
from quaff_fx.errors import QuaffWarning as QuaffWarning
from quaff_fx.files.loading import from_pretrained as from_pretrained
from quaff_fx.files.loading import load_checkpoint as load_checkpoint
from quaff_fx.files.merging import merge_into_checkpoint as merge_into_checkpoint
from quaff_fx.files.snapshot import load_state as load_state
from quaff_fx.files.snapshot import load_state_dict as load_state_dict
from quaff_fx.files.snapshot import save_state as save_state
from quaff_fx.files.snapshot import state_dict as state_dict
from quaff_fx.reports.explain import explain as explain
from quaff_fx.reports.graphs import graphs as graphs

if _TYPE_CHECKING:
    from quaff_fx.trainer import QuaffCallback as QuaffCallback
    from quaff_fx.trainer import last_checkpoint as last_checkpoint

__version__ = "0.1.0"

_NEED_TRANSFORMERS = ("QuaffCallback", "last_checkpoint")


def __getattr__(name: str) -> _Any:
    """What needs transformers, which this package does not depend on, is imported when it is used."""
    if name not in _NEED_TRANSFORMERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from quaff_fx import trainer
    except ImportError as error:
        raise ImportError(
            f"quaff_fx.{name}: needs transformers, which cannot be imported ({error}), expected an installed one. Run "
            "pip install transformers."
        ) from error
    return getattr(trainer, name)
