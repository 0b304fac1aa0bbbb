"""References that know whose face it is, in the place of pictures: losses and scores in the real host."""

import shutil
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("insightface")

ROOT = Path(__file__).resolve().parents[2]
MINI = ROOT / "mini/weights/insightface/models/mini"


@pytest.fixture(scope="module")
def analysis(pack):
    """The mini world's face pack, opened."""
    folder = pack.base / "models/insightface/models"
    shutil.copytree(MINI, folder / "mini")
    yield pack.nodes["LookaheadLoadFaceAnalysis"].execute("mini").result[0]
    shutil.rmtree(folder.parent)


@pytest.fixture(scope="module")
def photos(pack):
    """Three people, two photos of each: [3, 2, 128, 128, 3]."""
    faces = pack.module("mini.world.faces")
    g = torch.Generator().manual_seed(80)
    identity = {key: value.repeat_interleave(2) for key, value in faces.sample_identities(3, g).items()}
    how = faces.frontal(faces.sample_nuisance(6, g, style=torch.zeros(6).long(), place=torch.zeros(6).long()))
    return faces.render(faces.Faces(identity, how), 128).movedim(1, -1).unflatten(0, (3, 2))


@pytest.fixture
def read(tools, mini, analysis):
    """Pictures -> the reference that an artist would save, which knows its face."""
    return lambda pictures, **options: tools.kv_reference(mini, pictures, face_analysis=analysis, **options)


@pytest.fixture
def saved(pack, tools, read, tmp_path, monkeypatch):
    """Pictures -> their reference through a file, which holds no picture."""
    module = pack.module("nodes.reference.reference_files")
    monkeypatch.setattr(module, "made", lambda name: tmp_path)
    monkeypatch.setattr("folder_paths.get_full_path", lambda folder, name: str(tmp_path / name))

    def saved(pictures, **options):
        report = tools.run("LookaheadSaveReference", read(pictures, **options), "anna")
        assert "face embedding by rec_mini.onnx" in report
        return tools.run("LookaheadLoadReference", "anna.safetensors")

    return saved


def by_loss(pack, value, pictures):
    """Values and whether they are valid, of one run of a loss over pictures [n, h, w, 3]."""
    bind_rng = pack.module("lookahead.losses.base").bind_rng
    with torch.inference_mode(False), torch.no_grad():
        loss = bind_rng(value.loss, torch.Generator())
        return loss(pictures.movedim(-1, 1).clone() * 2 - 1)


def test_a_saved_person_scores_as_their_picture_does(pack, analysis, photos, saved):
    node = pack.nodes["LookaheadIdentityScore"]
    shown = photos[:, 1]
    from_file = node.execute(analysis, shown, saved(photos[1, :1])).result[0]
    from_picture = node.execute(analysis, shown, photos[1, :1]).result[0]
    assert from_file.measure == from_picture.measure and int(from_file.values.argmax()) == 1
    # insightface cuts the face, and we cut it ourselves: the same to some thousandths
    assert torch.allclose(from_file.values, from_picture.values, atol=0.02)


def test_a_saved_person_steers_as_their_picture_does_but_shows_nothing(pack, analysis, photos, saved):
    node = pack.nodes["LookaheadIdentityLoss"]
    from_file, from_picture = (node.execute(analysis, x).result[0] for x in (saved(photos[0, :1]), photos[0, :1]))
    values, valid = by_loss(pack, from_file, photos[:, 1])
    wanted, _ = by_loss(pack, from_picture, photos[:, 1])
    assert valid.all() and int(values.argmin()) == 0 and torch.allclose(values, wanted, atol=0.02)
    showing_in = pack.module("lookahead.losses.base").showing_in
    assert showing_in(from_file.loss) is None and showing_in(from_picture.loss) is from_picture.loss


def test_without_a_picture_a_preview_without_a_face_does_not_count(pack, analysis, photos, read):
    empty = torch.full_like(photos[0, :1], 0.5)
    node = pack.nodes["LookaheadIdentityLoss"]
    counts = [
        by_loss(pack, node.execute(analysis, x).result[0], empty)[1] for x in (photos[0, :1], read(photos[0, :1]))
    ]
    assert [bool(valid) for valid in counts] == [True, False]  # the picture says where its face is


def test_each_of_several_is_one_person_or_all_are_by_their_weights(pack, tools, analysis, photos, read):
    node = pack.nodes["LookaheadIdentityScore"]
    everybody = read(photos[:, 0], several="one per picture")
    each = node.execute(analysis, photos[:, 1], everybody, "one per picture").result[0].values
    assert each.min() > 0.3
    first, second = read(photos[0, :1]), read(photos[1, :1])
    combine = pack.nodes["LookaheadCombineReferences"]
    for weights, wanted in (((1.0, 0.0), (1, 0)), ((3.0, 1.0), (3, 1)), ((1.0, -1.0), (1, 0))):
        both = combine.execute(first, second, *weights).result[0]
        faces = [one.subjects[0].face for one in (first, second)]
        mean = F.normalize(wanted[0] * faces[0] + wanted[1] * faces[1], dim=-1)
        loss = pack.nodes["LookaheadIdentityLoss"].execute(analysis, both).result[0].loss
        assert torch.allclose(loss.references.embeddings, mean, atol=1e-6)


def test_several_people_may_be_saved_ones(pack, analysis, photos, read):
    node = pack.nodes["LookaheadPeopleLoss"]
    made = node.execute(analysis, person_1=read(photos[0, :1]), person_2=photos[1, :1]).result[0]
    assert len(made.loss.people) == 2 and not made.loss.shows


def test_a_reference_that_cannot_say_whose_face_it_is_is_refused_in_a_sentence(
    pack, tools, mini, analysis, photos, read
):
    node = pack.nodes["LookaheadIdentityLoss"]
    with pytest.raises(ValueError, match="does not say whose face it is: connect face_analysis") as error:
        node.execute(analysis, tools.kv_reference(mini, photos[0, :1]))
    tools.one_sentence(error)
    known = read(photos[0, :1])
    change = pack.module("nodes.reference.subject")
    from dataclasses import replace

    for other, said in (
        ({"recogniser": "w600k_r50.onnx"}, "was read by the recogniser w600k_r50.onnx, and rec_mini.onnx compares"),
        ({"face": known.subjects[0].face[:, :5]}, "has 5 numbers, and rec_mini.onnx gives"),
        ({"weight": -1.0}, "does not say whose face"),
    ):
        with pytest.raises(ValueError, match=said) as error:
            node.execute(analysis, change.Reference((replace(known.subjects[0], **other),)))
        tools.one_sentence(error)
    with pytest.raises(ValueError, match="No face was found in the picture") as error:
        read(torch.full((1, 128, 128, 3), 0.5))
    tools.one_sentence(error)


def test_a_noise_guide_asks_for_the_picture_that_it_begins_with(pack, tools, analysis, photos, read):
    loss = pack.nodes["LookaheadIdentityLoss"].execute(analysis, read(photos[0, :1])).result[0].loss
    identity_in, combined = (
        getattr(pack.module(of), name)
        for of, name in (("nodes.guidance.noise_guide", "identity_in"), ("lookahead.losses.base", "Combined"))
    )
    with pytest.raises(ValueError, match="has none, only a face embedding: connect a picture") as error:
        identity_in(loss)
    tools.one_sentence(error)
    shows = pack.nodes["LookaheadIdentityLoss"].execute(analysis, photos[0, :1]).result[0].loss
    assert identity_in(combined(((1.0, loss), (1.0, shows)))) is shows
