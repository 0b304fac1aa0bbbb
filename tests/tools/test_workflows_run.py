"""Every shared workflow, in the real host with the shipped weights, at the mini world's size."""

import re
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from lcm_lookahead.host import workflow
from lcm_lookahead.host.graph import Graph
from lcm_lookahead.lookahead.losses import embedding, identity, lpips
from lcm_lookahead.lookahead.vision import arcface, clip, perceptual
from lcm_lookahead.lookahead.vision.face_models import FaceModels
from lcm_lookahead.mini import demo
from lcm_lookahead.mini.files.host_models import mini_host
from lcm_lookahead.mini.plan import WEIGHTS
from lcm_lookahead.mini.studies import drawing
from PIL import Image
from samples import standard_errors

WORKFLOWS = Path(__file__).resolve().parents[2] / "workflows"
FILES = [path for path in sorted(WORKFLOWS.glob("*.json")) if not path.name.endswith(".app.json")]
BOTH = demo.WORKFLOW
(GRID,) = WORKFLOWS.glob("*(preview grid).json")
(CONVERT,) = WORKFLOWS.glob("* Convert *.json")
STEERED = {steering.workflow: steering for steering in demo.STEERED}
GUIDED = [path for path in FILES if path.stem in STEERED]
(TWO,) = WORKFLOWS.glob("* Look ahead for two people *.json")
(BEST,) = WORKFLOWS.glob("* Best of eight.json")
(FILE,) = WORKFLOWS.glob("* A person as a file.json")
(FACE_ID,) = WORKFLOWS.glob("* Face ID *.json")  # the mini world has no such adapter
(CONCEPT,) = WORKFLOWS.glob("* Anything from one picture *.json")
(BLENDS,) = WORKFLOWS.glob("* A concept from a file, *.json")
PLAIN = [path for path in FILES if path not in (GRID, CONVERT, FILE, FACE_ID, BLENDS, *GUIDED)]


def with_pictures(running):
    """A host that has the references as well."""
    names = ["reference_0.png", "reference_1.png"]
    for name, picture in zip(names, demo.draw_references(len(names)), strict=True):
        picture.save(running.folder("input") / name)
    return running


@pytest.fixture(scope="module")
def host(drawing_host):
    return with_pictures(drawing_host)


def draw(host, api, reference, steps=4):
    """The picture of a few steps, of two steps of what is optimised where anything is: [128, 128, 3] from 0 to 255."""
    if workflow.find(api, "LookaheadGuidanceSampler"):
        api = workflow.override(api, "LookaheadGuidanceSampler", preset="as set below", iterations=2)
    for node in workflow.find(api, "LookaheadTuneConcept"):
        api = workflow.override(api, "LookaheadTuneConcept", steps=min(2, api[node]["inputs"]["steps"]), words=2)
    return run(host, api, reference, steps)[0]


def predicted(host, api, reference):
    """The picture of a single step: what the model predicts from the noise, which rounding cannot lead elsewhere."""
    return draw(host, api, reference, steps=1)


def run(host, api, reference, steps=4, seed=5):
    """The same, and all that the nodes put out."""
    pictures, outputs = run_batch(host, api, reference, steps, seed)
    (picture,) = pictures
    return picture, outputs


def run_batch(host, api, reference, steps=4, seed=5):
    """The pictures, and all that the nodes put out."""
    where = next(node for node in ("BasicScheduler", "KSampler", "LookaheadPreviewGrid") if workflow.find(api, node))
    api = workflow.override(demo.at_mini_size(api, reference, seed), where, steps=steps)
    result = host.run(api).check()
    files = [p for p in result.images if p.is_relative_to(host.folder("output"))]
    return [np.asarray(Image.open(p).convert("RGB")).astype(float) for p in files], result.outputs.values()


@pytest.mark.parametrize("path", PLAIN, ids=lambda p: p.stem)
def test_a_workflow_draws_a_picture_that_follows_its_reference(host, path):
    """By the predictions from the same noise under two references. Measured: 6 to 55 of 255 apart. What is drawn has a
    deviation of 39 to 88."""
    api = workflow.convert(path, host.object_info())
    drawn = draw(host, api, "reference_0.png")
    assert drawn.shape == (demo.SIZE, 2 * demo.SIZE + 16 if "Before and after" in path.stem else demo.SIZE, 3)
    one, other = (predicted(host, api, f"reference_{number}.png") for number in range(2))
    assert drawn.std() > 20
    assert abs(one - other).mean() > 3


def test_the_best_of_eight_is_the_picture_that_scores_highest(host):
    api = workflow.override(workflow.convert(BEST, host.object_info()), "LookaheadRank", at_least=-1.0)
    (best,), _ = run_batch(host, api, "reference_0.png")
    drawn, outputs = run_batch(host, workflow.override(api, "LookaheadRank", keep=0), "reference_0.png")
    (ranked,) = [text for out in outputs for text in out.get("text") or [] if text.startswith("best first:")]
    scores = [float(score) for score in re.findall(r"picture \d+: (-?[\d.]+)", ranked)]
    assert len(drawn) == 8 and len(scores) > 1 and scores == sorted(scores, reverse=True)
    assert np.array_equal(best, drawn[0]) and not any(np.array_equal(best, other) for other in drawn[1:])


