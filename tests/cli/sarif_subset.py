"""The part of SARIF 2.1.0 that the check writes, after the specification (chapter 3); any other property is refused."""

from __future__ import annotations

import re
from typing import Any

Schema = dict[str, Any]


def thing(required: list[str], **properties: Schema) -> Schema:
    return {"kind": dict, "required": required, "properties": properties}


def many(item: Schema) -> Schema:
    return {"kind": list, "item": item}


TEXT: Schema = {"kind": str, "pattern": r"(?s).+"}
URI: Schema = {"kind": str, "pattern": r"[^\s\\]+"}
FLAG: Schema = {"kind": bool}
LEVEL: Schema = {"kind": str, "pattern": "none|note|warning|error"}
KIND: Schema = {"kind": str, "pattern": "notApplicable|pass|fail|review|open|informational"}
INDEX: Schema = {"kind": int, "least": 0}
LINE: Schema = {"kind": int, "least": 1}
MESSAGE = thing(["text"], text=TEXT)  # 3.11
ARTIFACT = thing(["uri"], uri=URI, uriBaseId=TEXT)  # 3.4
PHYSICAL = thing(["artifactLocation"], artifactLocation=ARTIFACT, region=thing(["startLine"], startLine=LINE))  # 3.29
RESULT = thing(  # 3.27
    ["message", "ruleId"],
    ruleId=TEXT,
    ruleIndex=INDEX,
    level=LEVEL,
    kind=KIND,
    message=MESSAGE,
    locations=many(thing(["physicalLocation"], physicalLocation=PHYSICAL)),
)
RULE = thing(["id"], id=TEXT, shortDescription=MESSAGE)  # 3.49
VERSION: Schema = {"kind": str, "pattern": r"\d+\.\d+\.\d+"}
DRIVER = thing(["name"], name=TEXT, semanticVersion=VERSION, rules=many(RULE))  # 3.19
INVOCATION = thing(  # 3.20
    ["executionSuccessful"],
    executionSuccessful=FLAG,
    exitCode={"kind": int, "least": 0},
    toolExecutionNotifications=many(thing(["message"], level=LEVEL, message=MESSAGE)),
)
RUN = thing(  # 3.14
    ["tool", "results"],
    tool=thing(["driver"], driver=DRIVER),
    invocations=many(INVOCATION),
    originalUriBaseIds={"kind": dict, "values": thing(["uri"], uri={"kind": str, "pattern": "file:///.*/"})},
    columnKind={"kind": str, "pattern": "utf16CodeUnits|unicodeCodePoints"},
    results=many(RESULT),
)
LOG: Schema = thing(  # 3.13
    ["version", "runs"], version={"kind": str, "pattern": r"2\.1\.0"}, runs=many(RUN), **{"$schema": URI}
)


def problems(value: Any, schema: Schema = LOG, path: str = "$") -> list[str]:
    """Where a value is not as a schema says."""
    if type(value) is not schema["kind"]:
        return [f"{path}: {type(value).__name__} instead of {schema['kind'].__name__}"]
    if "pattern" in schema and not re.fullmatch(schema["pattern"], value):
        return [f"{path}: {value!r}"]
    if value < schema["least"] if "least" in schema else False:
        return [f"{path}: {value}"]
    if "item" in schema:
        return [p for n, item in enumerate(value) for p in problems(item, schema["item"], f"{path}[{n}]")]
    if "values" in schema:
        return [p for key, item in value.items() for p in problems(item, schema["values"], f"{path}.{key}")]
    found = [f"{path}: {name} is missing" for name in schema.get("required", []) if name not in value]
    for name, item in value.items() if isinstance(value, dict) else ():
        known = schema["properties"].get(name)
        found += [f"{path}: {name} is unknown"] if known is None else problems(item, known, f"{path}.{name}")
    return found
