"""The certificate of a training: statement, plan, proofs, versions and hashes of the code, as JSON that can be checked later.

What the registry of deployments asks for has its names there, after the template for entries of
https://github.com/opendp/deployments-registry-data (``tests/good_deployments/template.yaml``; its schema still changes, and what
only people can say is left to them). Everything else stands under ``dpfix``, and the seal over both under ``seal``.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, fields, is_dataclass
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import Any

from dpfix.errors import ArgumentError
from dpfix.plan import Plan
from dpfix.report.report import Report
from dpfix.report.statement import PrivacyStatement
from dpfix.scan.values import shown
from dpfix.weights.files import written_whole

FORMAT = 1
INFINITE, NO_NUMBER = "infinity", "nan"
"""How an infinite epsilon, and a noise that is no number, are written; JSON has neither."""
SHORTEST_KEY = 16
"""Bytes of a key; a shorter one can be found by trying."""
PACKAGE = Path(__file__).parents[1]
PARTS = (".py", ".html", ".css")
"""Endings of the files that are the package."""


def certificate_of(statement: PrivacyStatement, plan: Plan, report: Report) -> dict[str, Any]:
    """What a certificate says, without its seal.

    Args:
        statement: for the steps that were made.
        plan: how the model is trained.
        report: of the call.

    Returns:
        Values that JSON has.
    """
    own = {
        "format": FORMAT,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": report.model,
        "statement": asdict(statement),
        "plan": {"engine": plan.engine, "sha256": plan_hash(plan)},
        "proofs": [asdict(proof) for proof in report.proofs],
        "engines": [asdict(evidence) for evidence in report.evidence],
        "findings": [{"code": f.code, "path": f.path, "fixability": f.fixability.value} for f in report.findings],
        "settings": dict(report.settings),
        "versions": dict(report.versions),
        "code": {"package": package_hash(), "script": script_hash()},
    }
    return plain({"deployment": deployment_of(statement), "dpfix": own})


def deployment_of(statement: PrivacyStatement) -> dict[str, Any]:
    """What the registry asks for and a training knows, under the registry's names."""
    return {
        "basic": {"data_product_type": "Machine learning model"},
        "dp_variant": {
            "variant_name": "Approximate DP",
            "unprotected_quantities": "; ".join(statement.not_covered),
        },
        "privacy_loss": {
            "privacy_unit": statement.unit,
            "privacy_unit_details": statement.adjacency,
            "number_of_privacy_units": 1,
            "privacy_parameters": {"epsilon": statement.epsilon, "delta": statement.delta},
            "privacy_parameters_details": "; ".join((
                f"accountant {statement.accountant}, sampling assumed: {statement.sampling_assumed}",
                *statement.cautions,
            )),
        },
        "deployment_model": {"model_name": "Central"},
        "implementation": {
            "mechanisms": (
                f"DP-SGD: gradients of single {statement.counted} clipped ({statement.clipping}, clip norm "
                f"{statement.max_grad_norm}), summed, with Gaussian noise of {statement.noise_multiplier:g} times the clip norm"
            ),
            "composition": f"{statement.steps} releases, added up by the accountant {statement.accountant}",
        },
    }


# ------------------------------------------------------------------ the seal


def sealed(content: dict[str, Any], key: bytes | str | None) -> dict[str, Any]:
    """A certificate with its seal.

    Args:
        content: all of it but the seal.
        key: whoever has it can tell a certificate that was made with it from any other.

    Returns:
        The certificate.
    """
    seal = {"sha256": digest_of(content)}
    if key is not None:
        seal["hmac-sha256"] = hmac_of(content, legal_key(key))
    return {**content, "seal": seal}


def digest_of(content: Any) -> str:
    """SHA-256 of a certificate without its seal."""
    return hashlib.sha256(canonical(content)).hexdigest()


def hmac_of(content: Any, key: bytes) -> str:
    """HMAC-SHA-256 (RFC 2104) of a certificate without its seal."""
    return hmac.new(key, canonical(content), hashlib.sha256).hexdigest()


def legal_key(key: Any) -> bytes:
    """A key as bytes.

    Returns:
        The bytes.

    Raises:
        ArgumentError: it is none, or too short.
    """
    found = key.encode() if isinstance(key, str) else key
    if not isinstance(found, (bytes, bytearray)) or len(found) < SHORTEST_KEY:
        what = f"{len(found)} bytes" if isinstance(found, (bytes, bytearray)) else f"a {type(key).__name__}"
        raise ArgumentError(
            f"key is {what}; at least {SHORTEST_KEY} bytes are needed.",
            "A shorter key can be found by trying, and then a forged certificate looks like a true one.",
            "Make one with secrets.token_bytes(32), and keep it apart from the certificates.",
            path="key",
        )
    return bytes(found)


def canonical(content: Any) -> bytes:
    """The one way to write values as JSON: keys in order, no spaces, ASCII, no number that JSON lacks.

    Returns:
        The text.

    Raises:
        ValueError: a number is infinite or none.
    """
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def write(certificate: dict[str, Any], path: Any) -> None:
    """Write a certificate to a file, whole or not at all.

    Raises:
        ArgumentError: it cannot be written.
    """
    try:
        with written_whole(path) as file:
            file.write((json.dumps(certificate, indent=2, sort_keys=True, allow_nan=False) + "\n").encode())
    except (OSError, TypeError, ValueError) as error:
        raise ArgumentError(
            f"the certificate could not be written to path={shown(path)}: {type(error).__name__}: {error}",
            "An earlier file of that name is as it was.",
            "Pass a file name in a folder that can be written to.",
            path="path",
        ) from error


# ------------------------------------------------------------------ plain values and hashes


def plain(value: Any) -> Any:
    """Values that JSON has: an infinite number becomes a word, what is unknown its class."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, Enum):
        return plain(value.value)
    if isinstance(value, float):
        return value if math.isfinite(value) else (INFINITE if value > 0 else NO_NUMBER)
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value) if f.compare}
    if isinstance(value, dict):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    kind = value if isinstance(value, type) else type(value)
    return f"{kind.__module__}.{getattr(value, '__qualname__', kind.__qualname__)}"


def plan_hash(plan: Plan) -> str:
    """SHA-256 of a plan: the same for the same model, calls and options, in every run."""
    return digest_of(plain(plan))


def package_hash() -> str | None:
    """SHA-256 over names and contents of the package's own files; ``None`` if they cannot be read."""
    found = hashlib.sha256()
    try:
        for file in sorted(_files(), key=lambda file: file.relative_to(PACKAGE).as_posix()):
            content = file.read_bytes()
            found.update(f"{file.relative_to(PACKAGE).as_posix()}\0{len(content)}\0".encode())
            found.update(content)
    except OSError:
        return None
    return found.hexdigest()


def _files() -> Iterator[Path]:
    return (file for file in PACKAGE.rglob("*") if file.suffix in PARTS and file.is_file())


def script_hash() -> dict[str, str] | None:
    """Name and SHA-256 of the file that Python was started with; ``None`` in a notebook or a prompt."""
    name = getattr(sys.modules.get("__main__"), "__file__", None)
    if not isinstance(name, (str, os.PathLike)):
        return None
    try:
        return {"name": Path(name).name, "sha256": hashlib.sha256(Path(name).read_bytes()).hexdigest()}
    except OSError:
        return None
