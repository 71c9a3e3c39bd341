"""The one clock of the engine's statistics."""

import time


class Stopwatch:
    """Seconds since it was made or lapped last."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def elapsed(self) -> float:
        return time.perf_counter() - self._start

    def lap(self) -> float:
        """The seconds so far; the watch starts again at zero."""
        now = time.perf_counter()
        elapsed, self._start = now - self._start, now
        return elapsed
