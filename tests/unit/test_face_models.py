"""Packs of face models, run by the real insightface over the mini pack; drawn faces know where their landmarks are."""

import shutil
import sys

import pytest
import torch
from lcm_lookahead.lookahead.vision import face_models
from lcm_lookahead.lookahead.vision.face_models import FaceModelError, FaceModels, licence_of, pack_folder
from lcm_lookahead.mini.plan import WEIGHTS
from lcm_lookahead.mini.world import data
from lcm_lookahead.mini.world.faces import STYLES, landmarks, render
from offline import forbid_network
from sentences import one_sentence
from torch.nn import functional as F

pytest.importorskip("insightface")
pytest.importorskip("onnxruntime")

PACK = WEIGHTS / "insightface/models/mini"


@pytest.fixture(scope="module")
def models():
    return FaceModels(PACK, threads=1)


@pytest.fixture(scope="module")
def drawn():
    """Photos of six held-out people, [6, 3, 128, 128], and the landmarks that they were drawn with."""
    faces = data.group_of_people("held_out", 30, STYLES)
    faces = faces.rows((faces.nuisance["style"] == 0).nonzero()[:6, 0])
    return render(faces, 128, seed=4), landmarks(faces, 128) - 0.5


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    forbid_network(monkeypatch)


def test_the_drawn_faces_are_found_where_they_are(models, drawn):
    pictures, points = drawn
    found = models(pictures)
    assert [len(faces) for faces in found] == [1] * len(pictures)
    for (face,), true in zip(found, points, strict=True):
        assert (face.points - true).norm(dim=-1).mean() < 0.12 * (true[1] - true[0]).norm()
        assert face.box[0] < true[0, 0] < face.box[2] and face.box[1] < true[2, 1] < face.box[3]
        assert face.score > 0.5
    empty, outside = torch.full((1, 3, 128, 128), 0.5), pictures[:1] * 3 - 1
    assert models(empty) == [[]]
    assert len(models(outside)[0]) == 1  # a preview's values are clamped, they do not wrap around


def test_red_and_blue_are_not_exchanged(models, drawn):
    picture = drawn[0][0]
    seen = face_models.as_bgr(picture)
    assert seen.shape == (128, 128, 3) and seen.flags["C_CONTIGUOUS"]
    assert (torch.from_numpy(seen[..., 2].copy()).float() / 255 - picture[0]).abs().max() < 0.003


def test_a_face_in_a_large_wide_picture_is_found_at_its_own_place(models, drawn):
    pictures, points = drawn
    wide = torch.full((1, 3, 300, 512), 0.4)
    wide[:, :, 20:276, 200:456] = F.interpolate(pictures[:1], scale_factor=2, mode="bilinear")
    ((face,),) = models(wide)
    true = points[0] * 2 + 0.5 + torch.tensor([200.0, 20.0])
    assert (face.points - true).norm(dim=-1).mean() < 0.2 * (true[1] - true[0]).norm()


def test_the_threshold_and_the_sizes_are_asked_at_each_call(models, drawn):
    assert models.find(drawn[0][:1], threshold=0.999) == [[]]
    assert len(models.find(drawn[0][:1], threshold=0.5)[0]) == 1
    for wrong in ((), (100,), (640, 0), (-32,)):
        with pytest.raises(ValueError, match="multiple of 32") as error:
            models.find(drawn[0][:1], sizes=wrong)
        one_sentence(error)


def any_size(path):
    """The mini detector with its input's height and width left open, as the public ones have them."""
    import onnx

    model = onnx.load(PACK / "det_mini.onnx")
    for axis, name in ((2, "height"), (3, "width")):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = name
    for value in model.graph.output:
        value.type.tensor_type.shape.dim[0].dim_param = value.name + "_rows"
    del model.graph.value_info[:]
    onnx.save(model, path)


def test_a_detector_of_any_size_looks_at_each_size_and_reports_a_face_once(tmp_path, drawn):
    any_size(tmp_path / "det.onnx")
    models = FaceModels(tmp_path, threads=1)
    assert models.only_size is None and FaceModels(PACK, threads=1).only_size == 128
    assert models.recogniser is None
    pictures, points = drawn
    asked = []
    session_for = models._detector._session_for_input_size
    models._detector._session_for_input_size = lambda size: asked.append(size) or session_for(size)
    ((face,),) = models.find(pictures[:1], sizes=(160, 128, 96))
    assert asked == [(160, 160), (128, 128), (96, 96)]
    assert (face.points - points[0]).norm(dim=-1).mean() < 0.2 * (points[0, 1] - points[0, 0]).norm()


