"""Bad input: one sentence that names the thing, the value and the remedy, raised before any work starts."""

import difflib
from collections.abc import Iterable
from types import TracebackType
from typing import NoReturn


class Told(BaseException):
    """What ends a cell with a sentence that needs no more explanation."""

    def _render_traceback_(self) -> list[str]:
        """What Jupyter shows: the lines of the reader's cells that asked for it, and the sentence below them. Where in
        the package it was noticed, half a page of frames, tells a reader nothing."""
        from IPython import get_ipython

        frames, shown = [], None
        place = self.__traceback__
        while place is not None:
            if place.tb_frame.f_globals.get("__name__") == "__main__":
                frames.append(place)
            place = place.tb_next
        for place in reversed(frames):
            shown = TracebackType(shown, place.tb_frame, place.tb_lasti, place.tb_lineno)
        error = type(self)(*self.args)  # without what led to it
        return get_ipython().InteractiveTB.structured_traceback(type(self), error, shown, tb_offset=0)


class InputError(Told, ValueError):
    """The caller asked for something that cannot be done; the message says what, and what to do instead."""


class Interrupted(Told, KeyboardInterrupt):
    """A person stopped a run, which is saved."""


def unknown(kind: str, name: object, known: Iterable[str]) -> NoReturn:
    """Raise InputError for a name that does not exist, with the nearest one that does."""
    known = sorted(known)
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise InputError(f"Unknown {kind} {name!r}: {hint}Known: {', '.join(known)}.")


class NonFinite(RuntimeError):
    """The loss became infinite or NaN; the message names step, term and the saved batch."""
