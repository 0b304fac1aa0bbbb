"""The mini face models: insightface's own FaceAnalysis runs the pack, and the stages that made it resume."""

import dataclasses

import numpy as np
import pytest
import torch
from lcm_lookahead.evaluation.stats import auc
from lcm_lookahead.lookahead.vision import faces
from lcm_lookahead.lookahead.vision.face_models import as_bgr
from lcm_lookahead.mini.files import insightface_pack, weights
from lcm_lookahead.mini.plan import QUICK, WEIGHTS
from lcm_lookahead.mini.report import measure_faces
from lcm_lookahead.mini.stages import detector, face_recogniser, stage
from lcm_lookahead.mini.stages.face_networks import CROP, DETECTOR_SIZE, FaceDetector, FaceRecogniser
from lcm_lookahead.mini.world import data
from lcm_lookahead.mini.world.faces import STYLES, landmarks, render
from offline import forbid_network

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("insightface")

TINY = dataclasses.replace(QUICK, people=20, detector_steps=2, face_recogniser_steps=2)
PEOPLE, PER_PERSON = 30, len(STYLES) + 1


@pytest.fixture(scope="module")
def held_out():
    """30 people whom nothing was trained on, nine pictures each: (pictures, style, landmarks as insightface counts)."""
    faces = data.group_of_people("held_out", PEOPLE, STYLES)
    return render(faces, 128, seed=4), faces.nuisance["style"], landmarks(faces, 128) - 0.5


@pytest.fixture(scope="module")
def app():
    return insightface_pack.load()


@pytest.fixture(scope="module")
def found(app, held_out):
    return measure_faces.look(app, held_out[0])


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return data.pictures(tmp_path_factory.mktemp("drawn"), "train", TINY.people, TINY.styles, 128)


@pytest.fixture
def no_network(monkeypatch):
    forbid_network(monkeypatch)


def test_insightface_finds_the_pack_by_name_and_root_without_network(no_network, held_out, monkeypatch, tmp_path):
    from insightface.app import FaceAnalysis

    monkeypatch.chdir(tmp_path)  # where a folder bears the pack's name, as in this repository, it would be taken for it

    app = FaceAnalysis(name="mini", root=str(WEIGHTS / "insightface"), providers=["CPUExecutionProvider"])
    app.prepare(ctx_id=-1, det_size=(640, 640))  # what most code asks for; the detector keeps to its own size
    assert set(app.models) == {"detection", "recognition"}
    faces = app.get(as_bgr(held_out[0][0]))
    assert len(faces) == 1
    assert faces[0].kps.shape == (5, 2) and faces[0].embedding.shape == (128,)


def test_a_missing_pack_is_an_error_and_no_download(no_network, tmp_path):
    with pytest.raises(FileNotFoundError, match="det_mini.onnx"):
        insightface_pack.load(tmp_path)


def test_every_style_s_faces_are_found_with_landmarks_near_the_drawn_ones(found, held_out):
    _, style, points = held_out
    wrong = measure_faces.landmark_error(found.points, points)
    for index in style.unique():
        rows = style == index
        assert found.there[rows].float().mean() >= 0.95, STYLES[index]
        assert wrong[rows & found.there].mean() < 0.12, STYLES[index]
    nearest = torch.cdist(found.points[found.there], points[found.there]).argmin(-1)
    assert (nearest == torch.arange(5)).float().mean() > 0.97, "landmarks are near others than their own"


def test_places_without_a_person_hold_no_face(app):
    empty = detector.empty_pictures(80, seed=5000).float() / 255
    assert measure_faces.look(app, empty).there.float().mean() <= 0.05


def test_two_faces_side_by_side_are_both_found(app, held_out):
    pictures, style, _ = held_out
    photos = torch.nn.functional.interpolate(pictures[style == 0][:8], scale_factor=0.5, mode="area")
    pair = torch.full((4, 3, 128, 128), 0.5)
    pair[:, :, 32:96, :64], pair[:, :, 32:96, 64:] = photos[:4], photos[4:]
    assert (measure_faces.look(app, pair).faces == 2).float().mean() >= 0.75


def test_embeddings_tell_people_apart_from_photo_to_styled_picture(found):
    seen = found.embedding.view(PEOPLE, PER_PERSON, -1)
    similarity = torch.einsum("rpd,sd->rps", seen[:, 2:], seen[:, 0])
    own = torch.eye(PEOPLE, dtype=torch.bool)[:, None].expand_as(similarity)
    assert auc(similarity[own], similarity[~own]) > 0.95


def test_the_recogniser_in_torch_embeds_as_insightface_does(app, held_out):
    """The alignment too: insightface cuts bytes with OpenCV, torch cuts numbers."""
    pictures, _, points = held_out
    net = weights.face_recogniser()
    rows = torch.arange(0, len(pictures), 13)
    from insightface.utils import face_align

    crops = [face_align.norm_crop(as_bgr(pictures[i]), points[i].numpy(), CROP) for i in rows]
    theirs = torch.from_numpy(app.models["recognition"].get_feat(crops))
    with torch.no_grad():
        same_crop = net(torch.from_numpy(np.stack(crops)[..., ::-1].copy()).permute(0, 3, 1, 2) / 127.5 - 1)
        own_crop = net(faces.align(pictures[rows], points[rows]) * 2 - 1)
    assert (same_crop - theirs).abs().max() < 1e-3
    assert torch.cosine_similarity(own_crop, theirs).min() > 0.999


def test_the_torch_alignment_passes_gradients_to_the_picture():
    picture = torch.rand(1, 3, 64, 64, requires_grad=True)
    points = faces.TEMPLATE[None] / 2 + 3
    faces.align(picture, points).sum().backward()
    assert picture.grad.isfinite().all() and (picture.grad != 0).float().mean() > 0.5


