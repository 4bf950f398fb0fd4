"""The code in the documentation, so that tests run what people read."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def code_of(page: str, section: str) -> str:
    """Returns the first Python block of a section of a page in docs/."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    block = re.search(rf"^## {section}$.*?^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert block is not None, f"docs/{page}: has no section {section!r} with a Python block"
    return block[1]
