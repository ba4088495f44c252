"""One table has every code, every code is used, and none is given twice."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import dpfix
from dpfix import errors
from dpfix.report import codes
from dpfix.report.codes import CODES, RETIRED
from dpfix.rules import RULES
from dpfix.rules.rule import numbered

SOURCE = Path(dpfix.__file__).parent
TABLE = Path(codes.__file__)
RULED = [rule.code for rule in RULES]


def mentioned(*files: Path) -> list[str]:
    return [code for file in files for code in re.findall(r"DPF\d+", file.read_text())]


def test_the_table_has_every_code_and_every_code_is_used() -> None:
    used = set(mentioned(*(file for file in SOURCE.rglob("*.py") if file != TABLE)))
    assert used == {*CODES, *RULED}


def test_no_code_is_given_twice() -> None:
    given = [*mentioned(TABLE), *RULED]  # the text of the table: a dict keeps only one of two equal keys
    assert sorted(given) == sorted({*CODES, *RETIRED, *RULED})
    assert all(re.fullmatch(r"DPF\d{3}", code) for code in given)


def test_classes_of_errors_have_codes_of_their_own() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.DPFixError)]
    own = [kind.code for kind in kinds]
    assert all("code" in vars(kind) for kind in kinds)
    assert len(set(own)) == len(own) and set(own) <= CODES.keys()
    assert {code for code in CODES if code >= "DPF100"} <= set(own)


@pytest.mark.parametrize("code", ["DPF000", "DPF013", "DPF103"])
def test_a_rule_gets_no_number_that_is_taken(code: str) -> None:
    with pytest.raises(ValueError, match=f"{code} is taken"):
        numbered(**{code: type(RULES[0])})


def test_two_rules_cannot_share_a_number() -> None:
    with pytest.raises(SyntaxError, match="keyword argument repeated"):
        compile("numbered(DPF001=BatchNorm, DPF001=InstanceNorm)", "rules", "eval")
