"""``dpfix verify FILE``: what of a certificate does not fit."""

from __future__ import annotations

import argparse
from pathlib import Path

from dpfix.cli.parsers import Commands
from dpfix.errors import ArgumentError
from dpfix.scan.values import shown


def add(commands: Commands) -> None:
    """Add the parser of the command."""
    parser = commands.add_parser(
        "verify",
        help="what of a certificate does not fit",
        description="Compare a certificate with its seal, with itself and with the epsilon of its releases. Without the key, "
        "whoever changed it can have computed its digest anew.",
    )
    parser.add_argument("file", metavar="FILE", help="what private.certificate(delta, path) wrote")
    parser.add_argument("--key-file", metavar="KEY", help="file with the key that it was sealed with, byte for byte")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    from dpfix.training.certificate_check import verify_certificate

    check = verify_certificate(options.file, None if options.key_file is None else _key(options.key_file))
    print(check)
    return int(not check.fits)


def _key(name: str) -> bytes:
    try:
        return Path(name).read_bytes()
    except OSError as error:
        raise ArgumentError(f"--key-file={shown(name)} cannot be read: {error}.", path="--key-file") from error
