"""The nodes that judge pictures in the real host, and the one that puts the best first."""

import shutil
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
PACK = ROOT / "mini/weights/insightface/models/mini"
CLIP = ROOT / "mini/weights/mini_clip"
STYLES = ("photo", "oil painting", "comic")


@pytest.fixture(scope="module")
def models(pack):
    """The mini world's face pack and CLIP where the host looks for them."""
    faces, clip = pack.base / "models/insightface/models", pack.base / "models/clip_vision/mini-clip"
    shutil.copytree(PACK, faces / "mini")
    shutil.copytree(CLIP, clip)
    yield
    shutil.rmtree(faces.parent)
    shutil.rmtree(clip)


@pytest.fixture(scope="module")
def analysis(pack, models):
    pytest.importorskip("insightface")
    return pack.nodes["LookaheadLoadFaceAnalysis"].execute("mini").result[0]


@pytest.fixture(scope="module")
def drawn(pack):
    """Four people: photos, the same in other photos, [4, 128, 128, 3] each; and one person in each of STYLES."""
    faces = pack.module("mini.world.faces")
    g = torch.Generator().manual_seed(79)
    identity = faces.sample_identities(4, g)

    def pictures(people, styles):
        style = torch.tensor([faces.STYLES.index(s) for s in styles])
        how = faces.frontal(faces.sample_nuisance(len(styles), g, style=style, place=style * 0))
        return faces.render(faces.Faces(people, how), 128).movedim(1, -1)

    photos = [pictures(identity, ["photo"] * 4) for _ in range(2)]
    return *photos, pictures({k: v[:1].expand(len(STYLES)) for k, v in identity.items()}, STYLES)


@pytest.mark.contract
def test_every_score_node_explains_itself(pack, models):
    names = ("LookaheadIdentityScore", "LookaheadPromptScore", "LookaheadRank")
    for schema in (pack.nodes[name].define_schema() for name in names):
        assert schema.description and all(p.tooltip and p.tooltip.endswith(".") for p in schema.inputs + schema.outputs)


def test_the_person_of_the_reference_scores_highest_and_comes_first(pack, analysis, drawn):
    one, other, _ = drawn
    for number in (0, 2):
        result = pack.nodes["LookaheadIdentityScore"].execute(analysis, other, one[number : number + 1])
        scores, mean, text = result.result
        assert int(scores.values.argmax()) == number
        assert mean == pytest.approx(float(scores.values.mean()), abs=1e-6)
        assert text.startswith("identity (") and text.count("\n") == 4
        best, ranked, order = pack.nodes["LookaheadRank"].execute(other, scores).result
        assert torch.equal(best[0], other[number]) and order == str(number + 1) and len(ranked.values) == 1


def test_several_references_are_one_person_or_one_each(pack, analysis, drawn):
    one, other, _ = drawn
    node = pack.nodes["LookaheadIdentityScore"]
    each = node.execute(analysis, other, one, "one per picture").result[0].values
    alone = [node.execute(analysis, other, one[n : n + 1]).result[0].values[n] for n in range(4)]
    assert torch.allclose(each, torch.stack(alone), atol=1e-5)
    average = node.execute(analysis, other, one).result[0].values
    assert each.mean() > average.mean()


def test_a_picture_without_a_face_has_no_score_and_comes_last(pack, analysis, drawn, tools):
    one, other, _ = drawn
    mixed = torch.cat([torch.full_like(other[:1], 0.5), other[:2]])
    scores, mean, text = pack.nodes["LookaheadIdentityScore"].execute(analysis, mixed, one[:1]).result
    assert scores.values[0].isnan() and mean == mean and "picture 1: no face" in text
    order = pack.nodes["LookaheadRank"].execute(mixed, scores, keep=0).result[2]
    assert order == "2, 3, 1"
    with pytest.raises(ValueError, match="No face was found in the reference") as error:
        pack.nodes["LookaheadIdentityScore"].execute(analysis, other, mixed[:1])
    tools.one_sentence(error)


def test_a_picture_scores_highest_under_its_own_text(pack, models, drawn, tools):
    pytest.importorskip("transformers")
    node = pack.nodes["LookaheadPromptScore"]
    scores = torch.stack(
        [node.execute("mini-clip/model.safetensors", drawn[2], f"a {s} of a face").result[0].values for s in STYLES]
    )
    own = scores.diagonal().mean()
    assert own > (scores.sum() - scores.trace()) / 6 + 0.1 and scores.shape == (3, 3)
    measure = node.execute("mini-clip/model.safetensors", drawn[2], "a photo").result[0].measure
    assert measure == "prompt (mini-clip)"
    with pytest.raises(ValueError, match="There is no text") as error:
        node.execute("mini-clip/model.safetensors", drawn[2], " \n")
    tools.one_sentence(error)


def test_a_limit_rules_out_whatever_the_score_and_measures_are_not_added(pack, tools):
    scores = pack.module("nodes.scores.scores")
    image = tools.picture(1, n=4)
    identity = scores.Scores("identity", torch.tensor([0.2, 0.9, 0.5, float("nan")]))
    prompt = scores.Scores("prompt", torch.tensor([0.3, 0.1, float("nan"), 0.3]))
    rank = pack.nodes["LookaheadRank"]
    assert rank.execute(image, identity, 0).result[2] == "2, 3, 1, 4"
    pictures, ranked, order = rank.execute(image, identity, 0, prompt, 0.2).result
    assert order == "1, 2, 3, 4" and ranked.measure == "identity"
    assert torch.equal(pictures[0], image[0]) and ranked.values[:2].tolist() == pytest.approx([0.2, 0.9])
    assert len(rank.execute(image, identity, 3, prompt, 0.2).result[0]) == 3
    with pytest.raises(ValueError, match="There are 2 pictures, and scores is of 4") as error:
        rank.execute(image[:2], identity)
    tools.one_sentence(error)
