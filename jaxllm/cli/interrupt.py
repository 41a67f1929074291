"""What Ctrl-C does in a process of the command line.

The first raises KeyboardInterrupt, which takes the way of any error: files that are not finished are removed.
Further ones, while that goes on, are let pass, so that what cleans up is not stopped on its way. Where Python
cannot raise (within a destructor, or a hook of its garbage collector), it is raised again a moment later.
"""

import signal
import sys
import threading

AGAIN = 0.02  # seconds after which an interruption that got lost is raised again

_pressed = threading.Event()


def install() -> None:
    """Makes this process one that Ctrl-C ends in order; a process told to ignore it goes on doing so."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _raise)
        sys.unraisablehook = _raise_again


def ignore() -> None:
    """From now on Ctrl-C does nothing: the process ends anyway."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def pressed() -> bool:
    """Whether Ctrl-C came, whatever became of it."""
    return _pressed.is_set()


def _raise(signum, frame) -> None:
    _pressed.set()
    error = sys.exception()
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return
        error = error.__context__
    raise KeyboardInterrupt


def _raise_again(lost: "sys.UnraisableHookArgs") -> None:
    if issubclass(lost.exc_type, KeyboardInterrupt):
        threading.Timer(AGAIN, signal.raise_signal, [signal.SIGINT]).start()
    else:
        sys.__unraisablehook__(lost)
