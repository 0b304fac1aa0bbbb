"""Presets that take the place of a node's numbers: the page is told of them, so that it shows what acts.

On choosing a preset `web/lookahead.js` writes its numbers into the node's fields, and a field that is changed by hand
leaves the preset. What a file holds stays; a graph without the page acts by the preset, whatever its numbers are.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from comfy_api.latest import io

AS_SET = "as set below"  # no preset: the node's own numbers


def told_to_the_page(
    numbers: Mapping[str, Mapping[str, Any]], beyond: Mapping[str, Sequence[str]] | None = None
) -> dict[str, Any]:
    """Gives the further fields of a preset's input, for `extra_dict`.

    numbers: of each preset the values that stand for it, by the names of the node's inputs; beyond: what a preset has
    beside them, in words, which is lost when it is left.
    """
    return {
        "lookahead_presets": {name: dict(values) for name, values in numbers.items()},
        "lookahead_beyond": {name: ", ".join(words) for name, words in (beyond or {}).items() if words},
    }


def preset_input(numbers: Mapping[str, Mapping[str, Any]], tooltip: str) -> io.Input:
    """The input by which a preset is chosen. Files keep values by place, so in a node that has had others it stands
    last; files from before it mean their numbers."""
    options = [AS_SET, *numbers]
    more = told_to_the_page(numbers)
    return io.Combo.Input("preset", options=options, default=AS_SET, optional=True, extra_dict=more, tooltip=tooltip)


def acting(node: str, preset: str, presets: Mapping[str, Mapping[str, float]], own: Mapping[str, float]) -> list[float]:
    """The numbers by which a node acts: those of its preset, and without one its own."""
    if preset not in presets:
        return list(own.values())
    log_ignored(node, preset, presets[preset], own)
    return [presets[preset][name] for name in own]


def log_ignored(node: str, preset: str, numbers: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Logs which fields of a node say otherwise than its preset, by which it acts.

    So it is in files from before the page wrote them, in graphs made without the page, and where a subgraph shows the
    preset outside and the fields inside.
    """
    ignored = [f"{name} {value} (not {given[name]})" for name, value in numbers.items() if given[name] != value]
    if ignored:
        logging.info("[LCM-Lookahead] %s acts by its preset %s: %s.", node, preset, ", ".join(ignored))
