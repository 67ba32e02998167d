"""Being asked to stop: signals become a flag that is read between units of work, never in the middle of one."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Self

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Preempted(Exception):
    """Asked to stop before the first step; there is nothing to save."""


class Preemption:
    """Context manager: while it is open, SIGTERM, SIGINT and SIGUSR1 set `requested` instead of ending the process."""

    def __init__(self) -> None:
        self.requested = False
        self.signal = ""
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        # Python takes signals on the main thread only; a caller on another one has to forward them itself
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.requested, self.signal = True, signal.Signals(number).name

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
