"""YAML whose mappings hold each key once: of two, PyYAML takes the last and leaves the first out without a word."""

from __future__ import annotations

from typing import Any

import yaml


class DuplicateKeyError(ValueError):
    """Names a key that a mapping holds twice, and its lines."""


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                line = key.start_mark.line + 1
                if key.value in lines:
                    raise DuplicateKeyError(f"{key.value} is there twice, in lines {lines[key.value]} and {line}")
                lines[key.value] = line
        return super().construct_mapping(node, deep)


def load_yaml(text: str) -> Any:
    """The plain values of a YAML text. Raises DuplicateKeyError, and yaml.YAMLError for what is none."""
    return yaml.load(text, _Loader)
