"""All operations' kernels at real shapes: what is compiled ahead of time, tested and timed."""

import importlib
import pkgutil

import pallas_kernels
from pallas_kernels.case import Case


def operations() -> tuple[str, ...]:
    """The operations, which are the folders beside this file."""
    return tuple(sorted(m.name for m in pkgutil.iter_modules(pallas_kernels.__path__) if m.ispkg))


def all_cases() -> dict[str, Case]:
    """Every operation's cases by name."""
    found: dict[str, Case] = {}
    for operation in operations():
        for case in importlib.import_module(f"pallas_kernels.{operation}.cases").CASES:
            if case.name in found:
                raise ValueError(f"cases: names must be different, got {case.name!r} twice")
            found[case.name] = case
    return found
