"""``dpfix segment ensemble``."""

from __future__ import annotations

import argparse

from dpfix.cli.parsers import Commands
from dpfix.cli.progress import progress


def add(commands: Commands) -> None:
    """Add the parser of the command."""
    group = commands.add_parser("segment", help="work on segmentations")
    parser = group.add_subparsers(required=True, metavar="COMMAND").add_parser(
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

    with progress(f"dpfix segment ensemble: writing to {options.output}"):
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
