"""The identity loss on drawn people, with the mini pack's real detector and recogniser."""

import logging

import pytest
import torch
from lcm_lookahead.lookahead.losses.base import Combined, bind_rng
from lcm_lookahead.lookahead.losses.face_views import FaceViews
from lcm_lookahead.lookahead.losses.identity import FaceReferences, IdentityLoss, NoFaceError, embed, read_references
from lcm_lookahead.lookahead.losses.l1 import L1Loss
from lcm_lookahead.lookahead.vision.arcface import read
from lcm_lookahead.lookahead.vision.face_models import FaceModels
from lcm_lookahead.lookahead.vision.faces import Face, misfit, umeyama
from lcm_lookahead.mini.plan import WEIGHTS
from lcm_lookahead.mini.world import data
from lcm_lookahead.mini.world.faces import STYLES, render
from torch.nn import functional as F

pytest.importorskip("insightface")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnx2torch")

PACK = WEIGHTS / "insightface/models/mini"
EMPTY = torch.full((3, 128, 128), 0.5)


@pytest.fixture(scope="module")
def detector():
    return FaceModels(PACK, threads=1)


@pytest.fixture(scope="module")
def recogniser():
    return read(PACK / "rec_mini.onnx")


@pytest.fixture(scope="module")
def drawn():
    """[8 people, 3 pictures of each, 3, 128, 128]: two photos and a styled picture."""
    faces = data.group_of_people("held_out", 8, STYLES)
    return render(faces, 128, seed=4).view(8, -1, 3, 128, 128)[:, :3]


@pytest.fixture(scope="module")
def identity(detector, recogniser):
    """The loss towards pictures, as for one run."""

    def make(pictures, average=True, **options):
        people = read_references(recogniser, detector, list(pictures), average)
        return bind_rng(IdentityLoss(recogniser, detector, people, **options), torch.Generator())

    return make


def preview(pictures: torch.Tensor) -> torch.Tensor:
    return pictures * 2 - 1


def test_the_value_is_one_minus_the_cosine_of_insightface_s_own_embeddings(identity, drawn):
    from lcm_lookahead.lookahead.vision.face_models import find_and_embed, open_app

    app = open_app(PACK, threads=1)
    pictures = drawn[:4, :2].flatten(0, 1)
    theirs = torch.stack([torch.from_numpy(faces[0].normed_embedding) for faces in find_and_embed(app, pictures)])
    theirs = theirs.view(4, 2, -1)
    loss = identity(drawn[:4, 0], average=False)
    values, valid = loss(preview(drawn[:4, 1]))
    assert valid.all() and values.dtype == torch.float32
    assert (values - (1 - (theirs[:, 0] * theirs[:, 1]).sum(-1))).abs().max() < 0.02


def test_a_person_is_nearer_to_their_own_reference_than_to_others(identity, drawn):
    loss = identity(drawn[:, 0], average=False)
    own, _ = loss(preview(drawn[:, 1]))
    other, _ = loss(preview(drawn[:, 1]), rows=torch.arange(8).roll(1) + 8)
    assert own.mean() + 0.4 < other.mean()
    same, _ = loss(preview(drawn[:2, 0].repeat(2, 1, 1, 1)), rows=torch.tensor([0, 1, 1, 0]))
    assert same[:2].max() < 1e-4 and same[2:].min() > 0.1


def test_references_go_to_the_previews_in_turn_when_no_rows_are_given(identity, drawn):
    loss = identity(drawn[:2, 0], average=False)
    values, _ = loss(preview(drawn[[0, 1, 0], 0]))
    assert values.max() < 1e-4


def test_several_pictures_of_one_person_are_averaged_and_one_without_a_face_is_left_out(identity, drawn, caplog):
    pictures = [drawn[0, 0], EMPTY, drawn[0, 1]]
    with caplog.at_level(logging.WARNING):
        loss = identity(pictures)
    assert "1 of 3 reference pictures" in caplog.text
    alone = [identity([picture]).references.embeddings for picture in (drawn[0, 0], drawn[0, 1])]
    assert torch.allclose(loss.references.embeddings, F.normalize(alone[0] + alone[1], dim=-1), atol=1e-6)


