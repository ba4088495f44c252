"""``dpfix COMMAND``, or ``python -m dpfix COMMAND``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import dpfix
from dpfix.cli import budget, nnunet, plan, segment, statement
from dpfix.cli.check import command as check
from dpfix.errors import DPFixError

COMMANDS = (check, plan, statement, budget, segment, nnunet)
"""The modules of the commands; each has ``add(commands)``, which adds a parser that sets ``run``."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: the command line without the program's name; ``sys.argv`` if not given.

    Returns:
        The exit status: 0, 1 if a doctor found something, 2 if something was refused; ``dpfix check`` has a table of its own.
    """
    options = _parsed(list(sys.argv[1:] if arguments is None else arguments))
    try:
        return options.run(options)
    except DPFixError as error:
        print(f"dpfix: {error}", file=sys.stderr)
        return 2


def _parsed(arguments: list[str]) -> argparse.Namespace:
    """The options of a command; what follows on ``--`` is ``rest`` where the command says that it takes one."""
    parser = _parser()
    end = arguments.index("--") if "--" in arguments else len(arguments)
    options, unknown = parser.parse_known_args(arguments[:end])
    if unknown or not getattr(options, "takes_rest", False):
        return parser.parse_args(arguments)
    options.rest = arguments[end + 1 :]
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("dpfix", description="Differentially private training, repaired and proven.")
    parser.add_argument("--version", action="version", version=f"dpfix {dpfix.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return parser
