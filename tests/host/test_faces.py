"""The face nodes in the real host, with the real insightface on the mini pack and drawn people."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("insightface")
pytest.importorskip("onnxruntime")

ROOT = Path(__file__).resolve().parents[2]
MINI = ROOT / "mini/weights/insightface/models/mini"
NODES = ("LookaheadLoadFaceAnalysis", "LookaheadCropFace", "LookaheadIdentityLoss")


@pytest.fixture(scope="module")
def models(pack):
    """Where the host looks for packs, the mini pack in it."""
    folder = pack.base / "models/insightface/models"
    shutil.copytree(MINI, folder / "mini")
    yield folder
    shutil.rmtree(folder.parent)


@pytest.fixture(scope="module")
def analysis(pack, models):
    return pack.nodes["LookaheadLoadFaceAnalysis"].execute("mini").result[0]


@pytest.fixture(scope="module")
def people(pack):
    """Photos of four people, two of each: [4, 2, 128, 128, 3], and their landmarks [4, 2, 5, 2]."""
    faces = pack.module("mini.world.faces")
    g = torch.Generator().manual_seed(77)
    identity = {key: value.repeat_interleave(2) for key, value in faces.sample_identities(4, g).items()}
    nuisance = faces.sample_nuisance(8, g, style=torch.zeros(8).long(), place=torch.zeros(8).long())
    drawn = faces.Faces(identity, nuisance)
    points = faces.landmarks(drawn, 128) - 0.5
    return faces.render(drawn, 128).movedim(1, -1).unflatten(0, (4, 2)), points.unflatten(0, (4, 2))


@pytest.fixture(scope="module")
def group(people):
    """A picture of three people, [1, 512, 512, 3], and the middle's x of each: the last in the list stands below."""
    picture, middles = torch.full((1, 3, 512, 512), 0.45), []
    for n, (x, y, side) in enumerate(((0, 0, 240), (264, 8, 248), (140, 292, 168))):
        face = people[0][(0, 2, 1)[n], 0].movedim(-1, 0)[None]
        picture[:, :, y : y + side, x : x + side] = F.interpolate(face, (side, side), mode="bilinear")
        middles.append(x + side / 2)
    return picture.movedim(1, -1), middles


@pytest.fixture
def crop(pack, analysis):
    return lambda image, **options: pack.nodes["LookaheadCropFace"].execute(analysis, image, **options).result


@pytest.mark.contract
def test_every_face_node_explains_itself(pack, models):
    for node in NODES:
        schema = pack.nodes[node].define_schema()
        assert schema.description and all(p.tooltip and p.tooltip.endswith(".") for p in schema.inputs + schema.outputs)
        assert (ROOT / f"web/docs/{node}.md").is_file()


@pytest.mark.contract
def test_packs_are_listed_from_the_host_s_folders_nested_ones_too(pack, models, tmp_path):
    import folder_paths

    shutil.copytree(MINI, models / "antelopev2/antelopev2", ignore=shutil.ignore_patterns("LICENSE"))
    shutil.copytree(MINI, tmp_path / "elsewhere/own")
    (models / "empty").mkdir()
    folder_paths.add_model_folder_path("insightface", str(tmp_path / "elsewhere"))
    try:
        node = pack.nodes["LookaheadLoadFaceAnalysis"]
        assert node.define_schema().inputs[0].options == ["antelopev2", "mini", "own"]
        loaded, text = node.execute("antelopev2").result
        assert loaded.name == "antelopev2" and "non-commercial research only" in text
    finally:
        folder_paths.folder_names_and_paths["insightface"][0].remove(str(tmp_path / "elsewhere"))
        shutil.rmtree(models / "antelopev2")
        (models / "empty").rmdir()


@pytest.mark.contract
def test_the_licence_and_the_recogniser_are_shown_on_the_node(pack, models):
    out = pack.nodes["LookaheadLoadFaceAnalysis"].execute("mini")
    text = out.result[1]
    assert (
        "mini: licence Apache-2.0" in text
        and "(see LICENSE)" in text
        and "recogniser: rec_mini.onnx" in text
        and "128 pixels" in text
    )
    assert tuple(out.ui.as_dict()["text"]) == (text,)


