"""``dpfix statement CHECKPOINT``: what the training of a checkpoint has released."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from dpfix.cli.parsers import Commands
from dpfix.errors import CheckpointError
from dpfix.report.statement import NOT_COVERED, Stretch
from dpfix.scan.arguments import check_delta
from dpfix.training import checkpoint_file
from dpfix.training.epsilon import spent
from dpfix.training.pld_accountant import new_accountant
from dpfix.training.releases import joined, read_state


def add(commands: Commands) -> None:
    """Add the parser of the command."""
    parser = commands.add_parser(
        "statement",
        help="epsilon of a checkpoint, and the steps that it comes from",
        description="Epsilon of everything that the training of a checkpoint has released, computed from the file alone. Unit "
        "and sampling are not in the file: print(private.statement(delta)) of the training says them.",
    )
    parser.add_argument("file", metavar="CHECKPOINT", help="what save_checkpoint of the privacy engine wrote")
    parser.add_argument("--delta", type=float, required=True, help="smaller than 1 / number of samples")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    delta = check_delta(options.delta)
    content, checked = checkpoint_file.read(options.file, {})
    stretches, mechanism = _released(content)
    accountant = new_accountant(mechanism)
    accountant.history = [(s.noise_multiplier, s.sampling_rate, s.steps) for s in stretches]
    found = spent(accountant, delta)
    values = {
        "epsilon": found.epsilon,
        "delta": delta,
        "accountant": found.mechanism,
        "steps": sum(s.steps for s in stretches),
        "schedule": [asdict(s) for s in stretches],
        "checksum": checked,
        "not_covered": NOT_COVERED,
    }
    print(json.dumps(values, indent=2) if options.json else _words(values, stretches))
    return 0


def _released(content: Mapping[str, Any]) -> tuple[list[Stretch], str]:
    """The steps of a checkpoint, dpfix's or Opacus's, and the accountant that counted them."""
    state = content["privacy_accountant_state_dict"]
    noted = content.get(checkpoint_file.ENTRY, {}).get("releases")
    if noted is not None:
        releases, others = read_state(noted)
        further = [Stretch(steps, *setting) for setting, steps in others.items()]
        return joined([*further, *(s for r in releases for s in r.stretches)]), str(state.get("mechanism", "prv"))
    try:
        entries = [Stretch(int(steps), float(noise), float(rate)) for noise, rate, steps in state["history"]]
        return joined(entries), str(state.get("mechanism", "prv"))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(checkpoint_file.damaged(f"its accountant's history cannot be read ({error})")) from error


def _words(values: Mapping[str, Any], stretches: list[Stretch]) -> str:
    checked = "as it was saved" if values["checksum"] else "no checksum in the file"
    lines = [
        f"({values['epsilon']:.4g}, {values['delta']:.3g})-differential privacy after {values['steps']} steps",
        f"  accountant:  {values['accountant']}",
        f"  content:     {checked}",
        *(f"  - {stretch}" for stretch in stretches),
        "  not covered:",
        *(f"    - {line}" for line in values["not_covered"]),
    ]
    return "\n".join(lines)