def test_a_reference_without_a_face_is_refused(identity, drawn):
    with pytest.raises(NoFaceError, match="No face was found in the reference:"):
        identity([EMPTY])
    with pytest.raises(NoFaceError, match="in reference picture 2 of 2:"):
        identity([drawn[0, 0], EMPTY], average=False)


def test_descending_the_gradient_brings_the_value_down(identity, drawn):
    loss = identity([drawn[0, 0]])
    x = preview(drawn[1:3, 0]).requires_grad_()
    values, _ = loss(x)
    values.sum().backward()
    assert x.grad.isfinite().all() and (x.grad.flatten(1) != 0).any(1).all()
    better, _ = loss((x - 20 * x.grad).detach())
    assert (better < values - 0.05).all()


def test_the_gradient_is_that_of_finite_differences(detector, drawn):
    """In float64, with the landmarks held: they carry no gradient. Away from -1 and 1, where previews are clamped."""
    double, pictures = read(PACK / "rec_mini.onnx").double(), drawn[:2, 0].double()
    found = [faces[0] for faces in detector(drawn[:2, 0])]
    people = FaceReferences(
        F.normalize(torch.randn(1, 128, generator=torch.Generator().manual_seed(1)), dim=-1), None, None
    )
    loss = IdentityLoss(double, lambda pictures: [[face] for face in found], people)
    x, g = (preview(pictures) * 0.9).requires_grad_(), torch.Generator().manual_seed(0)
    loss(x)[0].sum().backward()
    for _ in range(3):
        step = torch.randn(x.shape, generator=g, dtype=torch.float64)
        with torch.no_grad():
            up, down = (loss(x + sign * 1e-8 * step)[0].sum() for sign in (1, -1))
        assert (up - down).item() / 2e-8 == pytest.approx((x.grad * step).sum().item(), rel=1e-5)


def test_one_preview_s_gradient_does_not_depend_on_the_others(identity, drawn):
    loss = identity([drawn[0, 0]])
    x = preview(drawn[1:4, 0]).requires_grad_()
    loss(x)[0].sum().backward()
    alone = preview(drawn[2:3, 0]).requires_grad_()
    loss(alone)[0].sum().backward()
    assert torch.allclose(x.grad[1], alone.grad[0], atol=1e-6)


def test_views_repeat_with_the_run_s_seed_and_change_from_call_to_call(identity, drawn):
    x, loss = preview(drawn[1:3, 0]), identity([drawn[0, 0]], views=FaceViews(3))
    first, second = (bind_rng(loss, torch.Generator().manual_seed(5))(x)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, bind_rng(loss, torch.Generator().manual_seed(6))(x)[0])
    run = bind_rng(loss, torch.Generator().manual_seed(5))
    assert torch.equal(run(x)[0], first) and not torch.equal(run(x)[0], first)


def test_without_views_or_a_run_the_one_crop_counts(identity, recogniser, detector, drawn):
    x = preview(drawn[1:3, 0])
    plain = identity([drawn[0, 0]])
    values = plain(x)[0]
    assert torch.equal(identity([drawn[0, 0]], views=FaceViews(0))(x)[0], values)
    assert torch.equal(IdentityLoss(recogniser, detector, plain.references, views=FaceViews(3))(x)[0], values)
    still = FaceViews(3, turn=0.0, scale=0.0, shift=0.0, light=0.0, grain=0.0)
    assert torch.allclose(identity([drawn[0, 0]], views=still)(x)[0], values, atol=1e-5)


