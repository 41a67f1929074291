"""The command line: a thin skin over the library, for people and for scripts.

    jaxllm demo | generate | eval | convert | quantize | train

Results go to stdout, progress and notes to stderr; with `--json` stdout holds exactly one JSON
object. What the user can get wrong ends in one line on stderr and exit status 2, Ctrl-C in 130;
a traceback is a bug. One file a command:

    demo       a report on the model that ships
    generate   text from prompts
    eval       perplexity, multiple choice
    convert    checkpoints to other directories
    quantize   weights in fewer bits
    train      the models that ship, gates of a cache, stories
    options    options that several commands share
    output     what commands read and write
"""

import os
import sys
from typing import NoReturn

import click

import jaxllm as jl
from jaxllm.cli import convert, demo, eval, generate, quantize, train
from jaxllm.cli.output import note


@click.group(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(jl.__version__)
def cli() -> None:
    """Run, measure and convert language models with JAX."""


# subtle: by module, for a command bears its module's name and would hide it here
for command in (
    demo.demo,
    generate.generate,
    eval.evaluate,
    convert.convert,
    quantize.quantize,
    train.train,
):
    cli.add_command(command)


def main(args: list[str] | None = None) -> NoReturn:
    """Runs the command line and exits: 0 done, 2 what was asked cannot be, 130 interrupted."""
    sys.exit(status(args))


def status(args: list[str] | None = None) -> int:
    """Runs the command line; its exit status."""
    # A text longer than the context is refused, or cut into windows, here: no warning is due.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        return cli.main(args, prog_name="jaxllm", standalone_mode=False) or 0
    except click.ClickException as error:
        return refuse(error.format_message())
    except (click.Abort, KeyboardInterrupt):
        note("jaxllm: interrupted")
        return 130
    except BrokenPipeError:  # the reader of stdout went away, as in `jaxllm ... | head`
        silence_stdout()
        return 141
    except OSError as error:  # without "[Errno 2]"
        where = "" if error.filename is None else f": {error.filename}"
        return refuse(f"{error.strerror}{where}" if error.strerror else str(error))
    except (ValueError, NotImplementedError, FloatingPointError) as error:
        return refuse(str(error))


def silence_stdout() -> None:
    """Lets what is still buffered go nowhere, so that the end of Python does not complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def refuse(message: str) -> int:
    """Says in one line why not; exit status 2."""
    note("jaxllm: " + " ".join(message.split()))
    return 2
