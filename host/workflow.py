"""Workflow files: from the front end's save format to the host's API format, with overrides.

The conversion is comfy-cli's (GPL-3), the official one outside a browser: a tool beside the product, used by the demo
and the tests, never by the pack.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..lookahead.files.atomic import first_line
from ..tools.common import Problem

Api = dict[str, dict[str, Any]]


def load(path: Path) -> dict[str, Any]:
    """Read a workflow file, in either format."""
    try:
        workflow = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise Problem(f"the workflow {path} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise Problem(f"the workflow {path} is not JSON ({first_line(error)}): export it again from ComfyUI.") from None
    if not isinstance(workflow, dict) or not (isinstance(workflow.get("nodes"), list) or is_api(workflow)):
        raise Problem(f"{path} is no ComfyUI workflow: it has neither a list of nodes nor nodes by id.")
    for node_id, node in workflow.items() if is_api(workflow) else ():
        if not (isinstance(node["class_type"], str) and isinstance(node.get("inputs"), dict)) or not isinstance(
            node.get("_meta") or {}, dict
        ):
            raise Problem(
                f"node {ascii(node_id)[:40]} of the workflow {path} is damaged: a node has a class_type, which is a "
                "text, and inputs by name; export it again from ComfyUI."
            )
    return workflow


def is_api(workflow: dict[str, Any]) -> bool:
    """Says whether a workflow is in the API format already."""
    return bool(workflow) and all(isinstance(node, dict) and "class_type" in node for node in workflow.values())


def to_api(workflow: dict[str, Any], object_info: dict[str, Any]) -> Api:
    """The API format of a workflow. `object_info` is what the host that shall run it answers to GET /object_info."""
    if not is_api(workflow):
        os.environ["DO_NOT_TRACK"] = "1"
        from comfy_cli.workflow_to_api import WorkflowConversionError, convert_ui_to_api

        try:
            workflow = convert_ui_to_api(workflow, object_info)
        except WorkflowConversionError as error:
            raise Problem(
                f"the workflow cannot be converted ({first_line(error)}): export it again from ComfyUI."
            ) from None
        except Exception as error:
            # The converter believes in what a file says, as in a node that is null or a subgraph in itself.
            raise Problem(
                f"the workflow cannot be converted ({type(error).__name__}: {first_line(error)}): it is damaged; "
                "export it again from ComfyUI."
            ) from error
    if any(not isinstance(node["class_type"], str) for node in workflow.values()):
        raise Problem("a node of the workflow has no class: it is damaged; export it again from ComfyUI.")
    unknown = sorted({node["class_type"] for node in workflow.values()} - set(object_info))
    if unknown:
        names = ", ".join(name if name.isprintable() else ascii(name) for name in unknown)
        raise Problem(f"the host does not know the node {names[:500]}: is the pack it belongs to installed?")
    return workflow


def convert(path: Path, object_info: dict[str, Any]) -> Api:
    """`load` and `to_api` in one."""
    return to_api(load(path), object_info)


def find(api: Api, where: str) -> list[str]:
    """The ids of the nodes with this class type or, if there are none, with this title."""
    by_type = [node_id for node_id, node in api.items() if node["class_type"] == where]
    return by_type or [n for n, node in api.items() if (node.get("_meta") or {}).get("title") == where]


def override(api: Api, where: str, **inputs: Any) -> Api:
    """A copy of a workflow with other values in all nodes of this class type or title.

    An unknown node or input, or one that is connected to another node, is a Problem: an override that does nothing
    would go unnoticed.
    """
    nodes = find(api, where)
    if not nodes:
        names = sorted({node["class_type"] for node in api.values()})
        raise Problem(f"no node of the workflow has the class or title {where!r}: it has {', '.join(names)}.")
    changed = copy.deepcopy(api)
    for node_id in nodes:
        for name, value in inputs.items():
            present = changed[node_id]["inputs"]
            if name not in present:
                raise Problem(f"node {node_id} ({where}) has no input {name!r}: it has {', '.join(sorted(present))}.")
            if _is_link(present[name]):
                raise Problem(
                    f"input {name!r} of node {node_id} ({where}) comes from node {present[name][0]}: override it there."
                )
            present[name] = value
    return changed


def _is_link(value: object) -> bool:
    """Whether an input comes from another node: [its id, the number of its output]."""
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)


def merge(runs: Sequence[Api]) -> tuple[Api, list[dict[str, str]]]:
    """One graph for several runs: what is the same in several of them, with all that it depends on, stands in it once.

    Returns it and, for each run, its ids there by the ids that the nodes had in the run.
    """
    merged: Api = {}
    ids: dict[str, str] = {}  # by what a node is, with its links to nodes of the merged graph
    places: list[dict[str, str]] = []

    def place(api: Api, node_id: str, placed: dict[str, str], above: tuple[str, ...] = ()) -> str:
        if node_id in above:
            raise Problem(f"the node {node_id} of the workflow waits for itself: connect it otherwise.")
        if node_id not in placed:
            node = copy.deepcopy(api[node_id])
            for name, value in node["inputs"].items():
                if _is_link(value) and value[0] in api:
                    node["inputs"][name] = [place(api, value[0], placed, (*above, node_id)), value[1]]
            key = json.dumps([node["class_type"], node["inputs"]], sort_keys=True)
            placed[node_id] = ids.setdefault(key, str(len(ids) + 1))
            merged.setdefault(placed[node_id], node)
        return placed[node_id]

    for api in runs:
        places.append({})
        for node_id in api:
            place(api, node_id, places[-1])
    return merged, places
