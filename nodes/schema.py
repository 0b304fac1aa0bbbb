"""What differs between the supported hosts (0.16.3 and later), found by looking, never by version number."""

from __future__ import annotations

import dataclasses
from typing import Any

from comfy_api.latest import io


def schema(**fields: Any) -> io.Schema:
    """An `io.Schema` without the fields that this host does not know yet."""
    known = {field.name for field in dataclasses.fields(io.Schema)}
    return io.Schema(**{name: value for name, value in fields.items() if name in known})
