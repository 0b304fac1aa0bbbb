"""Nodes that were renamed: the host puts the new one in the old one's place in every graph, and the page offers it.

Hosts since 0.14 do that (0.16.3 and 0.30.0 alike). It asks for ids alone: where a node keeps its id and an input gets
another name, the node accepts the old one beside the new, since no host replaces a node that it knows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from comfy_api import latest


@dataclass(frozen=True)
class Renamed:
    """A node under its old id and its new one.

    inputs: new names by the old, of those that go along (one that kept its name too); values: of inputs that the old
    node did not have; widgets: the old names of its widgets, in the order in which workflow files list their values.
    Outputs keep their places: one that is new comes last.
    """

    old: str
    new: str
    inputs: Mapping[str, str] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)
    widgets: Sequence[str] = ()


#: A line for every node of ours that was renamed since 0.1.0. A line stays as long as there are files with the old id.
RENAMED: tuple[Renamed, ...] = ()


async def register_replacements(renamed: Iterable[Renamed] = RENAMED) -> None:
    """Tell the host of renamed nodes; does nothing on a host that has no such hook."""
    replace = getattr(latest.io, "NodeReplace", None)
    hook = getattr(latest.ComfyAPI(), "node_replacement", None)
    if replace is None or hook is None:
        return
    for one in renamed:
        mapping = [{"new_id": new, "old_id": old} for old, new in one.inputs.items()]
        mapping += [{"new_id": new, "set_value": value} for new, value in one.values.items()]
        await hook.register(
            replace(one.new, one.old, old_widget_ids=list(one.widgets), input_mapping=mapping, output_mapping=None)
        )
