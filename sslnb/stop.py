"""Being told to stop: by signals, by a parent that is gone, and by papermill's end."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator

from .errors import Interrupted
from .run import alive


class Stop:
    """Notices SIGTERM, SIGHUP, SIGINT and a parent that died; the loop asks `asked` between steps and saves first.

    A second SIGINT interrupts at once, unless it is `saving`. Outside the main thread signals cannot be caught, so only
    the parent counts.
    """

    def __init__(self):
        self.reason, self.saving = "", False
        self._parent = int(os.environ.get("SSLNB_PARENT", 0))
        self._kernels_parent = 0
        self._old: dict[int, object] = {}
        self._left = threading.Event()

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            hangup = [signal.SIGHUP] if hasattr(signal, "SIGHUP") else []
            caught = [s for s in (signal.SIGTERM, signal.SIGINT, *hangup) if signal.getsignal(s) != signal.SIG_IGN]
            self._old = {s: signal.signal(s, self._note) for s in caught}  # nohup ignores SIGHUP, and so do we
        if poller := sys.modules.get("ipykernel.parentpoller"):
            # A kernel ends itself within a second of papermill's end. It waits until we have saved.
            self._kernels_parent, poller.os = os.getppid(), Patient(self._left)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._left.set()
        if poller := sys.modules.get("ipykernel.parentpoller"):
            poller.os = os

    def _note(self, number: int, frame) -> None:
        if self.reason and number == signal.SIGINT:
            if self.saving:
                return
            raise KeyboardInterrupt
        self.reason = signal.Signals(number).name
        with contextlib.suppress(RuntimeError, OSError):  # we may be in the middle of another print
            print(f"{self.reason}: finishing this step, then saving" + (
                "; a second interrupt ends it at once, without." if number == signal.SIGINT else "."), flush=True)

    @property
    def _orphaned(self) -> bool:
        return (bool(self._parent) and not alive(self._parent)
                or bool(self._kernels_parent) and os.getppid() != self._kernels_parent)

    @property
    def asked(self) -> bool:
        if self._orphaned:
            self.reason = self.reason or "the process that started the run is gone"
        return bool(self.reason)

    def exception(self) -> BaseException:
        """What ends the loop: papermill and shells must see that the run is not finished."""
        if self._orphaned:
            return SystemExit(0)  # nobody is left to see it, and after an error torchrun would start us again
        return Interrupted(self.reason) if self.reason == "SIGINT" else SystemExit(143)


class Patient:
    """The module os, but its end of the process waits for `left`, ten minutes at most."""

    def __init__(self, left: threading.Event):
        self._until = left

    def __getattr__(self, name: str):
        return getattr(os, name)

    def _exit(self, code: int) -> None:
        self._until.wait(600)
        os._exit(code)


@contextlib.contextmanager
def sigterm_raises() -> Iterator[None]:
    """SIGTERM raises SystemExit here, once: who waits for other processes passes it on, and waits while they save.

    By default it would end this process at once, and a batch job with it, or do nothing if this is a container's first.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame) -> None:
        signal.signal(number, signal.SIG_IGN)
        raise SystemExit(143)

    old = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old)