def test_a_view_is_a_small_similarity_of_the_crop(recogniser):
    place, g = face(0).points.expand(200, -1, -1), torch.Generator().manual_seed(0)
    views = FaceViews(1)
    matrix = umeyama(views._moved(place, g), place[0])
    turn = torch.atan2(matrix[:, 1, 0], matrix[:, 0, 0]).abs()
    zoom = matrix[:, :, 0].norm(dim=1).log().abs()
    assert 0.9 * views.turn < turn.max() <= views.turn + 1e-4
    assert 0.9 * views.scale < zoom.max() <= views.scale + 1e-4
    assert misfit(views._moved(place, g)).allclose(misfit(place), rtol=1e-3)
    size = 2 * (place[0] - place[0].mean(0)).norm(dim=-1).mean()
    assert (views._moved(place, g) - place).mean(1).abs().max() <= views.shift * size + 1e-3


def test_what_descends_over_views_pleases_views_that_it_has_not_seen(identity, drawn):
    """Eight pictures of other people, each moved as far in its pixels: what pleases one crop holds less outside of it
    (.21 without views, .16 with them, standard error of the difference .011)."""

    def seen_otherwise(views):
        loss, x = identity(drawn[:, 0], average=False, views=views), preview(drawn[:, 1].roll(1, 0))
        for _ in range(16):
            x.requires_grad_()
            slope = torch.autograd.grad(loss(x)[0].sum(), x)[0]
            x = (x - 1.6 * slope / slope.flatten(1).norm(dim=1).view(-1, 1, 1, 1)).detach().clamp(-1, 1)
        fresh = identity(drawn[:, 0], average=False, views=FaceViews(16))
        return bind_rng(fresh, torch.Generator().manual_seed(99))(x)[0]

    plain, viewed = seen_otherwise(None), seen_otherwise(FaceViews(4))
    gain = plain - viewed
    assert gain.mean() > 3 * gain.std() / len(gain) ** 0.5


class Seen:
    """A detector that answers from a list, a call an entry."""

    def __init__(self, *answers):
        self.answers = list(answers)

    def __call__(self, pictures):
        return self.answers.pop(0)


def face(shift: float, width: float = 40.0) -> Face:
    points = torch.tensor([[40.0, 50], [70, 50], [55, 65], [43, 85], [68, 85]]) + shift
    return Face(torch.tensor([30.0, 30, 30 + width, 90]) + shift, points, 0.9)


def seeing(recogniser, *answers, fallback="last"):
    """A loss whose detector gives these answers, and whose reference's face is where face(0) is, at half the size."""
    points = face(0).points[None] / 2 - 0.25
    people = FaceReferences(F.normalize(torch.ones(1, 128), dim=-1), points, torch.tensor([[64, 64]]))
    return IdentityLoss(recogniser, Seen(*answers), people, fallback).bind_rng()


def places(loss, rows=(0, 1)):
    """How far from face(0) the faces are taken to be, and which count."""
    points, there = loss._find(torch.zeros(2, 3, 128, 128), list(rows), loss.memory)
    return [round(five[0, 0].item() - 40) for five in points], there.tolist()


@pytest.mark.parametrize(
    ("fallback", "first", "later"),
    [
        ("reference", ([0, 9], [True, True]), ([0, 9], [True, True])),
        ("last", ([0, 9], [False, True]), ([0, 9], [False, True])),
        ("none", ([0, 9], [False, True]), ([0, 9], [False, False])),
    ],
)
def test_where_none_is_found_it_is_the_last_place_or_the_reference_s_or_does_not_count(
    recogniser, fallback, first, later
):
    loss = seeing(recogniser, [[], [face(9)]], [[], []], fallback=fallback)
    assert places(loss) == first
    assert places(loss) == later


def test_the_last_place_is_that_of_the_image_whatever_part_of_the_batch_is_asked(recogniser):
    loss = seeing(recogniser, [[face(3)], [face(9)]], [[], []], [[], []])
    places(loss, rows=(4, 5))
    assert places(loss, rows=(5, 4)) == ([9, 3], [True, True])
    assert places(loss, rows=(0, 1))[1] == [False, False]


def test_a_run_begins_without_what_the_last_one_saw(recogniser):
    loss = seeing(recogniser, [[face(9)], [face(9)]], [[], []])
    places(loss)
    assert places(loss.bind_rng()) == ([0, 0], [False, False])


