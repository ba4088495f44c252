"""``dpfix budget FILE``."""

from __future__ import annotations

import argparse

from dpfix.cli.parsers import Commands


def add(commands: Commands) -> None:
    """Add the parser of the command."""
    parser = commands.add_parser("budget", help="what the trainings on a data set have spent")
    parser.add_argument("file", metavar="FILE", help="file of a dpfix.Budget")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    from dpfix.training.budget import Budget

    print(Budget(options.file))
    return 0