@pytest.mark.parametrize(
    ("path", "file"),
    [(CONVERT, "lookahead/my_encoder.safetensors"), (FILE, "lookahead_references/my_character.safetensors")],
    ids=["an encoder", "a person"],
)
def test_a_workflow_that_draws_nothing_writes_its_file(host, path, file):
    api = workflow.convert(path, host.object_info())
    for node, inputs in (
        ("LoadImage", {"image": "reference_0.png"}),
        ("LookaheadEncodeReference", {"size": demo.SIZE}),
    ):
        if workflow.find(api, node):
            api = workflow.override(api, node, **inputs)
    host.run(api).check()
    assert (host.folder("models") / file).is_file()


def test_a_concept_that_one_workflow_saves_is_drawn_by_the_next_at_both_blends(host):
    """From the same noise, beside the concept that the mini world ships: another concept, another picture."""
    info = host.object_info()
    saving = workflow.override(workflow.convert(CONCEPT, info), "LookaheadSaveConcept", name="of_one_step")
    draw(host, workflow.override(saving, "LookaheadTuneConcept", steps=1), "reference_0.png", steps=1)
    api = workflow.convert(BLENDS, info)
    shipped = predicted(host, api, "reference_0.png")
    assert shipped.shape == (demo.SIZE, 2 * demo.SIZE + 16, 3)
    file = {"concept_name": "of_one_step.safetensors"}
    saved = predicted(host, workflow.override(api, "LookaheadLoadConcept", **file), "reference_0.png")
    left, right = slice(None, demo.SIZE), slice(-demo.SIZE, None)
    assert all(abs(saved - shipped)[:, part].mean() > 10 for part in (left, right))
    assert all(abs(drawn[:, left] - drawn[:, right]).mean() > 1 for drawn in (saved, shipped))


@pytest.mark.parametrize(("flag", "kind"), [("--fp16-unet", torch.float16), ("--bf16-unet", torch.bfloat16)])
def test_a_base_in_16_bit_draws_the_same_picture(host, flag, kind):
    """By what it predicts from the same noise. Measured: 0.0 and 0.5 of 255 apart, where another reference makes 55."""
    api = workflow.convert(BOTH, host.object_info())
    one, other = (predicted(host, api, f"reference_{number}.png") for number in range(2))
    with mini_host(announce=False, arguments=[flag]) as half:
        drawn = predicted(with_pictures(half), api, "reference_0.png")
        assert f"model weight dtype {kind}" in half.log
    assert abs(drawn - one).mean() < 0.1 * abs(other - one).mean()


def tensor(picture):
    """[H, W, 3] from 0 to 255 -> [1, 3, H, W] from -1 to 1."""
    return torch.from_numpy(np.asarray(picture, dtype=np.float32).copy()).permute(2, 0, 1)[None] / 127.5 - 1


def identity_loss(reference):
    faces = FaceModels(WEIGHTS / "insightface/models/mini", threads=1)
    recogniser = arcface.read(faces.recogniser, faces.preprocessing)
    people = identity.read_references(recogniser, faces, [(reference[0] + 1) / 2], True)
    return identity.IdentityLoss(recogniser, faces, people)


def clip_loss(reference):
    network = clip.CLIPPictures(clip.read(WEIGHTS / "mini_clip/model.safetensors"))
    return embedding.EmbeddingLoss(network, embedding.embed(network, reference))


def lpips_loss(reference):
    return lpips.LPIPSLoss(perceptual.lpips_network("squeeze"), reference)


MEASURES = dict(zip(STEERED, (identity_loss, clip_loss, lpips_loss), strict=True))


def guided(host, path, **settings):
    """A guided workflow with the numbers that the node comes with, whatever the file has, and some others."""
    api = workflow.override(workflow.convert(path, host.object_info()), "CFGGuider", cfg=demo.CFG)
    usual = {"preset": "as set below", "start": 0.12, "lean": 0.0}
    return workflow.override(api, "LookaheadGuidanceSampler", **usual | settings)


def report_of(outputs):
    return "\n".join(text for out in outputs for text in out.get("text") or [])


@pytest.mark.parametrize("path", GUIDED, ids=lambda p: p.stem)
def test_guidance_lowers_the_loss_of_the_preview_that_it_optimises(host, path):
    """The optimiser's own sequence, from one latent and with the LoRA's strength held: it does not hang on what becomes
    of the picture afterwards. Measured: 0.42 -> 0.04, 0.43 -> 0.22 and 0.16 -> 0.11."""
    drawn, outputs = run(host, guided(host, path, iterations=10, jitter=0.0), "reference_0.png", demo.STEPS)
    losses = re.findall(
        r"^step \d+ .*? ([\d.e-]+) -> [\d.e-]+ \(best ([\d.e-]+)\) in 10 iter", report_of(outputs), re.M
    )
    assert losses and all(float(best) <= float(before) for before, best in losses)
    before, best = map(float, losses[0])
    assert best < 0.8 * before
    unguided, outputs = run(host, guided(host, path, iterations=0), "reference_0.png", demo.STEPS)
    assert "Nothing was guided" in report_of(outputs) and abs(drawn - unguided).mean() > 1


