"""What Inductor sees of the `quaff` ops, put into its table: pointwise aten that it fuses, around the int8 products.

The decompositions are registered in Inductor's own table (read in torch 2.13): a table passed to `compile_fx` makes
the graph cache unusable. The caches do not look at decompositions, so `cache_salt` goes into their key.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from torch._inductor.decomposition import decompositions, fast_random_decomps

from quaff_fx import ops

SOURCES = Path(__file__).parent


def register() -> None:
    """Puts the decompositions into Inductor's table. Idempotent."""
    lowered = {target: op.lowered for target, op in ops.OPS.items() if op.lowered is not None}
    decompositions.update(lowered)
    # Inductor keeps a copy of its table from the first time that anything was compiled. Without these entries it would
    # leave the ops as they are: right, slow, and without a word.
    if not lowered.keys() <= fast_random_decomps().keys():
        fast_random_decomps.cache_clear()


def cache_salt() -> str:
    """Returns a hash of the package's sources, any of which may decide what a cached graph computes.

    Inductor's key says nothing of donated buffers, say, and a cached backward that writes into what forward saved gives
    wrong gradients where it runs twice. The passes are hashed by `backend`.
    """
    digest = hashlib.sha256()
    for path in sorted(SOURCES.rglob("*")):
        if path.suffix in (".py", ".cpp", ".h", ".cu"):
            digest.update(str(path.relative_to(SOURCES)).encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()
