"""Workflow files become API prompts, and overrides reach what they name or say that they do not."""

import json
from pathlib import Path

import pytest
from lcm_lookahead.host import workflow
from lcm_lookahead.tools.common import Problem

OBJECT_INFO = {
    "EmptyLatentImage": {
        "input": {"required": {"width": ["INT", {"default": 512}], "height": ["INT", {}], "batch_size": ["INT", {}]}},
        "input_order": {"required": ["width", "height", "batch_size"]},
        "output": ["LATENT"],
        "output_name": ["LATENT"],
    },
    "KSampler": {
        "input": {
            "required": {
                "latent_image": ["LATENT", {}],
                "seed": ["INT", {"control_after_generate": True}],
                "steps": ["INT", {}],
            }
        },
        "input_order": {"required": ["latent_image", "seed", "steps"]},
        "output": ["LATENT"],
        "output_name": ["LATENT"],
    },
    "Save": {
        "input": {"required": {"samples": ["LATENT", {}]}},
        "input_order": {"required": ["samples"]},
        "output": [],
        "output_name": [],
        "output_node": True,
    },
}


def saved(sampler_mode: int = 0) -> dict:
    """A graph as the front end saves it: a latent, a sampler (with its seed's control widget), an output, a note."""

    def slot(name, link):
        return {"name": name, "type": "LATENT", "link": link}

    def output(*links):
        return [{"name": "LATENT", "type": "LATENT", "links": list(links)}]

    return {
        "nodes": [
            {
                "id": 4,
                "type": "EmptyLatentImage",
                "mode": 0,
                "inputs": [],
                "outputs": output(1),
                "widgets_values": [1024, 768, 1],
                "title": "Size",
            },
            {
                "id": 5,
                "type": "KSampler",
                "mode": sampler_mode,
                "inputs": [slot("latent_image", 1)],
                "outputs": output(2),
                "widgets_values": [7, "randomize", 30],
            },
            {"id": 6, "type": "Save", "mode": 0, "inputs": [slot("samples", 2)], "outputs": [], "widgets_values": []},
            {"id": 9, "type": "MarkdownNote", "mode": 0, "inputs": [], "outputs": [], "widgets_values": ["hello"]},
        ],
        "links": [[1, 4, 0, 5, 0, "LATENT"], [2, 5, 0, 6, 0, "LATENT"]],
        "version": 0.4,
    }


@pytest.fixture
def api():
    return workflow.to_api(saved(), OBJECT_INFO)


def test_a_saved_graph_becomes_a_prompt(api):
    assert {node_id: node["class_type"] for node_id, node in api.items()} == {
        "4": "EmptyLatentImage",
        "5": "KSampler",
        "6": "Save",
    }
    assert api["4"]["inputs"] == {"width": 1024, "height": 768, "batch_size": 1}
    assert api["5"]["inputs"] == {"latent_image": ["4", 0], "seed": 7, "steps": 30}
    assert api["6"]["inputs"] == {"samples": ["5", 0]}


def test_a_bypassed_node_is_left_out_and_its_input_passes_through():
    api = workflow.to_api(saved(sampler_mode=4), OBJECT_INFO)
    assert "5" not in api and api["6"]["inputs"] == {"samples": ["4", 0]}


def test_a_prompt_stays_as_it_is(api):
    assert workflow.to_api(api, OBJECT_INFO) == api


def test_a_node_that_the_host_lacks_is_named(api):
    with pytest.raises(Problem, match="does not know the node KSampler"):
        workflow.to_api(api, {name: info for name, info in OBJECT_INFO.items() if name != "KSampler"})


def test_an_override_changes_a_copy(api):
    changed = workflow.override(api, "KSampler", seed=3, steps=4)
    assert changed["5"]["inputs"] == {"latent_image": ["4", 0], "seed": 3, "steps": 4}
    assert api["5"]["inputs"]["seed"] == 7


def test_an_override_finds_a_node_by_its_title(api):
    assert workflow.override(api, "Size", width=128)["4"]["inputs"]["width"] == 128


