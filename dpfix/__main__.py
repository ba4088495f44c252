"""The command line, ``dpfix`` or ``python -m dpfix``: ``segment ensemble``, ``nnunet doctor``, ``budget``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dpfix.errors import DPFixError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: the command line without the program's name; ``sys.argv`` if not given.

    Returns:
        The exit status: 0, 1 if a doctor found something, 2 if something was refused.
    """
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except DPFixError as error:
        print(f"dpfix: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("dpfix", description="Differentially private training, repaired and proven.")
    groups = parser.add_subparsers(required=True, metavar="COMMAND")
    segment = groups.add_parser("segment", help="work on segmentations")
    _add_ensemble(segment.add_subparsers(required=True, metavar="COMMAND"))
    nnunet = groups.add_parser("nnunet", help="private training with nnU-Net")
    _add_nnunet(nnunet.add_subparsers(required=True, metavar="COMMAND"))
    budget = groups.add_parser("budget", help="what the trainings on a data set have spent")
    budget.add_argument("file", metavar="FILE", help="file of a dpfix.Budget")
    budget.set_defaults(run=_budget)
    return parser


def _budget(options: argparse.Namespace) -> int:
    from dpfix.training.budget import Budget

    print(Budget(options.file))
    return 0


def _add_ensemble(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "ensemble",
        help="average the probabilities of several models, once",
        description="Average the probabilities of several models and write one label map per case. The folders are what "
        "nnUNetv2_predict --save_probabilities wrote, one per model.",
    )
    parser.add_argument("folders", nargs="+", metavar="DIR", help="predictions of one model: .npz and .pkl per case")
    parser.add_argument("-o", "--output", required=True, metavar="OUT", help="folder for the label maps")
    parser.add_argument("--kind", choices=("regions", "labels"), help="default: told from the first dataset.json")
    parser.add_argument("--regions-class-order", nargs="+", type=int, metavar="LABEL", help="default: of dataset.json")
    parser.add_argument("--weights", nargs="+", type=float, metavar="W", help="one per folder; default: equal")
    parser.add_argument("--save-probabilities", action="store_true", help="write the averaged probabilities, too")
    parser.set_defaults(run=_ensemble)


def _ensemble(options: argparse.Namespace) -> int:
    from dpfix.segmentation import ensemble_folders

    written = ensemble_folders(
        options.folders,
        options.output,
        kind=options.kind,
        regions_class_order=options.regions_class_order,
        weights=options.weights,
        save_probabilities=options.save_probabilities,
    )
    print(f"{len(written)} case(s) from {len(options.folders)} model(s) written to {options.output}")
    return 0


def _add_nnunet(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    doctor = commands.add_parser("doctor", help="what in this installation cannot work, or cannot be private")
    doctor.add_argument("-d", "--dataset", type=Path, metavar="DIR", help="folder of a preprocessed data set")
    doctor.add_argument("-p", "--plans", default="nnUNetPlans", help="name of its plans; default: %(default)s")
    doctor.set_defaults(run=_doctor)
    trainers = commands.add_parser("trainers", help="print the folder that nnUNet_extTrainer has to name")
    trainers.set_defaults(run=_trainers)


def _doctor(options: argparse.Namespace) -> int:
    from dpfix.integrations.nnunet.doctor import diagnose_installation

    remarks = diagnose_installation(dataset=options.dataset, plans=options.plans)
    print("\n".join(map(str, remarks)) or "nothing to remark")
    return int(any(remark.wrong for remark in remarks))


def _trainers(options: argparse.Namespace) -> int:
    from dpfix.integrations.nnunet.doctor import TRAINERS

    print(TRAINERS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