@pytest.mark.slow
@pytest.mark.parametrize("path", GUIDED, ids=lambda p: p.stem)
def test_guidance_brings_pictures_closer_to_their_reference_by_the_loss_s_own_measure(host, path):
    """Eight pictures, each beside that of the same noise without guidance: one alone may go either way."""
    for package in ("insightface", "onnx2torch", "lpips"):
        pytest.importorskip(package)
    measure = MEASURES[path.stem](tensor(Image.open(host.folder("input") / "reference_0.png").convert("RGB")))
    values = []
    for iterations in (0, 10):
        api = workflow.override(guided(host, path, iterations=iterations), "EmptyLatentImage", batch_size=8)
        drawn, _ = run_batch(host, api, "reference_0.png", demo.STEPS)
        with torch.no_grad():
            value, counts = zip(*(measure(tensor(picture)) for picture in drawn), strict=True)
        values.append(torch.cat(value))
    kept = torch.cat(counts)
    assert kept.sum() >= 6 and standard_errors((values[0] - values[1])[kept]) > 3


@pytest.mark.parametrize("path", [*GUIDED, TWO], ids=lambda p: p.stem)
def test_a_guided_workflow_is_set_as_the_nodes_come_and_for_likeness_by_a_preset(host, path):
    """So that it follows when better defaults are found; beside a preset stand the numbers that it means."""
    nodes = workflow.convert(path, host.object_info()).values()
    likeness = any(node["class_type"] in ("LookaheadIdentityLoss", "LookaheadPeopleLoss") for node in nodes)
    for node in nodes:
        if node["class_type"] in ("LookaheadGuidanceSampler", "LookaheadShortcut", "LookaheadLPIPSLoss"):
            schema = host.object_info()[node["class_type"]]["input"]
            expected = {name: spec[1]["default"] for name, spec in schema["required"].items() if "default" in spec[1]}
            if node["class_type"] == "LookaheadGuidanceSampler":
                expected["preset"] = "balanced" if likeness else "as set below"
                expected |= schema["optional"]["preset"][1]["lookahead_presets"].get(expected["preset"], {})
            assert {name: node["inputs"][name] for name in expected} == expected


def test_the_preview_grid_shows_that_the_shortcut_foretells_better_than_x0(host):
    """Of pure noise, over eight pictures with both previews each: one alone may go either way. Measured: an rmse of
    0.16 beside 0.33, 8.2 standard errors; x0 after half of the steps 0.09, 9.5."""
    api, found = workflow.convert(GRID, host.object_info()), []
    for seed in range(8):
        drawn, outputs = run(host, api, "reference_0.png", seed=seed)
        height, width = drawn.shape[:2]
        assert width == 5 * demo.SIZE and height > 2 * demo.SIZE
        table = [line.split(" | ") for out in outputs for line in str(out.get("text", [""])[0]).splitlines()]
        rmse = {(row[0].strip("| "), row[1]): float(row[2]) for row in table if row[-1].strip(" |")[:1].isdigit()}
        found.append([rmse[row] for row in (("0 %", "shortcut"), ("0 %", "x0"), ("50 %", "x0"))])
    shortcut, x0, later = torch.tensor(found).T
    assert standard_errors(x0 - shortcut) > 4 and standard_errors(x0 - later) > 4


def test_what_a_study_has_drawn_is_not_drawn_again_and_a_change_of_its_graph_is(host, monkeypatch, tmp_path):
    """Here, since a host runs."""
    started = []

    def running(**_):
        started.append(1)
        return nullcontext(host)

    monkeypatch.setattr(drawing, "mini_host", running)
    monkeypatch.setattr(drawing, "CACHE", tmp_path)
    faces = {"study-0.png": torch.full((3, 16, 16), 0.2), "study-1.png": torch.full((3, 16, 16), 0.6)}

    def graph(file):
        nodes = Graph()
        nodes.add("drawn", "SaveImage", images=nodes.add("face", "LoadImage", image=file), filename_prefix="study")
        return nodes, ("drawn",)

    work = [graph(file) for file in faces]
    first = drawing.draw_kept("faces", work[:1], faces)
    both = drawing.draw_kept("faces", work, faces)
    again = drawing.draw_kept("faces", work, faces)
    assert len(started) == 2, "the third found all there"
    for one, face in zip(both, faces.values(), strict=True):
        assert torch.allclose(one.pictures["drawn"], face[None], atol=1 / 255)
        assert 0 <= one.seconds < host.processor_seconds(), "the system counts in ticks, this graph may take none"
    kept = [of_run[n].pictures["drawn"] for n, of_run in ((0, first), (0, both), (1, both), (1, again))]
    assert torch.equal(kept[0], kept[1]) and torch.equal(kept[2], kept[3])
    assert [one.seconds for one in again] == [one.seconds for one in both]
