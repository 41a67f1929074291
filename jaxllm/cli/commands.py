"""The group of all commands, and what holds for each of them."""

import sys

import click

import jaxllm as jl
from jaxllm.cli import bench, compilation_cache, convert, demo, eval, generate, quantize, train


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True},
    invoke_without_command=True,
)
@click.version_option(jl.__version__)
@click.option(
    "--no-compilation-cache",
    is_flag=True,
    envvar="JAXLLM_NO_COMPILATION_CACHE",
    show_envvar=True,
    help="Compile everything anew, and keep nothing that is compiled for the next run.",
)
@click.pass_context
def cli(context: click.Context, no_compilation_cache: bool) -> None:
    """Run, measure and convert language models with JAX.

    `jaxllm demo` shows the model that ships; `jaxllm COMMAND --help` says what a command takes.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())
        return
    if not no_compilation_cache:
        compilation_cache.start()


# subtle: by module, for a command bears its module's name and would hide it here
for command in (
    demo.demo,
    generate.generate,
    eval.evaluate,
    convert.convert,
    quantize.quantize,
    train.train,
    bench.bench,
):
    cli.add_command(command)


def run(args: list[str] | None) -> int:
    """Runs a command by its arguments, by default the process's; its exit status."""
    try:
        # subtle: not `cli.main`, which writes an empty line where it is interrupted
        with cli.make_context("jaxllm", list(sys.argv[1:] if args is None else args)) as context:
            return cli.invoke(context) or 0
    except click.exceptions.Exit as done:  # of --help, --version
        return done.exit_code