@pytest.mark.parametrize("shape", [(3, 4000), (10, 4000), (4000, 10), (32, 8000)])
def test_a_strip_has_no_face_for_a_detector_of_one_size_or_of_any(models, tmp_path, drawn, shape):
    """Made as small as the smallest size, nothing is left of it, which insightface does not survive."""
    strip = torch.rand(1, 3, *shape)
    shutil.copytree(PACK, tmp_path / "any")
    any_size(tmp_path / "any" / "det_mini.onnx")
    for pack in (models, FaceModels(tmp_path / "any", threads=1)):
        assert pack.find(strip) == pack.embed(strip) == [[]]
        assert pack.find(strip, sizes=(640, 128)) == [[]]
    assert [len(faces) for faces in models.embed(drawn[0][:2])] == [1, 1]


def test_the_pack_s_recogniser_is_known_and_its_session_dropped(models):
    assert models.recogniser == PACK.resolve() / "rec_mini.onnx" and models.preprocessing is None
    assert models.name == "mini"


def test_a_manifest_s_preprocessing_goes_with_the_recogniser(tmp_path):
    import json

    shutil.copytree(PACK, tmp_path / "pack")
    tasks = {"detection": {"file": "det_mini.onnx"}}
    tasks["recognition"] = {"file": "rec_mini.onnx", "preprocessing": "embedded", "embedding_dimension": 128}
    manifest = {"manifest_version": 2, "model_id": "mini", "license": "MODEL.LICENSE", "tasks": tasks}
    (tmp_path / "pack/manifest.json").write_text(json.dumps(manifest))
    assert FaceModels(tmp_path / "pack", threads=1).preprocessing == (0.0, 1.0)


def test_a_pack_that_its_archive_nested_is_found(tmp_path):
    shutil.copytree(PACK, tmp_path / "antelopev2/antelopev2", ignore=shutil.ignore_patterns("LICENSE"))
    assert pack_folder(tmp_path / "antelopev2") == tmp_path / "antelopev2/antelopev2"
    models = FaceModels(tmp_path / "antelopev2", threads=1)
    assert models.name == "antelopev2" and "non-commercial" in models.licence
    shutil.copytree(PACK, tmp_path / "antelopev2/other")
    assert pack_folder(tmp_path / "antelopev2") is None  # which of them?


def test_a_missing_or_empty_pack_is_an_error_and_no_download(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "buffalo_l", tmp_path / "empty"):
        with pytest.raises(FileNotFoundError, match="no .onnx files") as error:
            FaceModels(folder)
        one_sentence(error)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty"]


def broken(folder, how: str):
    import onnx

    shutil.copytree(PACK, folder)
    if how == "damaged":
        (folder / "det_mini.onnx").write_bytes(b"\x00 not an onnx")
    elif how == "no detector":
        (folder / "det_mini.onnx").unlink()
    else:  # six outputs: no landmarks
        model = onnx.load(folder / "det_mini.onnx")
        del model.graph.output[6:]
        onnx.save(model, folder / "det_mini.onnx")
    return folder


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("damaged", "cannot be opened .* det_mini.onnx, rec_mini.onnx is damaged"),
        ("no detector", "no face detector among rec_mini.onnx"),
        ("no landmarks", "finds no landmarks"),
    ],
)
def test_a_pack_that_cannot_be_used_is_refused_in_one_sentence(tmp_path, how, words):
    with pytest.raises(FaceModelError, match=words) as error:
        FaceModels(broken(tmp_path / "pack", how), threads=1)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("missing", ["insightface", "onnxruntime"])
def test_without_a_package_it_is_said_what_to_install(monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=f"no {missing}: run .pip install insightface onnxruntime.") as error:
        FaceModels(PACK)
    one_sentence(error)


def test_an_insightface_of_before_several_sizes_is_refused(monkeypatch):
    monkeypatch.setattr(face_models.importlib.metadata, "version", lambda name: "0.7.3")
    with pytest.raises(ImportError, match="insightface 0.7.3 is too old"):
        FaceModels(PACK)


def test_a_gpu_that_onnxruntime_was_not_built_for_is_refused():
    import onnxruntime

    if len(onnxruntime.get_available_providers()) > 2:
        pytest.skip("this onnxruntime was built for a GPU")
    with pytest.raises(FaceModelError, match="computes on the CPU only"):
        FaceModels(PACK, gpu=True)


def test_the_licence_is_the_pack_s_own_file_else_what_its_name_tells(tmp_path):
    for name, words in (("buffalo_l", "non-commercial"), ("auraface", "Apache"), ("mine", "unknown")):
        (tmp_path / name).mkdir()
        assert words in licence_of(tmp_path / name)
    (tmp_path / "buffalo_l/MODEL.LICENSE").write_text("\n  My own terms\nand more")
    assert licence_of(tmp_path / "buffalo_l") == "My own terms (see MODEL.LICENSE)"
