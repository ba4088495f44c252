"""``dpfix plan``: :func:`dpfix.plan` on the command line."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from dpfix.cli.parsers import Commands
from dpfix.cli.progress import progress


def add(commands: Commands) -> None:
    """Add the parser of the command."""
    parser = commands.add_parser(
        "plan",
        help="the noise that a budget asks for, before anything is trained",
        description="The noise that a privacy budget asks for, for several batch sizes. No data is touched.",
    )
    parser.add_argument("--samples", type=int, required=True, metavar="N", help="number of samples that are drawn from")
    parser.add_argument("--epochs", type=float, required=True, metavar="E", help="passes over them")
    parser.add_argument(
        "--batch-size", type=int, nargs="+", required=True, metavar="B", help="expected batch sizes to compare"
    )
    parser.add_argument("--epsilon", type=float, required=True, help="the budget after all epochs")
    parser.add_argument("--delta", type=float, required=True, help="its delta; smaller than 1 / samples")
    parser.add_argument("--sampling", default="poisson", help="how batches are drawn; default: %(default)s")
    parser.add_argument("--seconds-per-sample", type=float, metavar="S", help="adds the expected time")
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw it; needs dpfix[report]")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    from dpfix.training.planning import plan

    with progress("dpfix plan: the noise of every batch size"):
        plans = plan(
            samples=options.samples,
            epochs=options.epochs,
            batch_sizes=options.batch_size,
            target_epsilon=options.epsilon,
            target_delta=options.delta,
            sampling=options.sampling,
        )
    if options.seconds_per_sample is not None:
        plans = plans.timed(options.seconds_per_sample)
    if options.picture is not None:
        plans.picture(options.picture)
    print(json.dumps(asdict(plans), indent=2) if options.json else plans)
    return 0