def outputs(path, x):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return [torch.from_numpy(y) for y in session.run(None, {"input.1": x.numpy()})]


def test_exported_graphs_give_what_the_torch_modules_give(tmp_path):
    torch.manual_seed(0)
    nets = FaceDetector(), FaceRecogniser()
    for net, size in zip(nets, (DETECTOR_SIZE, CROP), strict=True):
        for _ in range(2):  # norms that are not those of a fresh network
            net(torch.randn(4, 3, size, size))
        for t in net.state_dict().values():
            if t.is_floating_point():
                t.copy_(t.half().float())
        net.eval()
    insightface_pack.write_detector(nets[0], tmp_path / "det.onnx")
    insightface_pack.write_recogniser(nets[1], tmp_path / "rec.onnx")
    for net, size, name in zip(nets, (DETECTOR_SIZE, CROP), ("det", "rec"), strict=True):
        x = torch.randn(1, 3, size, size)
        with torch.no_grad():
            expected = net(x)
        expected = expected if isinstance(expected, tuple) else (expected,)
        got = outputs(tmp_path / f"{name}.onnx", x)
        assert len(got) == len(expected)
        assert max((a - b).abs().max() for a, b in zip(got, expected, strict=True)) < 1e-3
    assert not list(tmp_path.glob("*.part"))
    with pytest.raises(ValueError, match="training mode"):
        insightface_pack.write_detector(FaceDetector(), tmp_path / "x.onnx")


@pytest.mark.parametrize("train", [detector.train, face_recogniser.train])
def test_a_face_stage_that_was_stopped_ends_as_one_that_was_not(tmp_path, drawn, monkeypatch, train):
    monkeypatch.setattr(stage, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(detector, "empty_pictures", lambda n, seed, styles: torch.zeros(8, 3, 128, 128).byte())
    name = train.__module__.rsplit(".", 1)[-1]
    results = []
    for folder, stops in ((tmp_path / "whole", False), (tmp_path / "cut", True)):
        folder.mkdir()
        if stops:
            numbers_of_step = stage.numbers_of_step

            def stop(seed, step, numbers_of_step=numbers_of_step):
                if step == 1:
                    raise KeyboardInterrupt
                return numbers_of_step(seed, step)

            with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
                m.setattr(stage, "numbers_of_step", stop)
                train(folder, drawn, TINY)
            assert (folder / f"{name}.state").exists()
        train(folder, drawn, TINY)
        assert not (folder / f"{name}.state").exists()
        results.append(stage.read_tensors(folder / f"{name}.safetensors"))
    assert all(torch.equal(v, results[1][k]) for k, v in results[0].items())


def test_scenes_tell_where_their_faces_are(drawn, monkeypatch):
    """A face that was drawn with dark pupils has them where the scene says, whatever its size."""
    monkeypatch.setattr(detector, "disturb", lambda x, numbers: x)
    source = detector.source(drawn, "train", TINY.people, TINY, empty=20)
    dark = []
    for step in range(3):
        scenes = detector.scenes(source, stage.numbers_of_step(0, step))
        assert scenes.picture.min() >= 0 and scenes.picture.max() <= 1
        assert scenes.there.sum(1).tolist() == [2] * detector.TWO + [1] * detector.ONE + [0] * detector.EMPTY
        for picture, box, points in zip(scenes.picture[:26], scenes.box[:26, 0], scenes.points[:26, 0], strict=True):
            assert (points >= box[:2] - 1).all() and (points <= box[2:] + 1).all()
            if box[3] - box[1] > 60:
                eyes = points[:2].round().long()
                if (eyes >= 1).all() and (eyes < 127).all():
                    around = torch.stack([picture[:, y - 1 : y + 2, x - 1 : x + 2].mean((1, 2)) for x, y in eyes])
                    dark.append(around.mean() < picture.mean() + 0.1)
    assert len(dark) > 20 and torch.stack(dark).float().mean() > 0.6
    sizes = (scenes.box[:, 0, 3] - scenes.box[:, 0, 1])[:26]
    assert sizes.min() < 60 and sizes.max() > 70


def test_the_pair_loss_wants_a_person_s_pictures_alike_by_a_margin():
    torch.manual_seed(0)
    people = torch.nn.functional.normalize(torch.randn(8, 32), dim=1)
    right = face_recogniser.pair_loss(torch.cat([people, people]))
    wrong = face_recogniser.pair_loss(torch.cat([people, people.roll(1, 0)]))
    assert right < 0.1 < 5 < wrong


def test_rank_correlation_knows_agreement_from_chance():
    numbers = torch.Generator().manual_seed(0)
    ours = torch.nn.functional.normalize(torch.randn(40, 4, 8, generator=numbers), dim=-1)
    other = torch.nn.functional.normalize(torch.randn(40, 4, 8, generator=numbers), dim=-1)
    identity = torch.randn(40, 5, generator=numbers)
    same = measure_faces.rank_correlation(ours, ours, identity, rounds=5)
    chance = measure_faces.rank_correlation(ours, other, identity, rounds=50)
    assert all(abs(f.value - 1) < 1e-6 for f in same.values())
    assert all(abs(f.value) < 0.35 and f.low < f.value < f.high for f in chance.values())


def test_landmarks_that_form_no_face_fit_the_template_badly(held_out):
    points = held_out[2]
    shuffled = points[:, [2, 4, 0, 1, 3]]
    assert faces.misfit(points).max() < 12 < faces.misfit(shuffled).min()
