"""The command line: a thin skin over the library, for people and for scripts.

    jaxllm demo | generate | eval | convert | quantize | train | bench

Results go to stdout, progress and notes to stderr; with `--json` stdout has exactly one JSON object.
What the user can get wrong ends in one line on stderr and exit status 2, Ctrl-C in one line and 130;
a traceback is a bug. One file a command:

    commands           the group of all commands
    demo               a report on the model that ships
    generate           text from prompts
    eval               perplexity, multiple choice
    convert            checkpoints to other directories
    quantize           weights in fewer bits
    train              the models that ship, gates of a cache, stories
    bench              kernels timed, tiles chosen, on a GPU
    options            options that several commands share
    output             what commands read and write
    interrupt          what Ctrl-C does
    compilation_cache  compiled programs kept between runs

Nothing heavy is imported here: Ctrl-C is taken care of before jax is loaded.
"""

import os
import sys
import warnings
from typing import NoReturn

from jaxllm.cli import interrupt


def main(args: list[str] | None = None) -> NoReturn:
    """Runs the command line and ends the process: 0 done, 2 what was asked cannot be, 130 interrupted."""
    interrupt.install()
    warnings.showwarning = show_warning
    try:
        code = status(args)
        interrupt.ignore()  # what was asked is done, or has been undone
    except KeyboardInterrupt:
        code = interrupt.INTERRUPTED
    if code == interrupt.INTERRUPTED:
        interrupt.end()
    sys.exit(code)


def status(args: list[str] | None = None) -> int:
    """Runs the command line; its exit status."""
    try:
        prepare_libraries()
        from jaxllm.cli.commands import run

        interrupt.begin()
        return run(args)
    except BrokenPipeError:  # the reader of stdout went away, as in `jaxllm ... | head`
        silence_stdout()
        return 141
    except Exception as error:
        if interrupt.pressed():  # some libraries make another error of it
            return interrupt.INTERRUPTED
        return refuse(reason(error))
    except KeyboardInterrupt:
        return interrupt.INTERRUPTED


def prepare_libraries() -> None:
    """Settings that libraries read when they are imported."""
    # A text longer than the context is refused, or cut into windows, here: no warning is due.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def reason(error: Exception) -> str:
    """What to tell the user; an error that is no user's fault is raised again."""
    from click import ClickException

    match error:
        case ClickException():
            return error.format_message()
        case OSError():  # without "[Errno 2]"
            where = "" if error.filename is None else f": {error.filename}"
            return f"{error.strerror}{where}" if error.strerror else str(error)
        case ValueError() | NotImplementedError() | FloatingPointError():
            return str(error)
    raise error


def show_warning(message, *where, **more) -> None:
    """A warning as a line for people, without the line of source that it comes from."""
    print("jaxllm: warning: " + " ".join(str(message).split()), file=sys.stderr, flush=True)


def silence_stdout() -> None:
    """Lets what is still buffered go nowhere, so that the end of Python does not complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def refuse(message: str) -> int:
    """Says in one line why not; exit status 2."""
    print("jaxllm: " + " ".join(message.split()), file=sys.stderr, flush=True)
    return 2
