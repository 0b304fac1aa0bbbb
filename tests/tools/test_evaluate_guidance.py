"""What `make evaluate ARGS=--guidance` compares, and how its intervals are drawn."""

from pathlib import Path

import pytest
import torch
from lcm_lookahead.evaluation.harness.library import Library
from lcm_lookahead.evaluation.harness.methods import METHODS, GuidanceOption
from lcm_lookahead.lookahead.method.guidance_presets import PRESETS
from lcm_lookahead.mini.files.host_models import OF_CREATORS
from lcm_lookahead.mini.studies import guidance
from lcm_lookahead.tools.common import Problem


@pytest.mark.parametrize("loss", guidance.LOSSES)
def test_arms_differ_in_the_preview_alone(loss):
    nodes = guidance.graph(loss, ["a.png", "b.png"], 0, 5, guidance.ARMS)
    x0, ahead = (nodes[f"{arm} guidance"]["inputs"] for arm in (guidance.X0, guidance.LOOKAHEAD))
    assert {**x0, "shortcut": None} == {**ahead, "shortcut": None}
    x0, ahead = (nodes[f"{arm} shortcut"]["inputs"] for arm in (guidance.X0, guidance.LOOKAHEAD))
    assert (x0["kind"], ahead["kind"]) == ("plain x0", "one-step") and x0["vae"] == ahead["vae"]
    x0, ahead = (nodes[f"{guidance.STRONGER[kind]} guidance"]["inputs"] for kind in (guidance.X0, guidance.LOOKAHEAD))
    assert {**x0, "shortcut": None} == {**ahead, "shortcut": None} and x0["preset"] == "strong"
    drawn = [nodes[f"{arm} samples"]["inputs"] for arm in guidance.ARMS]
    assert all({**d, "sampler": None} == {**drawn[0], "sampler": None} for d in drawn)


def test_a_picture_is_burnt_where_more_of_it_is_at_an_end_than_in_any_unguided_one():
    unguided = torch.full((2, 3, 16, 16), 0.5)
    unguided[0, :, :2], guided = 1.0, unguided.clone()
    guided[0, 1, :3], guided[1, :, :2] = 0.0, 0.0  # one colour at its end is enough; as much as there was is not
    values = guidance.measure(guidance.IDENTITY, guided, {guidance.NONE: unguided, guidance.LOOKAHEAD: guided})
    assert [values[arm]["burnt"].tolist() for arm in values] == [[0.0, 0.0], [1.0, 0.0]]


def test_gains_are_paired():
    values = torch.rand(16, generator=torch.Generator().manual_seed(1))
    arms = {guidance.NONE: {"m": values}, guidance.X0: {"m": values + 0.5}, guidance.LOOKAHEAD: {"m": values + 0.75}}
    figures = guidance.intervals(arms)
    assert list(figures[guidance.LOOKAHEAD]["m, gain"]) == pytest.approx([0.75] * 3)
    assert list(figures[guidance.LOOKAHEAD]["m, gain over x0"]) == pytest.approx([0.25] * 3)
    low, high = figures[guidance.NONE]["m"][1:]
    assert high - low > 0.1


