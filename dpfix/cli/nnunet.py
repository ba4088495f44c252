"""``dpfix nnunet doctor`` and ``dpfix nnunet trainers``."""

from __future__ import annotations

import argparse
from pathlib import Path

from dpfix.cli.parsers import Commands
from dpfix.cli.progress import progress


def add(commands: Commands) -> None:
    """Add the parsers of the commands."""
    group = commands.add_parser("nnunet", help="private training with nnU-Net")
    of_group = group.add_subparsers(required=True, metavar="COMMAND")
    doctor = of_group.add_parser("doctor", help="what in this installation cannot work, or cannot be private")
    doctor.add_argument("-d", "--dataset", type=Path, metavar="DIR", help="folder of a preprocessed data set")
    doctor.add_argument("-p", "--plans", default="nnUNetPlans", help="name of its plans; default: %(default)s")
    doctor.set_defaults(run=_doctor)
    trainers = of_group.add_parser("trainers", help="print the folder that nnUNet_extTrainer has to name")
    trainers.set_defaults(run=_trainers)


def _doctor(options: argparse.Namespace) -> int:
    from dpfix.integrations.nnunet.doctor import diagnose_installation

    with progress("dpfix nnunet doctor: the installation"):
        remarks = diagnose_installation(dataset=options.dataset, plans=options.plans)
    print("\n".join(map(str, remarks)) or "nothing to remark")
    return int(any(remark.wrong for remark in remarks))


def _trainers(options: argparse.Namespace) -> int:
    from dpfix.integrations.nnunet.doctor import TRAINERS

    print(TRAINERS)
    return 0
