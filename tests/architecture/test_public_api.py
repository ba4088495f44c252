"""The public API is the recorded one: what ``dpfix`` exports, and the signatures.

After a change that users are told of: ``python -m tests.architecture.test_public_api`` records it anew.
"""

from __future__ import annotations

import difflib
import enum
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dpfix

RECORDED = Path(__file__).with_name("public_api.txt")


def public_api() -> Iterator[str]:
    """A line for every name that ``dpfix`` exports, and below a class one for each of its public members."""
    for name in sorted(dpfix.__all__):
        thing = getattr(dpfix, name)
        if inspect.isclass(thing):
            yield from of_class(name, thing)
        elif callable(thing):
            yield f"def {name}{inspect.signature(thing)}"
        else:
            yield f"{name}: {type(thing).__name__}"


def of_class(name: str, cls: type) -> Iterator[str]:
    """A class with its public bases, its ``__init__``, and the members that it does not have from one of them."""
    bases = ", ".join(base.__name__ for base in cls.__mro__[1:] if base is not object and not private(base))
    yield f"class {name}({bases})"
    if issubclass(cls, enum.Enum):
        yield from (f"    {member.name} = {member.value!r}" for member in cls)
        return
    if own(cls, "__init__", "__new__"):
        yield f"    __init__{inspect.signature(cls)}"
    fields = getattr(cls, "__dataclass_fields__", {})  # stand in the signature
    members = [pair for pair in inspect.getmembers_static(cls) if not pair[0].startswith("_") and pair[0] not in fields]
    yield from (f"    {told(member, value)}" for member, value in members if own(cls, member))


def own(cls: type, *members: str) -> bool:
    """Whether a class has a member by itself, or from a base that users do not know."""
    owner = next(base for base in cls.__mro__ if any(member in vars(base) for member in members))
    return owner is cls or private(owner)


def private(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == "dpfix" and cls.__name__ not in dpfix.__all__


def told(member: str, value: Any) -> str:
    kind = type(value).__name__
    if isinstance(value, (classmethod, staticmethod)):
        return f"@{kind} {member}{inspect.signature(value.__func__)}"
    if inspect.isfunction(value):
        return f"def {member}{inspect.signature(value)}"
    if isinstance(value, property):
        return f"@property {member}" + (" (can be set)" if value.fset else "")
    return f"{member}: {kind}"


def test_public_api_is_the_recorded_one() -> None:
    changes = list(difflib.unified_diff(RECORDED.read_text().splitlines(), list(public_api()), "recorded", "now", n=0))
    assert changes == [], "the public API has changed; if that is wanted: python -m tests.architecture.test_public_api"


if __name__ == "__main__":
    RECORDED.write_text("\n".join(public_api()) + "\n")