def test_pictures_that_share_their_words_are_drawn_together():
    values = (torch.arange(32) // 8 % 2).float()  # the same within each 8
    apart, together = (guidance.intervals({guidance.NONE: {"m": values}}, n)[guidance.NONE]["m"] for n in (1, 8))
    assert apart.value == together.value == 0.5
    assert together.high - together.low > 1.5 * (apart.high - apart.low)


def test_each_preset_stands_beside_the_best_of_as_many_noises_as_it_takes_evaluations():
    arms, baselines, costs = guidance.preset_arms(["balanced", "quick", "MPGD"])
    assert baselines == {
        "balanced": "best of 21",
        "quick": "best of 10",
        "MPGD": "best of 50",
    }
    assert all(abs(costs[name] - costs[baseline]) <= 0.5 for name, baseline in baselines.items())
    nodes = guidance.graph(guidance.IDENTITY, ["a.png", "b.png"], 0, 5, arms)
    drawn = {name: nodes[f"{name} guidance"]["inputs"] for name in arms if arms[name].kind != guidance.NONE}
    assert drawn["quick"]["preset"] == "quick"
    everything, baselines, _ = guidance.preset_arms()
    assert baselines[guidance.CUSTOM] == "best of 66" and not everything[guidance.CUSTOM].settings
    assert set(guidance.PRESETS_SHOWN) < everything.keys()
    assert {k: drawn["best of 10"][k] for k in ("start", "iterations", "best_of")} == {
        "start": 0.0,
        "iterations": 0,
        "best_of": 10,
    }
    kinds = {name: nodes[f"{name} shortcut"]["inputs"]["kind"] for name in drawn}
    assert kinds["MPGD"] == "plain x0" and {k for n, k in kinds.items() if n != "MPGD"} == {"one-step"}


def test_what_views_are_worth_is_measured_beside_the_same_preset_with_one_crop():
    arms, _, costs = guidance.preset_arms()
    nodes = guidance.graph(guidance.IDENTITY, ["a.png"], 0, 5, {n: arms[n] for n in ("balanced", guidance.VIEWED)})
    one, viewed = (nodes[f"{name} guidance"]["inputs"] for name in ("balanced", guidance.VIEWED))
    assert [nodes[part["loss"][0]]["inputs"]["views"] for part in (one, viewed)] == [0, guidance.VIEWS]
    kinds = [nodes[part.pop("shortcut")[0]]["inputs"]["kind"] for part in (one, viewed)]
    del one["loss"], viewed["loss"]
    assert one == viewed and kinds[0] == kinds[1] and costs["balanced"] == costs[guidance.VIEWED]


def test_the_noise_guide_stands_alone_and_with_a_preset_s_iterations_on_top():
    alone, _, more = guidance.BY_NOISE_GUIDE
    arms, baselines, costs = guidance.preset_arms(["balanced", alone, more])
    assert costs[alone] == 1 and costs[more] == costs["balanced"]
    assert baselines[alone] == guidance.NONE and baselines[more] == baselines["balanced"] == "best of 21"
    nodes = guidance.graph(guidance.IDENTITY, ["a.png"], 0, 5, {n: arms[n] for n in ("balanced", alone, more)})
    plain, one, both = (nodes[f"{name} guidance"]["inputs"] for name in ("balanced", alone, more))
    assert (one["preset"], both["preset"]) == ("off", "balanced") and "noise_guide" not in plain
    loaders = {nodes[part["noise_guide"][0]]["inputs"]["guide_name"] for part in (one, both)}
    assert loaders == {Path(file).name for file in OF_CREATORS if "noise_guide" in file}
    assert set(guidance.BY_NOISE_GUIDE) < guidance.preset_arms()[0].keys()


def test_presets_stand_beside_image_to_image_from_the_reference():
    arms, _, costs = guidance.preset_arms(["quick"])
    assert costs[guidance.IMAGE_TO_IMAGE] == 0
    nodes = guidance.graph(guidance.IDENTITY, ["a.png"], 0, 5, arms)
    redrawn, plain = (nodes[f"{name} samples"]["inputs"] for name in (guidance.IMAGE_TO_IMAGE, guidance.NONE))
    assert [nodes[part["sigmas"][0]]["inputs"]["denoise"] for part in (redrawn, plain)] == [guidance.REDRAWN, 1.0]
    encoded = nodes[redrawn["latent_image"][0]]
    scaled = nodes[encoded["inputs"]["pixels"][0]]["inputs"]
    assert encoded["class_type"] == "VAEEncode" and nodes[scaled["image"][0]]["class_type"] == "LoadImage"
    assert redrawn["guider"] == plain["guider"] and redrawn["noise"] == plain["noise"]


def test_a_name_that_is_no_preset_is_refused():
    with pytest.raises(Problem, match="no preset 'quik'.*quick"):
        guidance.preset_arms(["quik"])
    with pytest.raises(Problem, match="no loss 'likeness'.*identity"):
        guidance.evaluate(96, Path("nowhere"), losses=["likeness"])


def test_the_page_of_presets_has_a_row_an_arm_with_what_it_takes():
    arms, baselines, costs = guidance.preset_arms(["quick", "DPS"])
    values = {
        name: {what: torch.rand(16) for what in ("similarity to the reference", "style of the prompt", "fine detail")}
        for name in arms
    }
    figures = guidance.intervals(values, baselines=baselines, over=guidance.AS_MANY)
    seconds = {name: 10.0 + number for number, name in enumerate(arms)}
    text = guidance.presets_page(figures, costs, seconds, range(200, 216))
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ") and "evaluations" not in line]
    expected = [(f"| {name}", str(round(costs[name])), f"{seconds[name]:.1f}") for name in arms]
    assert [tuple(row[:3]) for row in rows] == expected and "16 triples" in text and "200 to 215" in text
    assert "Written by `lookahead evaluate --presets quick DPS --references 16 --first 200`" in text
    assert len({len(row) for row in rows}) == 1 and "DPS steer by plain x0" in text
    assert "similarity to the reference, gain over the best of as many" in figures["quick"]
    assert "DPS (arXiv 2209.14687)" in text and "](guidance_papers.jpg)" in text


def test_presets_of_other_papers_have_a_page_of_their_own():
    assert guidance.presets_name(["strong", "ReNO"]) == "guidance_papers"
    assert guidance.presets_name(guidance.preset_arms()[0]) == "guidance_presets"


# -- guidance of a protocol's method


def test_a_protocol_names_a_preset_or_the_best_of_as_many_noises():
    assert GuidanceOption(preset="quick").inputs(50) == {"preset": "quick"}
    assert GuidanceOption(best_of=9).inputs(50) == {"start": 0.0, "iterations": 0, "best_of": 9}
    assert GuidanceOption(best_of="balanced").inputs(50)["best_of"] == 21
    assert GuidanceOption(kind="x0", best_of="balanced").inputs(50)["best_of"] == 15
    assert GuidanceOption(iterations=7).inputs(50) == {"start": 0.12, "iterations": 7}


def test_a_noise_guide_acts_alone_or_before_a_preset_or_numbers():
    alone, before, numbers = (
        GuidanceOption(noise_guide="a", **more) for more in ({}, {"preset": "gentle"}, {"start": 0.4, "iterations": 2})
    )
    assert alone.inputs(50) == {"preset": "off"} and alone.guide_alone and not before.guide_alone
    assert before.inputs(50) == {"preset": "gentle"}
    assert numbers.inputs(50) == {"start": 0.4, "iterations": 2}
    # It takes the one evaluation that the preset's lean does.
    assert alone.work(50) == (1, 1) and before.work(50) == GuidanceOption(preset="gentle").work(50)


def test_pictures_of_a_noise_guide_hang_on_its_contents_not_on_its_name(tmp_path):
    file = {name: tmp_path / f"{name}.safetensors" for name in ("one", "same", "other")}
    for name, path in file.items():
        path.write_text("other" if name == "other" else "one")

    def digest(name, **more):
        method = METHODS["none"](guidance=GuidanceOption(noise_guide=str(file[name]), **more))
        return method.digest(Library(), 50)

    assert digest("one") == digest("same") != digest("other")
    assert digest("one") != digest("one", start=0.12), "as the file says is not the node's own place"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"preset": "quik"}, "no preset 'quik'.*quick"),
        ({"best_of": "quik"}, "no preset 'quik'.*quick"),
        ({"preset": "quick", "iterations": 3}, "exclude each other"),
        ({"preset": "quick", "best_of": 3}, "exclude each other"),
        ({"noise_guide": "a", "best_of": 3}, "best_of is what guidance is compared with"),
    ],
)
def test_guidance_that_says_two_things_is_refused(given, says):
    with pytest.raises(ValueError, match=says):
        GuidanceOption(**given)


def test_pictures_drawn_before_are_found_and_a_preset_that_changes_is_drawn_again(monkeypatch):
    plain = GuidanceOption().model_dump(mode="json")
    assert plain == {"kind": "lookahead", "start": 0.12, "iterations": None, "step_size": None}
    quick = METHODS["none"](guidance=GuidanceOption(preset="quick"))
    before = quick.digest(None, 50)
    monkeypatch.setitem(PRESETS, "quick", PRESETS["strong"])
    assert quick.digest(None, 50) != before


def test_the_work_of_guidance_counts_what_skips_the_unet():
    full, quick = (GuidanceOption(preset=name).work(50) for name in ("balanced", "quick"))
    assert full == (5 * 3 + 5, 5 * 3 + 5) and quick == (5 + 5, 5 * 3 + 5)
