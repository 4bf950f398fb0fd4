"""Fine-tuning with int8 weights and activations (Quaff), as a compiler pass: ``model = quaff_fx.compile(model)``."""

from pathlib import Path as _Path
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

# In a checkout `passes/` lies beside this folder and imports as `quaff_fx.passes`; an installed package has it inside.
_root = _Path(__file__).resolve().parent.parent
if (_root / "passes" / "pipeline.py").is_file() and str(_root) not in __path__:
    __path__.append(str(_root))

from quaff_fx.api import calibrate as calibrate
from quaff_fx.api import compile as compile
from quaff_fx.api import dequantize as dequantize
from quaff_fx.checkpoint import from_pretrained as from_pretrained
from quaff_fx.checkpoint import load_checkpoint as load_checkpoint
from quaff_fx.config import QuaffConfig as QuaffConfig
from quaff_fx.errors import QuaffError as QuaffError
from quaff_fx.errors import QuaffWarning as QuaffWarning
from quaff_fx.explain import explain as explain
from quaff_fx.graphs import graphs as graphs
from quaff_fx.merging import merge_into_checkpoint as merge_into_checkpoint
from quaff_fx.snapshot import load_state as load_state
from quaff_fx.snapshot import load_state_dict as load_state_dict
from quaff_fx.snapshot import save_state as save_state
from quaff_fx.snapshot import state_dict as state_dict

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
