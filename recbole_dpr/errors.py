"""Errors that the user can put right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# A longer list of valid values would bury the message it belongs to.
_SHOWN = 20


class UserError(Exception):
    """An input the user can put right.

    Its text is one line: the value, the valid ones, the way out. The command line
    prints that line and leaves with exit code 2, without a traceback.
    """

    def __init__(self, message: object) -> None:
        super().__init__(" ".join(str(message).split()))


def unknown(what: str, value: object, valid: Iterable[object], hint: str = "") -> UserError:
    """Build the error for a value that is not among the valid ones.

    >>> print(unknown("model", "SASRek", ["SASRec", "GRU4Rec"], hint="see --help"))
    unknown model 'SASRek': did you mean 'SASRec'? Valid: SASRec, GRU4Rec (see --help)
    """
    names = [str(name) for name in valid]
    close = _closest(str(value), names)
    guess = f" did you mean {' or '.join(map(repr, close))}?" if close else ""
    way_out = f" ({hint})" if hint else ""
    return UserError(f"unknown {what} {value!r}:{guess} Valid: {_listing(names)}{way_out}")


def _closest(value: str, names: list[str]) -> list[str]:
    """At most two names like ``value``, upper and lower case being alike."""
    folded = {name.casefold(): name for name in names}
    found = difflib.get_close_matches(value.casefold(), folded, n=2, cutoff=0.6)
    return [folded[name] for name in found]


def _listing(names: list[str]) -> str:
    if not names:
        return "none"
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
