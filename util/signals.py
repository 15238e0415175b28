"""SIGINT and SIGTERM, which end a run after its next step."""
import contextlib
import signal


class StopSignals:
    """A context that remembers the signal it gets in `number` (0: none); a second one ends the program at once."""

    def __init__(self):
        self.number, self._handlers = 0, {}

    def __enter__(self):
        with contextlib.suppress(ValueError):                           # not in the main thread
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) is not signal.SIG_IGN:      # as for what a script runs in the background
                    self._handlers[number] = signal.signal(number, self._remember)
        return self

    def _remember(self, number, _):
        self.number = number
        self._restore()

    def __exit__(self, *error):
        self._restore()

    def _restore(self):
        while self._handlers:
            signal.signal(*self._handlers.popitem())
