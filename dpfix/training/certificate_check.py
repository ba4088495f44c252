"""What of a certificate does not fit: its seal, what it says twice, and the epsilon that follows from its releases."""

from __future__ import annotations

import hmac
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpfix.errors import ArgumentError
from dpfix.report.finding import Finding
from dpfix.scan.values import shown
from dpfix.training.certificate import FORMAT, INFINITE, NO_NUMBER, digest_of, hmac_of, legal_key, package_hash
from dpfix.training.epsilon import Accuracy, Entry, answer
from dpfix.training.pld_accountant import ACCOUNTANTS, new_accountant

MOST_BYTES = 64 * 2**20
"""Of a file that is read."""
MOST_STRETCHES = 100_000
"""Of a schedule that is added up."""
ROUNDING, SMALLEST = 0.01, 0.001
"""By how much epsilon may differ, relatively and at least: accountants are rounded, and differ from version to version."""


@dataclass(frozen=True)
class CertificateCheck:
    """What came of checking a certificate.

    Attributes:
        findings: what does not fit; empty if all of it fits.
        notes: what was compared, and what this cannot say.
    """

    findings: tuple[Finding, ...]
    notes: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether nothing was found."""
        return not self.findings

    def __str__(self) -> str:
        head = "the certificate fits" if self.fits else f"the certificate does not fit: {len(self.findings)} finding(s)"
        return "\n".join([head, *(f"  {line}" for f in self.findings for line in str(f).splitlines()), *self._noted()])

    def _noted(self) -> list[str]:
        return [f"  note: {note}" for note in self.notes]


def verify_certificate(
    certificate: str | os.PathLike[str] | Mapping[str, Any], key: bytes | str | None = None
) -> CertificateCheck:
    """Say what of a certificate does not fit.

    The digest finds a change that was made by accident, or by somebody who did not compute it anew. With the key that it was
    sealed with, every change is found. What was claimed when it was made is not proven by it: whoever made it could write
    anything.

    Args:
        certificate: a file of :meth:`PrivateTraining.certificate`, or what that returned.
        key: the key that it was sealed with, if there is one.

    Returns:
        What does not fit, and what was compared.

    Raises:
        ArgumentError: there is no such file, or the key cannot be used.
    """
    secret = None if key is None else legal_key(key)
    try:
        content = certificate if isinstance(certificate, Mapping) else _read(certificate)
        rest = {name: value for name, value in content.items() if name != "seal"}
        found, notes = list(_sealed(content.get("seal"), rest, secret)), _notes(content, secret)
        found += _inside(rest, notes)
    except ArgumentError:  # which is a ValueError
        raise
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError, RecursionError) as error:
        why = f"{type(error).__name__}: {error}"[:200]
        return CertificateCheck((_misfit("it cannot be read as a certificate.", why),), ())
    return CertificateCheck(tuple(found), tuple(notes))


def _misfit(fact: str, why: str, path: str = "certificate") -> Finding:
    return Finding.refusal(
        "DPF051", fact, why, "do not rely on it; ask whoever trained the model for the original.", path=path
    )


def _read(path: Any) -> dict[str, Any]:
    try:
        file = Path(path)
        if file.stat().st_size > MOST_BYTES or not file.is_file():  # a pipe would be waited for
            raise ValueError(f"{file.name} is no file of less than {MOST_BYTES} bytes")
        text = file.read_text(encoding="utf-8")
    except (OSError, TypeError) as error:
        raise ArgumentError(
            f"certificate={shown(path)} cannot be opened: {error}.",
            help="Pass the file that private.certificate(delta, path) has written.",
            path="certificate",
        ) from error
    found = json.loads(text, object_pairs_hook=_without_repeats, parse_constant=_no_constant)
    if not isinstance(found, dict):
        raise ValueError("it is no JSON object")
    return found


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):  # one reader would take the first, another the last
        raise ValueError("a name stands twice in one object")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _sealed(seal: Any, rest: Mapping[str, Any], key: bytes | None) -> Iterator[Finding]:
    if not isinstance(seal, Mapping) or not _same(seal.get("sha256"), digest_of(rest)):
        why = "something was changed after it was made, or the file is damaged."
        yield _misfit("its digest is not that of its content.", why, "seal.sha256")
    if key is None:
        return
    if not isinstance(seal, Mapping) or "hmac-sha256" not in seal:
        yield _misfit("it is not sealed with a key.", "a key was given, so a seal was expected.", "seal.hmac-sha256")
    elif not _same(seal["hmac-sha256"], hmac_of(rest, key)):
        why = "it was changed, or sealed with another key."
        yield _misfit("its seal was not made with this key.", why, "seal.hmac-sha256")


def _same(found: Any, wanted: str) -> bool:
    return isinstance(found, str) and hmac.compare_digest(found.encode(), wanted.encode())


def _notes(content: Mapping[str, Any], key: bytes | None) -> list[str]:
    notes = []
    if key is None:
        notes.append("no key was used: whoever changes a certificate can compute its digest anew")
        if "hmac-sha256" in content.get("seal", {}):
            notes.append("it is sealed with a key; whoever has the key can pass it to check the seal")
    package = content["dpfix"]["code"]["package"]
    if package != package_hash():
        notes.append("the dpfix that is installed here has other files than the one that trained")
    notes.append("what it says was said by whoever made it; checking does not show that the training took place")
    return notes


def _inside(content: Mapping[str, Any], notes: list[str]) -> Iterator[Finding]:
    """What contradicts itself: two texts for one thing, or an epsilon below what the releases cost."""
    own, loss = content["dpfix"], content["deployment"]["privacy_loss"]
    if own["format"] != FORMAT:
        notes.append(
            f"it has format {shown(own['format'])}, this version reads {FORMAT}; its numbers were not compared"
        )
        return
    statement = own["statement"]
    told = {
        "epsilon": (loss["privacy_parameters"]["epsilon"], statement["epsilon"]),
        "delta": (loss["privacy_parameters"]["delta"], statement["delta"]),
        "the unit": (loss["privacy_unit"], statement["unit"]),
    }
    for name, (one, other) in told.items():
        if one != other:
            yield _misfit(
                f"it gives {name} twice, as {shown(one)} and as {shown(other)}.", "only one can be right.", name
            )
    yield from _epsilon(statement, notes)


def _epsilon(statement: Mapping[str, Any], notes: list[str]) -> Iterator[Finding]:
    history = [_entry(row) for row in statement["schedule"][: MOST_STRETCHES + 1]]
    steps = sum(times for *_, times in history)
    if steps != statement["steps"]:
        why = "the schedule is what epsilon is computed from."
        yield _misfit(
            f"its schedule has {steps} releases, and it speaks of {shown(statement['steps'])}.", why, "schedule"
        )
    name, delta = statement["accountant"], float(statement["delta"])
    if name not in ACCOUNTANTS or len(history) > MOST_STRETCHES or not 0 < delta < 1:
        yield _misfit(
            f"epsilon by {shown(name)} at delta {shown(delta)} cannot be computed.", "no accountant does.", "accountant"
        )
        return
    try:
        accountant: Any = new_accountant(name)
    except ArgumentError as error:
        notes.append(f"epsilon was not computed again: {error}")
        return
    accountant.history = history
    computed, claimed = answer(accountant, delta, Accuracy())[0].epsilon, _number(statement["epsilon"])
    if not computed <= claimed * (1 + ROUNDING) + SMALLEST:
        why = "the accountant adds up the schedule, and comes to more."
        yield _misfit(f"it claims epsilon {claimed:.4g}; its {steps} releases cost {computed:.4g}.", why, "epsilon")
    else:
        notes.append(f"epsilon follows from its {steps} releases: {computed:.4g}, computed again")


def _entry(row: Mapping[str, Any]) -> Entry:
    given, rate, times = row["noise_multiplier"], _number(row["sampling_rate"]), row["steps"]
    noise = 0.0 if given == NO_NUMBER else _number(given)
    if type(times) is not int or times < 1 or not noise >= 0 or not 0 < rate <= 1:
        raise ValueError(f"{times!r} releases with noise {noise!r} and rate {rate!r}")
    return noise, rate, times


def _number(value: Any) -> float:
    if value == INFINITE:
        return math.inf
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{shown(value)} is no number")
    return float(value)
