"""The judges of `lookahead evaluate`: the same person, another, shuffled pairs; the right prompt and wrong ones."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lcm_lookahead.cli import world
from lcm_lookahead.evaluation.harness.library import EvaluationError, Library, digest_of
from lcm_lookahead.evaluation.harness.measures import MEASURES, Case, Identity, copy_paste
from lcm_lookahead.evaluation.harness.sections import People, Prompt
from lcm_lookahead.evaluation.stats import auc
from lcm_lookahead.mini import judges

PROMPTS = [
    Prompt(number=n, kind="style", text=text)
    for n, text in enumerate(["a photo of a face on a beach", "a comic of a face", "a wanted poster of a face"])
]
# The judge sees every style; the loss's recogniser sees photos, in which its detector finds faces.
RECOGNISERS = {"mini": (2, 0.95), "mini_face_recogniser.safetensors": (1, 0.8)}


@pytest.fixture(scope="module")
def library():
    return world.library_of(SimpleNamespace(models=SimpleNamespace(base="mini")))


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    section = People(source="drawn", count=8, first=40)
    return judges.drawn_people(section, PROMPTS, tmp_path_factory.mktemp("people"))


def opened(kind, library, **fields):
    return ({**MEASURES, **judges.MEASURES})[kind].model_validate(fields).open(library, "mini")


def case(picture, person, prompt, **more):
    return Case(picture, person.name, prompt.text, person.reference, person.target(prompt), **more)


@pytest.mark.parametrize("recogniser", RECOGNISERS)
def test_identity_tells_a_person_from_others_and_shuffled_pairs_are_no_better_than_chance(library, people, recogniser):
    measure = opened("identity", library, recogniser=recogniser)
    prompts, least = RECOGNISERS[recogniser]

    def scores(shift):
        pairs = zip(people, people[shift:] + people[:shift], strict=True)
        found = [measure.score(case(one.target(p), other, p)) for one, other in pairs for p in PROMPTS[:prompts]]
        return torch.tensor([0.0 if v is None else v for v in found])  # as a table counts them

    same, different = scores(0), torch.cat([scores(shift) for shift in (1, 3, 5)])
    assert auc(same, different) > least
    assert measure.score(case(people[0].reference, people[0], PROMPTS[0])) == pytest.approx(1, abs=1e-5)
    everything, numbers = torch.cat([same, different]), torch.Generator().manual_seed(3)
    shuffled = (everything[torch.randperm(len(everything), generator=numbers)] for _ in range(50))
    assert abs(np.mean([auc(mixed[: len(same)], mixed[len(same) :]) for mixed in shuffled]) - 0.5) < 0.06


@pytest.mark.parametrize(("scorer", "least"), [("mini", 0.9), ("mini_clip/model.safetensors", 0.8)])
def test_a_picture_scores_higher_under_its_own_prompt_than_under_another(library, people, scorer, least):
    measure = opened("prompt", library, clip=scorer)
    own, other = [], []
    for person in people[:4]:
        for prompt in PROMPTS:
            for asked in PROMPTS:
                score = measure.score(case(person.target(prompt), person, asked))
                (own if asked == prompt else other).append(score)
    assert np.mean(own) > np.mean(other)
    assert auc(torch.tensor(own), torch.tensor(other)) > least


def test_the_target_is_most_like_itself_and_the_reference_is_a_copy(library, people):
    person, prompt = people[0], PROMPTS[1]
    similar = opened("identity of target", library, recogniser="mini")
    assert similar.score(case(person.target(prompt), person, prompt)) == pytest.approx(1, abs=1e-5)
    copied = opened("copy-paste", library, recogniser="mini")
    assert copied.score(case(person.reference, person, prompt)) == pytest.approx(1, abs=0.02)
    assert copied.score(case(person.target(prompt), person, prompt)) == pytest.approx(-1, abs=0.02)
    assert copied.better == "neither"
    way = copy_paste(*(torch.nn.functional.normalize(torch.tensor(v), dim=0) for v in ([1.0, 1], [1.0, 0], [0.0, 1])))
    assert way == pytest.approx(0, abs=1e-6)  # half way between both


def test_the_drawn_parameters_are_read_off_better_of_the_person_than_of_another(library, people):
    measure = opened("identity parameters", library)
    own = [measure.score(case(p.target(PROMPTS[0]), p, PROMPTS[0])) for p in people]
    other = [measure.score(case(q.target(PROMPTS[0]), p, PROMPTS[0])) for p, q in zip(people, people[1:], strict=False)]
    assert np.mean(own) < 0.8 * np.mean(other) and measure.better == "lower"


def test_change_and_diversity_are_distances_and_need_what_they_compare_with(library, people):
    one, other = (people[0].target(p) for p in PROMPTS[:2])
    for settings in ({"clip": "mini_clip/model.safetensors"}, {"lpips": "random"}):
        if "lpips" in settings:
            pytest.importorskip("lpips")
        change = opened("change", library, **settings)
        assert change.needs == ("plain",)
        assert change.score(case(one, people[0], PROMPTS[0], plain=one)) == pytest.approx(0, abs=1e-5)
        apart = change.score(case(one, people[0], PROMPTS[0], plain=other))
        assert apart > 0.01
        diverse = opened("diversity", library, **settings)
        found = diverse.score(case(one, people[0], PROMPTS[0], others=(one, other)))
        assert found == pytest.approx(apart / 2, rel=1e-4)


def test_scores_by_a_pack_of_the_measure_s_own_are_none_of_the_protocol_s_pack(library):
    kinds = [Identity(recogniser="mini_face_recogniser.safetensors", pack=pack) for pack in (None, "mini")]
    shared, own = (kind.open(library, "mini") for kind in kinds)
    file = digest_of(library.find("recogniser", "mini_face_recogniser.safetensors"))
    assert shared.digest == file != own.digest and shared.judged_by == own.judged_by == file


def test_a_picture_without_a_face_has_no_identity_and_counts_nothing(library, people, tmp_path):
    from PIL import Image

    path = tmp_path / "grey.png"
    Image.new("RGB", (128, 128), (120, 120, 120)).save(path)
    measure = opened("identity", library, recogniser="mini_face_recogniser.safetensors")
    assert measure.score(case(path, people[0], PROMPTS[0])) is None and measure.missing == 0
    faces = opened("faces found", library)
    assert faces.score(case(path, people[0], PROMPTS[0])) == 0
    assert faces.score(case(people[0].reference, people[0], PROMPTS[0])) == 1


def test_a_recogniser_without_a_detector_and_a_file_that_is_not_there_are_said(library):
    with pytest.raises(EvaluationError, match="set `pack`"):
        Library().embedder("some.onnx", None)
    with pytest.raises(EvaluationError, match="recogniser names none.onnx, which is not there"):
        library.embedder("none.onnx", "mini")