def test_a_pack_that_is_not_there_is_named_with_the_folder_searched(pack, models, tools):
    node = pack.nodes["LookaheadLoadFaceAnalysis"]
    assert node.validate_inputs("mini") is True
    assert "no face pack 'buffalo_l'" in node.validate_inputs("buffalo_l")
    with pytest.raises(FileNotFoundError, match="insightface.models") as error:
        node.execute("buffalo_l")
    tools.one_sentence(error)


def test_a_replaced_file_makes_the_pack_load_again(pack, models):
    import os

    node, file = pack.nodes["LookaheadLoadFaceAnalysis"], models / "mini/rec_mini.onnx"
    before = node.fingerprint_inputs("mini", "cpu")
    assert node.fingerprint_inputs("mini", "cpu") == before
    os.utime(file, ns=(1, 1))
    assert node.fingerprint_inputs("mini", "cpu") != before


@pytest.mark.parametrize("missing", ["insightface", "onnxruntime"])
def test_without_a_package_the_pack_s_other_nodes_work_and_this_says_what_to_install(
    pack, models, missing, monkeypatch, mini, tools
):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=f"no {missing}: run .pip install") as error:
        pack.nodes["LookaheadLoadFaceAnalysis"].execute("mini")
    tools.one_sentence(error)
    tools.reference(mini, tools.picture(1))


