"""`make page`: what it puts into ComfyUI's base directory."""

import json

import pytest
from lcm_lookahead.host.workflow import load
from lcm_lookahead.mini import page

PATHS = [path for path in sorted(page.WORKFLOWS.glob("*.json")) if "nodes" in load(path)]


def nodes(workflow, kind):
    graphs = [workflow, *workflow.get("definitions", {}).get("subgraphs", [])]
    return [node for graph in graphs for node in graph["nodes"] if node["type"] == kind]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_workflow_at_mini_size_says_so_and_is_else_the_same(path):
    before = load(path)
    after = page.at_mini_size(before)
    assert before == load(path)  # which is left as it was
    latents = nodes(after, "EmptyLatentImage")
    assert all(node["widgets_values"][:2] == [128, 128] for node in latents)
    assert all(node["widgets_values"][1:3] == [128, 128] for node in nodes(after, "ImageScale"))
    prompts = [
        n["widgets_values"][0] for n in nodes(after, "CLIPTextEncode") if n.get("title", "").startswith("Prompt")
    ]
    assert set(prompts) <= {"a photo of a face on a beach"}
    steps = [node["widgets_values"][1] for node in nodes(after, "BasicScheduler")]
    steps += [node["widgets_values"][2] for kind in ("KSampler", "LookaheadPreviewGrid") for node in nodes(after, kind)]
    assert all(n <= 20 for n in steps)
    encoders = {node["widgets_values"][0] for node in nodes(after, "LookaheadLoadEncoder")}
    assert page.STOCK not in encoders
    concept = bool(nodes(after, "LookaheadEncodeConceptPrompt"))
    bases = {node["widgets_values"][0] for node in nodes(after, "CheckpointLoaderSimple")}
    assert bases <= {"mini_things.safetensors" if concept else "sd_xl_base_1.0.safetensors"}
    note = after["nodes"][-1]
    assert note["type"] == "MarkdownNote" and "128x128" in note["widgets_values"][0]
    assert len({node["id"] for node in after["nodes"]}) == len(after["nodes"]) and note["id"] == after["last_node_id"]
    assert note["pos"][1] + note["size"][1] < min(node["pos"][1] for node in before["nodes"])  # covers nothing
    for old, new in zip(before["nodes"], after["nodes"], strict=False):
        assert new == old or new["type"] in page.VALUES or (concept and new["type"] in page.CONCEPT)


def test_models_and_workflows_are_there_and_own_changes_stay(tmp_path):
    page.prepare(tmp_path)
    assert (tmp_path / "models/checkpoints/sd_xl_base_1.0.safetensors").is_file()
    written = tmp_path / page.FOLDER / PATHS[0].name
    assert json.loads(written.read_text()) == page.at_mini_size(load(PATHS[0]))
    written.write_text("mine")
    page.prepare(tmp_path)
    assert written.read_text() == "mine"
