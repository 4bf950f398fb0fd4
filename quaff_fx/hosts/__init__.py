"""The habits of quaff_fx's hosts: what it knows of PEFT, of transformers and of torch's own modules, a file each.

PEFT and transformers are optional: nothing here imports them, and nothing is done unless they were imported.
"""

from quaff_fx.hosts.peft import adapters_own_parameters, guard_peft, model_name
from quaff_fx.hosts.torch import untraced_modules, without_mha_fastpath
from quaff_fx.hosts.transformers import (
    has_kv_cache,
    hide_idle_hooks,
    is_conv1d,
    is_idle_hook,
    show_hooks,
    without_kv_cache,
)

__all__ = [
    "adapters_own_parameters",
    "guard_peft",
    "has_kv_cache",
    "hide_idle_hooks",
    "is_conv1d",
    "is_idle_hook",
    "model_name",
    "show_hooks",
    "untraced_modules",
    "without_kv_cache",
    "without_mha_fastpath",
]