def test_of_several_faces_it_is_the_largest_at_first_and_then_the_nearest_to_the_last_place(recogniser):
    loss = seeing(recogniser, [[face(0), face(30, 60)], [face(5)]], [[face(0, 90), face(28)], [face(5)]])
    assert places(loss)[0] == [30, 5]
    assert places(loss)[0] == [28, 5]


def test_in_a_sum_of_losses_a_lost_face_is_no_gain(identity, drawn):
    generator = torch.Generator()
    loss = identity([drawn[0, 0]], fallback="none")
    both = bind_rng(Combined(((1.0, loss), (1.0, L1Loss(preview(drawn[:1, 0]))))), generator)
    (there, lost), valid = both(preview(torch.stack([drawn[0, 1], EMPTY])))
    assert valid.all() and there < lost


def test_previews_without_a_face_do_not_count_and_it_is_said_once_a_run(identity, drawn, caplog):
    loss = identity([drawn[0, 0]], fallback="none")
    x = preview(torch.stack([drawn[1, 0], EMPTY])).requires_grad_()
    with caplog.at_level(logging.WARNING):
        values, valid = loss(x)
        loss(x.detach())
    assert caplog.text.count("no face was found in 1 of 2 previews") == 1
    assert valid.tolist() == [True, False] and values[1] == 0
    values.sum().backward()
    assert x.grad[0].abs().max() > 0 and x.grad[1].abs().max() == 0
    nothing, valid = loss(x[1:])  # still part of the graph, so that backward works
    nothing.sum().backward()
    assert not valid.any()


def test_the_reference_s_place_lets_a_preview_without_a_visible_face_count(identity, drawn):
    loss = identity([drawn[0, 0]])
    x = preview(EMPTY[None]).requires_grad_()
    values, valid = loss(x)
    values.sum().backward()
    assert valid.all() and x.grad.abs().max() > 0


def test_the_reference_may_have_another_size_than_the_preview(identity, drawn):
    larger = F.interpolate(drawn[:1, 0], scale_factor=3, mode="bicubic", antialias=True)[0].clamp(0, 1)
    value, _ = identity([larger])(preview(drawn[:1, 0]))
    assert value.item() < 0.1


def test_a_half_precision_preview_is_judged_in_float32(identity, drawn):
    loss = identity([drawn[0, 0]])
    values, _ = loss(preview(drawn[1:2, 0]).bfloat16())
    exact, _ = loss(preview(drawn[1:2, 0]))
    assert values.dtype == torch.float32 and (values - exact).abs().max() < 0.05


def test_an_embedding_is_of_unit_length(detector, recogniser, drawn):
    (found,) = detector(drawn[:1, 0])
    assert embed(recogniser, drawn[:1, 0], found[0].points[None]).norm(dim=-1).item() == pytest.approx(1, abs=1e-5)


def test_the_reference_is_shown_where_the_preview_has_its_face(identity, detector, drawn):
    """Somebody put into the picture of somebody else: the face lies where theirs did, and is that of who is shown."""
    loss, others = identity(drawn[:4, 0], average=False), preview(drawn[4:8, 1])
    shown, head = loss.shown(others)
    assert shown.shape == others.shape and head.shape == (4, 1, 128, 128)
    assert float(head.min()) >= 0 and float(head.max()) == 1
    put = torch.lerp(others, shown, head)
    before, after = loss(others)[0], loss(put)[0]
    assert (after < 0.3).all() and (after < before - 0.3).all()
    for one, other in zip(detector((others + 1) / 2), detector((put + 1) / 2), strict=True):
        assert (one[0].points.mean(0) - other[0].points.mean(0)).norm() < 4  # of 128 pixels


def test_nothing_is_shown_where_no_face_counts(identity, drawn):
    loss = identity(drawn[0, :1], fallback="none")
    shown, head = loss.shown(preview(EMPTY[None]))
    assert shown.shape == (1, 3, 128, 128) and not head.any()
    assert identity(drawn[0, :1]).shown(preview(EMPTY[None]))[1].any()  # where the reference has it
