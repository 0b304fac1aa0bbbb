"""JSON schemas of configurations, by which editors complete and check YAML files.

A file says which is meant by a comment, `# yaml-language-server: $schema=train.schema.json`. The schema knows fields,
types, ranges and descriptions; what fields ask of each other is checked when a file is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .config import Section

_EXTENDS = {
    "type": "string",
    "title": "Extends",
    "description": "another configuration, beside this file or one that comes along; here stands only what differs",
}


def schema_of(kind: type[Section]) -> dict[str, Any]:
    """The schema (draft 7, which every editor knows) of a file with this configuration.

    A field that must be given may stand in the file that is extended: none is asked for in a file that extends one.
    """
    schema = _draft_7(kind.model_json_schema())
    required = schema.pop("required", [])
    for section in schema.get("$defs", {}).values():
        section.pop("required", None)
    schema["properties"] = {"extends": _EXTENDS, **schema["properties"]}
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        **schema,
        "if": {"required": ["extends"]},
        "else": {"required": required},
    }


def _draft_7(value: Any) -> Any:
    """The same with tuples as that draft writes them, and references that have something beside them in an allOf."""
    if isinstance(value, list):
        return [_draft_7(each) for each in value]
    if not isinstance(value, Mapping):
        return value
    out = {key: _draft_7(each) for key, each in value.items()}
    if "prefixItems" in out:
        out["items"] = out.pop("prefixItems")
    if "$ref" in out and len(out) > 1:
        out = {"allOf": [{"$ref": out.pop("$ref")}], **out}
    return out
