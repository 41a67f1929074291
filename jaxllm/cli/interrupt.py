"""What Ctrl-C does in a process of the command line.

Before the command begins, while libraries are imported, nothing is to be cleaned up: the process ends. Then
it raises KeyboardInterrupt, which takes the way of any error: files that are not finished are removed.
Pressed again while that goes on it does nothing, so that what cleans up is not stopped on its way. Where
nothing can be raised, it is raised a moment later: within an import, for numpy and others crash when theirs
is cut short, and within a destructor or a hook of the garbage collector.
"""

import os
import signal
import sys
from types import FrameType
from typing import NoReturn

MOMENT = 0.02  # seconds
INTERRUPTED = 130  # the exit status

_pressed: list[int] = []  # signals that came
_begun: list[bool] = []  # not empty once a command has begun


def install() -> None:
    """Makes this process one that Ctrl-C ends in order; a process told to ignore it goes on doing so."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _interrupt)
        signal.signal(signal.SIGALRM, _interrupt)
        sys.unraisablehook = _raise_later


def begin() -> None:
    """From now on there may be something to clean up."""
    _begun.append(True)


def end() -> NoReturn:
    """Ends the process without waiting for threads, which would go on writing."""
    os.write(2, b"jaxllm: interrupted\n")
    os._exit(INTERRUPTED)


def ignore() -> None:
    """From now on Ctrl-C does nothing: the process ends anyway."""
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def pressed() -> bool:
    """Whether Ctrl-C came, whatever became of it."""
    return bool(_pressed)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    _pressed.append(signum)
    if not _begun:
        end()
    if _is_ending():
        return
    if _is_importing(frame):
        signal.setitimer(signal.ITIMER_REAL, MOMENT)
        return
    raise KeyboardInterrupt


def _is_ending() -> bool:
    """Whether an interruption is on its way up already."""
    error = sys.exception()
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None


def _raise_later(lost: "sys.UnraisableHookArgs") -> None:
    if issubclass(lost.exc_type, KeyboardInterrupt):
        signal.setitimer(signal.ITIMER_REAL, MOMENT)
    else:
        sys.__unraisablehook__(lost)
