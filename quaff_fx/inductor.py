"""Inductor's modules, imported while the encoding of files is UTF-8.

Inductor reads files of its own in the encoding of the locale. That is ASCII with ``LC_ALL=POSIX``, if Python was told
not to take UTF-8 then (``PYTHONUTF8=0``) or does not do so by itself. (Read in torch 2.13.)
"""

from __future__ import annotations

import codecs
import contextlib
import locale
from collections.abc import Iterator

from quaff_fx.errors import ConfigError


@contextlib.contextmanager
def _utf_8() -> Iterator[None]:
    """Makes UTF-8 the encoding of files.

    Raises:
        ConfigError: it is another one and there is no UTF-8 locale.
    """
    if codecs.lookup(locale.getpreferredencoding(False)).name == "utf-8":
        yield
        return
    before = locale.setlocale(locale.LC_CTYPE)
    try:
        with contextlib.suppress(locale.Error):
            locale.setlocale(locale.LC_CTYPE, "C.UTF-8")
        yield
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"locale: has the encoding {error.encoding}, expected UTF-8, in which PyTorch's files are written. Set "
            "PYTHONUTF8=1."
        ) from error
    finally:
        locale.setlocale(locale.LC_CTYPE, before)


with _utf_8():
    from torch._inductor import compile_fx as compile_fx
    from torch._inductor import pattern_matcher as pattern_matcher
