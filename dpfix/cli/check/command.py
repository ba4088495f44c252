"""``dpfix check``: of a script, or of a model alone."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from dpfix.cli.check.factory import check_model
from dpfix.cli.check.replay import Asked, check_script
from dpfix.cli.check.result import CheckResult
from dpfix.cli.check.sandbox import Workplace
from dpfix.cli.check.sarif import sarif
from dpfix.cli.check.words import words
from dpfix.cli.parsers import Commands
from dpfix.cli.progress import progress
from dpfix.errors import ArgumentError

EXIT_CODES = """exit status:
  0  nothing that breaks the guarantee was found
  1  warnings, with --strict
  2  refused, or a record moves the released sum too far (also: the command line cannot be read)
  3  the script failed, or made no private step
"""

FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def add(commands: Commands) -> None:
    """Add the parser of the command."""
    parser = commands.add_parser(
        "check",
        help="look at the first private steps of a script, or at a model",
        description="Run a script as it is, in a copy of its folder, up to its first private steps; run it again without one of "
        "the records of these steps and with another in its place; and tell how far the released sums moved. Or look at a model "
        "alone: module:factory.",
        usage="%(prog)s [options] SCRIPT [-- ARG ...]  or  MODULE:FACTORY --input SHAPE",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "target", metavar="SCRIPT | MODULE:FACTORY", help="a Python file, or a function that makes a model"
    )
    parser.add_argument(
        "--steps", type=_positive, default=3, metavar="N", help="private steps to look at; default: %(default)s"
    )
    parser.add_argument(
        "--timeout", type=float, default=600.0, metavar="S", help="seconds for a run; default: %(default)g"
    )
    parser.add_argument(
        "--records", type=_positive, default=1, metavar="N", help="records to leave out; default: %(default)s"
    )
    parser.add_argument("--strict", action="store_true", help="exit with 1 if there are warnings")
    parser.add_argument("--epochs", type=float, metavar="E", help="passes that the script makes, for its budget")
    parser.add_argument("--delta", type=float, help="for its budget; default: a power of ten below 1 / samples")
    parser.add_argument("--read-only", type=Path, nargs="+", default=[], metavar="PATH", help="linked, not copied")
    parser.add_argument(
        "--writable", type=Path, nargs="+", default=[], metavar="DIR", help="where the script may write"
    )
    parser.add_argument(
        "--copy-limit", type=_positive, default=1024, metavar="MB", help="of the folder; default: %(default)s"
    )
    parser.add_argument(
        "--input", action="append", default=[], metavar="SHAPE", help="of a model's argument: 4,3,32,32"
    )
    parser.add_argument("--input-dtype", action="append", default=[], metavar="TYPE", help="float (default), long, ...")
    parser.add_argument("--json", metavar="FILE", help="write everything as JSON; - for the terminal")
    parser.add_argument("--sarif", metavar="FILE", help="write the findings as SARIF 2.1.0; - for the terminal")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the report as a page")
    parser.set_defaults(run=_run, takes_rest=True)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


def _run(options: argparse.Namespace) -> int:
    found = _model(options) if FACTORY.fullmatch(options.target) else _script(options)
    code = found.exit_code(strict=options.strict)
    if "-" not in (options.json, options.sarif):
        print(words(found, epochs=options.epochs, delta=options.delta))
    _write(options.json, found.as_dict() | {"exit_code": code})
    _write(options.sarif, sarif(found, Path.cwd(), code))
    if options.html is not None:
        if found.report is None:
            print(f"dpfix check: there is no report, and {options.html} is not written", file=sys.stderr)
        else:
            options.html.write_text(found.report.to_html(), encoding="utf-8")
    return code


def _script(options: argparse.Namespace) -> CheckResult:
    if options.input:
        raise ArgumentError(
            f"--input says how a model is called, and {options.target} is a script.",
            help="Leave it out, or pass module:factory.",
            path="--input",
        )
    cwd = Path.cwd()
    workplace = Workplace(
        cwd / options.target, cwd, tuple(cwd / path for path in options.read_only), options.copy_limit << 20
    )
    writable = tuple(str(cwd / path) for path in options.writable)
    asked = Asked(workplace, tuple(options.rest), options.steps, options.timeout, options.records, writable)
    with progress("dpfix check") as say:
        return check_script(asked, say)


def _model(options: argparse.Namespace) -> CheckResult:
    if not options.input:
        raise ArgumentError(
            f"{options.target} is a model, and it is not known what it is called with.",
            help="Pass --input with the shape of a batch, 4,3,32,32 say, once for every argument.",
            path="--input",
        )
    with progress("dpfix check: the audit of a model"):
        return check_model(options.target, options.input, options.input_dtype)


def _write(file: str | None, content: dict[str, Any]) -> None:
    if file is None:
        return
    text = json.dumps(content, indent=2)
    if file == "-":
        print(text)
    else:
        Path(file).write_text(text + "\n")
