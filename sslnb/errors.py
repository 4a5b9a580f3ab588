"""Bad input: one sentence that names the thing, the value and the remedy, raised before any work starts."""

import difflib
from collections.abc import Iterable
from typing import NoReturn


class InputError(ValueError):
    """The caller asked for something that cannot be done; the message says what, and what to do instead."""


def unknown(kind: str, name: object, known: Iterable[str]) -> NoReturn:
    """Raise InputError for a name that does not exist, with the nearest one that does."""
    known = sorted(known)
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise InputError(f"Unknown {kind} {name!r}: {hint}Known: {', '.join(known)}.")


class NonFinite(RuntimeError):
    """The loss became infinite or NaN; the message names step, term and the saved batch."""
