"""Stopping when asked to: what SIGINT (Ctrl-C), SIGTERM and SIGHUP (a terminal that closes) do while a run is under way."""

import signal
import threading
from contextlib import contextmanager

from cifar_fastai.errors import Interrupted

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Interrupts:
    """Within this context a first signal raises Interrupted, with `words`; a second ends the process at once.

    While `deferred`, a first one is only noted in `pending`, for a loop that comes to a good point to stop. A signal that
    the process was started to ignore, as a job in the background ignores Ctrl-C or under nohup SIGHUP, stays ignored.
    """

    def __init__(self, words: str = ""):
        self.words, self.pending, self._deferred = words, None, False

    def __enter__(self):
        in_main_thread = threading.current_thread() is threading.main_thread()  # no other may set handlers
        heeded = [number for number in SIGNALS if in_main_thread and signal.getsignal(number) != signal.SIG_IGN]
        self._former = {number: signal.signal(number, self._handle) for number in heeded}
        return self

    def __exit__(self, *_):
        for number, handler in self._former.items():
            signal.signal(number, handler)

    @contextmanager
    def deferred(self):
        """Within it, stop at `stop_if_pending` and at the end alone."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
        self.stop_if_pending()

    def stop_if_pending(self) -> None:
        """Raise Interrupted if a signal came."""
        if self.pending is not None:
            raise Interrupted(self.pending, self.words)

    def _handle(self, number, _frame):
        if self.pending is not None:
            raise SystemExit(128 + number)
        self.pending = number
        if not self._deferred:
            self.stop_if_pending()