def middle_of(crop, whole):
    """Where in a picture [1, H, W, 3] a crop [1, s, s, 3], not resized, was cut: its middle's x."""
    last = crop.shape[1] - 1
    far = 0.0
    for y, x in ((0, 0), (0, last), (last, 0), (last, last), (last // 2, last // 2)):
        shifted = whole[0, y : whole.shape[1] - last + y, x : whole.shape[2] - last + x]
        far = far + (shifted - crop[0, y, x]).abs().amax(-1)
    assert far.min() < 1e-6, "the crop is no part of the picture"
    return int(far.argmin() % far.shape[1]) + crop.shape[1] / 2


@pytest.mark.parametrize(
    ("order", "face", "who"),
    [
        ("largest first", 0, 0),
        ("largest first", -1, 2),
        ("left to right", 0, 0),
        ("left to right", 1, 2),
        ("left to right", -1, 1),
        ("top to bottom", 2, 2),
        ("middle first", 0, 2),
    ],
)
def test_the_face_that_is_asked_for_is_cut_out(crop, group, order, face, who):
    picture, middles = group
    cut, preview = crop(picture, order=order, face=face, margin=0.0)
    assert cut.shape[1] == cut.shape[2] and preview.shape == picture.shape
    assert abs(middle_of(cut, picture) - middles[who]) < 28


def test_the_margin_widens_the_square_and_keeps_it_inside_the_picture(crop, group):
    picture, _ = group
    sides = [crop(picture, margin=margin)[0].shape[1] for margin in (0.0, 0.2, 3.0)]
    assert abs(sides[1] - sides[0] * 1.4) <= 1 and sides[2] == 512
    at_the_edge, _ = crop(picture, order="left to right", face=0, margin=0.5)
    middle_of(at_the_edge, picture)  # a part of it, though the square would reach over the edge


def test_a_crop_has_the_size_that_is_asked_for_and_batches_share_the_largest(crop, people):
    image = people[0][:3, 0]
    assert crop(image, size=96)[0].shape == (3, 96, 96, 3)
    alone = [crop(image[i : i + 1], margin=0.1)[0].shape[1] for i in range(3)]
    together = crop(image, margin=0.1)[0]
    assert together.shape == (3, max(alone), max(alone), 3)
    assert together.dtype == torch.float32 and together.min() >= 0 and together.max() <= 1


def test_an_upright_crop_brings_the_landmarks_to_the_template(pack, crop, analysis, people):
    faces = pack.module("lookahead.vision.faces")
    pictures, points = people[0][:, 1], people[1][:, 1]
    turned = points[:, 1] - points[:, 0]
    assert (turned[:, 1] / turned[:, 0]).abs().max() > 0.03, "no head is tilted: the test would show nothing"
    cut, _ = crop(pictures, alignment="upright", margin=0.5, size=224)
    wanted, own = faces.template(224, 0.5), faces.align(pictures.movedim(-1, 1), points, faces.template(224, 0.5), 224)
    assert cut.shape == (4, 224, 224, 3)
    found = torch.stack([one[0].points for one in analysis.find(cut.movedim(-1, 1))])
    left_to_do = faces.umeyama(found, wanted)  # a face is not the template, but it is neither turned nor elsewhere
    assert (left_to_do[:, :, :2] - torch.eye(2)).abs().max() < 0.1
    assert (found.mean(1) - wanted.mean(0)).abs().max() < 6
    assert (cut.movedim(-1, 1) - own).abs().mean() < 0.06
    natural, _ = crop(pictures[:1], alignment="upright", margin=0.5)
    per_pixel = faces.pixels_per_sample(points[:1]).item()
    assert natural.shape[1] == pytest.approx(max(64, 224 * per_pixel), rel=0.1)


def test_an_upright_crop_beyond_the_picture_is_transparent_where_asked(crop, people):
    picture = people[0][:1, 0]
    plain, padded = (
        crop(picture, alignment="upright", margin=1.5, size=224, edges=e)[0] for e in ("move inside", "pad")
    )
    assert torch.equal(padded[..., :3], plain) and padded[..., 3].min() == 0 and padded[:, 112, 112, 3] == 1


def test_without_the_face_it_is_an_error_or_skipped_or_the_whole_picture(crop, people, group, tools):
    empty = torch.full((1, 128, 128, 3), 0.5)
    batch = torch.cat([people[0][:1, 0], empty])
    with pytest.raises(ValueError, match="No face was found in picture 2 of 2:") as error:
        crop(batch)
    tools.one_sentence(error)
    with pytest.raises(ValueError, match="Face 3 is not there in the picture, which has 3 ") as error:
        crop(group[0], face=3)
    tools.one_sentence(error)
    skipped, preview = crop(batch, if_none="skip the picture")
    assert skipped.shape[0] == 1 and preview.shape[0] == 2
    with pytest.raises(ValueError, match="None of 1 pictures") as error:
        crop(empty, if_none="skip the picture")
    tools.one_sentence(error)
    whole, _ = crop(batch, if_none="whole picture")
    assert whole.shape == (2, 128, 128, 3) and torch.equal(whole[1], empty[0])
    wide = torch.full((1, 128, 300, 3), 0.5)
    for alignment in ("as it is", "upright"):
        assert crop(wide, if_none="whole picture", alignment=alignment)[0].shape == (1, 128, 128, 3)


@pytest.mark.parametrize(
    ("text", "words"), [("big", "detection_sizes are 'big'"), ("100", "multiple of 32"), ("", "are ''")]
)
def test_wrong_detection_sizes_are_refused(crop, people, tools, text, words):
    with pytest.raises(ValueError, match=words) as error:
        crop(people[0][:1, 0], detection_sizes=text)
    tools.one_sentence(error)


def test_the_preview_marks_every_face_and_the_taken_one_in_green(crop, group):
    picture, _ = group
    for taken in (0, 2):
        _, preview = crop(picture, order="left to right", face=taken)
        changed = (preview - picture).abs().amax(-1)[0] > 0.02
        green = (preview[0] - torch.tensor([80, 220, 100]) / 255).abs().amax(-1) < 0.01
        near = [
            (slice(max(0, y - 100), y + 100), slice(max(0, x - 100), x + 100))
            for x, y in ((120, 120), (388, 132), (224, 376))
        ]
        assert all(changed[place].sum() > 50 for place in near)
        assert [bool(green[place].sum() > 50) for place in near] == [taken == 0, taken == 2, False]


def test_grey_transparent_and_half_precision_pictures_are_cropped(crop, people):
    image = people[0][:1, 0]
    assert crop(torch.cat([image, torch.ones_like(image[..., :1])], -1))[0].shape[-1] == 3
    assert crop(image.half())[0].dtype == torch.float32
    assert crop(image.mean(-1, keepdim=True), threshold=0.2, if_none="whole picture")[0].shape[-1] == 3


@pytest.fixture
def identity(pack, analysis):
    pytest.importorskip("onnx2torch")
    return lambda image, **options: pack.nodes["LookaheadIdentityLoss"].execute(analysis, image, **options).result[0]


def as_preview(image):
    return image.movedim(-1, 1) * 2 - 1


def gradient(pack, value, preview):
    """What a sampler does: load the networks, start the loss, differentiate it. Called in inference mode."""
    import comfy.model_management

    bind_rng = pack.module("lookahead.losses.base").bind_rng
    with torch.inference_mode(False), torch.enable_grad():
        comfy.model_management.load_models_gpu(list(value.patchers))
        leaf = preview.clone().requires_grad_(True)
        values, valid = bind_rng(value.loss, torch.Generator())(leaf)
        (slope,) = torch.autograd.grad(values[valid].sum(), leaf)
    return values.detach(), slope


def test_the_loss_node_knows_a_person_and_its_gradient_makes_others_like_them(pack, identity, people):
    value = identity(people[0][:1, 0])
    assert value.name == "identity" and len(value.patchers) == 1
    previews = as_preview(people[0][:, 1])
    values, slope = gradient(pack, value, previews)
    assert values[0] + 0.3 < values[1:].min()
    moved, _ = gradient(pack, value, previews - 20 * slope)
    assert (moved[1:] < values[1:] - 0.05).all()


def test_several_pictures_are_one_person_or_one_each(identity, people):
    references = people[0][:2, 0]
    both, each = identity(people[0][0]), identity(references, several="one per picture")
    assert len(both.loss.references.embeddings) == 1 and len(each.loss.references.embeddings) == 2
    values, valid = each.loss(as_preview(references))
    assert valid.all() and values.max() < 1e-4


@pytest.mark.contract
def test_weights_come_through_being_unloaded_and_loaded_again(pack, identity, people):
    import comfy.model_management

    value, previews = identity(people[0][:1, 0]), as_preview(people[0][:2, 1])
    before = gradient(pack, value, previews)
    comfy.model_management.unload_all_models()
    after = gradient(pack, value, previews)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not any(p.is_inference() for p in value.patchers[0].model.parameters())


def test_a_recogniser_in_torch_is_read_from_the_losses_folder(pack, identity, people, tools):
    recognisers = pack.module("lookahead.vision.arcface")
    folder = pack.base / "models/lookahead_losses"
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    with torch.inference_mode(False):
        network = recognisers.IR([2, 2, 2, 2], squeezed=True).eval()
        torch.save(network.state_dict(), folder / "model_ir_se18.pth")
        (folder / "vgg16-397923af.pth").touch()
        torch.save({"x.weight": torch.zeros(2)}, folder / "other.pth")
    options = pack.nodes["LookaheadIdentityLoss"].define_schema().inputs[3].options
    assert options == ["of the face pack", "model_ir_se18.pth", "other.pth"]
    value = identity(people[0][:1, 0], recogniser="model_ir_se18.pth")
    assert value.loss.references.embeddings.shape == (1, 512)
    values, slope = gradient(pack, value, as_preview(people[0][1:2, 0]))
    assert slope.isfinite().all() and slope.abs().max() > 0
    known = pack.nodes["LookaheadIdentityLoss"].fingerprint_inputs
    chosen = {"recogniser": "model_ir_se18.pth", "several": "average", "no_face": "skip"}
    before = known(**chosen)
    assert before == known(**chosen) != known(**{**chosen, "recogniser": options[0]})
    (folder / "model_ir_se18.pth").touch()  # as if replaced
    assert known(**chosen) != before
    with pytest.raises(ValueError, match="no face recogniser of a known layout") as error:
        identity(people[0][:1, 0], recogniser="other.pth")
    assert str(error.value).startswith("other.pth")
    for name in ("model_ir_se18.pth", "vgg16-397923af.pth", "other.pth"):
        (folder / name).unlink()


def test_views_are_asked_for_and_a_graph_from_before_them_has_the_one_crop(pack, identity, people):
    one, viewed = identity(people[0][:1, 0]), identity(people[0][:1, 0], views=3)
    x = as_preview(people[0][1:2, 0])
    (plain, _), (mean, slope) = gradient(pack, one, x), gradient(pack, viewed, x)
    assert (one.loss.views.count, viewed.loss.views.count) == (0, 3)
    assert not torch.equal(plain, mean) and slope.isfinite().all() and slope.abs().max() > 0


def test_a_reference_without_a_face_is_refused(identity, tools):
    with pytest.raises(ValueError, match="No face was found in the reference") as error:
        identity(torch.full((1, 128, 128, 3), 0.5))
    tools.one_sentence(error)


@pytest.fixture
def several(pack, analysis):
    pytest.importorskip("onnx2torch")
    node = pack.nodes["LookaheadPeopleLoss"]
    return lambda one, other, **given: node.execute(analysis, person_1=one, person_2=other, **given).result[0]


def test_the_loss_node_tells_two_people_in_one_picture_apart(pack, several, people):
    """In either order of the people and of the faces; by masks or from left to right in the right one alone."""
    one, other = people[0][:1, 0], people[0][1:2, 0]
    drawn, swapped = (as_preview(torch.cat([people[0][a, 1], people[0][b, 1]], 1)[None]) for a, b in ((0, 1), (1, 0)))
    value = several(one, other)
    assert value.name == "identity of 2 people" and len(value.patchers) == 1
    (right,), slope = gradient(pack, value, drawn)
    assert all(half.isfinite().all() and half.abs().max() > 0 for half in slope.chunk(2, -1))
    for order, previews in (((one, other), swapped), ((other, one), drawn)):
        assert abs(gradient(pack, several(*order), previews)[0][0] - right) < 0.02
    places = dict(zip(("mask_1", "mask_2"), pack.nodes["LookaheadPlaceMasks"].execute().result, strict=False))
    for options in (places, {"matching": "from left to right"}):
        value = several(one, other, **options)
        assert abs(gradient(pack, value, drawn)[0][0] - right) < 1e-5
        assert gradient(pack, value, swapped)[0][0] > right + 0.3


def test_a_person_without_a_face_and_a_mask_without_a_place_are_refused_by_name(several, people, tools):
    one = people[0][:1, 0]
    with pytest.raises(ValueError, match="For person_2: no face was found in the reference") as error:
        several(one, torch.full((1, 128, 128, 3), 0.5))
    tools.one_sentence(error)
    with pytest.raises(ValueError, match="The mask_1 is below 0.5 everywhere") as error:
        several(one, one, mask_1=torch.zeros(1, 8, 8))
    tools.one_sentence(error)


def test_a_pack_without_a_recogniser_asks_for_one(pack, identity, people, models, tools, analysis, monkeypatch):
    monkeypatch.setattr(analysis, "recogniser", None)
    with pytest.raises(ValueError, match="face pack mini has no recogniser") as error:
        identity(people[0][:1, 0])
    tools.one_sentence(error)


@pytest.mark.contract
def test_the_identity_loss_combines_with_others(pack, identity, people):
    pytest.importorskip("lpips")
    references = people[0][:1, 0]
    layout = (
        pack.nodes["LookaheadLPIPSLoss"].execute(references, backbone="squeeze", weights="random", size=32).result[0]
    )
    both = pack.nodes["LookaheadCombineLosses"].execute(loss_a=identity(references), loss_b=layout).result[0]
    values, slope = gradient(pack, both, as_preview(people[0][:2, 1]))
    assert len(both.patchers) == 2 and values[0] < values[1] and slope.isfinite().all()