@pytest.mark.parametrize(
    ("where", "inputs", "said"),
    [
        ("LoadImage", {"image": "a.png"}, "no node of the workflow has the class or title 'LoadImage'"),
        ("KSampler", {"step": 3}, "has no input 'step': it has latent_image, seed, steps"),
        ("KSampler", {"latent_image": 3}, "comes from node 4"),
    ],
)
def test_an_override_that_would_do_nothing_is_a_problem(api, where, inputs, said):
    with pytest.raises(Problem) as caught:
        workflow.override(api, where, **inputs)
    assert said in str(caught.value)


@pytest.mark.parametrize(("text", "said"), [("{", "not JSON"), ("[]", "no ComfyUI workflow"), ("{}", "no ComfyUI")])
def test_a_file_that_is_no_workflow_is_refused(tmp_path, text, said):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(Problem, match=said):
        workflow.load(tmp_path / "a.json")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(Problem, match="cannot be read"):
        workflow.load(tmp_path / "none.json")


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).resolve().parents[2] / "workflows").glob("*.json")), ids=lambda p: p.name
)
def test_every_workflow_of_ours_has_a_thumbnail_and_whole_links(path):
    graph = json.loads(path.read_text())
    ids = {node["id"] for node in graph["nodes"]}
    assert all(link[1] in ids and link[3] in ids for link in graph["links"])
    assert path.with_suffix(".jpg").is_file()


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).resolve().parents[2] / "workflows").glob("*.json")), ids=lambda p: p.name
)
def test_each_group_of_ours_holds_whole_nodes_and_no_two_meet(path):
    graph = json.loads(path.read_text())
    title = 30  # of a node, above its place
    boxes = [
        (*node["pos"], *(a + b for a, b in zip(node["pos"], node["size"], strict=True))) for node in graph["nodes"]
    ]
    frames = [(x, y, x + width, y + height) for x, y, width, height in (g["bounding"] for g in graph["groups"])]
    for left, top, right, bottom in frames:
        within = [left <= a and top + 20 <= b - title and c <= right and d <= bottom for a, b, c, d in boxes]
        outside = [c <= left or right <= a or d <= top or bottom <= b - title for a, b, c, d in boxes]
        assert any(within) and all(one != other for one, other in zip(within, outside, strict=True))
    for n, (a, b, c, d) in enumerate(frames):
        assert all(c <= e or g <= a or d <= f or h <= b for e, f, g, h in frames[n + 1 :])


def test_workflows_frame_who_is_drawn_what_is_asked_for_and_what_comes_of_it():
    path = Path(__file__).resolve().parents[2] / "workflows" / "04 Two people in one picture.json"
    titles = [group["title"] for group in json.loads(path.read_text())["groups"]]
    assert titles == ["Reference", "Prompt", "Result"]


def test_merged_runs_share_what_is_the_same_in_them_and_nothing_else():
    def run(text, seed):
        return {
            "9": {"class_type": "Save", "inputs": {"images": ["3", 0]}},
            "1": {"class_type": "Load", "inputs": {"name": "a"}},
            "2": {"class_type": "Text", "inputs": {"clip": ["1", 1], "text": text}},
            "3": {"class_type": "Draw", "inputs": {"model": ["1", 0], "positive": ["2", 0], "seed": seed}},
        }

    runs = [run("x", 1), run("y", 1), run("x", 2)]
    merged, ids = workflow.merge(runs)
    assert sorted(node["class_type"] for node in merged.values()) == [
        *["Draw"] * 3,
        "Load",
        *["Save"] * 3,
        *["Text"] * 2,
    ]
    for api, places in zip(runs, ids, strict=True):
        for old, new in places.items():
            linked = {k: [places[v[0]], v[1]] if isinstance(v, list) else v for k, v in api[old]["inputs"].items()}
            assert merged[new] == {"class_type": api[old]["class_type"], "inputs": linked}
    assert len({places["9"] for places in ids}) == 3 and len({places["1"] for places in ids}) == 1
    assert runs[0] == run("x", 1)
