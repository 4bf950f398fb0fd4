"""Graph → graph. `pipeline` names every pass in order; `docs/writing-a-pass.md` says how to add one."""

from quaff_fx.passes.infrastructure import Change, Pass, PassResult, run_passes
from quaff_fx.passes.normalize import NormalizeProducts
from quaff_fx.passes.quantize import QuantizeLinears

__all__ = ["Change", "NormalizeProducts", "Pass", "PassResult", "QuantizeLinears", "run_passes"]
