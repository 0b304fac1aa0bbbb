"""The identity loss for several people: whose a face is, in closed form, and what holds over a run."""

import itertools
import logging

import pytest
import torch
from lcm_lookahead.lookahead.losses.base import UNLIKE, Combined, bind_rng, draws, rebind_rng
from lcm_lookahead.lookahead.losses.identity import FaceReferences, IdentityLoss, read_references
from lcm_lookahead.lookahead.losses.l1 import L1Loss
from lcm_lookahead.lookahead.losses.people import ORDER, PeopleLoss, assign
from lcm_lookahead.lookahead.vision.arcface import read
from lcm_lookahead.lookahead.vision.face_models import FaceModels
from lcm_lookahead.lookahead.vision.faces import TEMPLATE, Face
from lcm_lookahead.mini.plan import WEIGHTS
from lcm_lookahead.mini.world import data
from lcm_lookahead.mini.world.faces import STYLES, render
from tensors import half_masks
from torch.nn import functional as F

RED, GREEN, BLUE = torch.eye(3)
SIZE = 64
PLACES = {"left": (16.0, 24.0), "middle": (32.0, 44.0), "right": (48.0, 24.0)}


class Colour(torch.nn.Module):
    """Recognises people by the mean colour of their crop."""

    size = 16

    def forward(self, crops):
        return F.normalize(crops.mean((2, 3)), dim=-1)


def face(place, shift=0.0, width=12.0):
    x, y = PLACES[place]
    points = (TEMPLATE - TEMPLATE.mean(0)) / 10 + torch.tensor([x, y]) + shift
    box = torch.tensor([x - width / 2, y - width / 2, x + width / 2, y + width / 2]) + shift
    return Face(box, points, 0.9)


def preview(**colours):
    """A preview [1, 3, 64, 64] in [-1, 1] with a patch of colour at each place."""
    picture = torch.full((3, SIZE, SIZE), 0.2)
    for place, colour in colours.items():
        x, y = (int(at) for at in PLACES[place])
        picture[:, y - 14 : y + 14, x - 14 : x + 14] = colour.view(3, 1, 1) * 0.8 + 0.1
    return picture[None] * 2 - 1


class Seen:
    """A detector that answers from a list, a call an entry; the last one again and again."""

    def __init__(self, *answers):
        self.answers = list(answers)

    def __call__(self, pictures):
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return answer if isinstance(answer[0], list) else [answer] * len(pictures)


def person(*colours):
    return FaceReferences(F.normalize(torch.stack(colours), dim=-1), torch.zeros(1, 5, 2), torch.tensor([[64, 64]]))


def people_loss(people, *answers, **options):
    everyone = tuple(one if isinstance(one, FaceReferences) else person(one) for one in people)
    return PeopleLoss(Colour(), Seen(*answers), everyone, **options)


BOTH = [face("left"), face("right")]


def test_the_assignment_has_the_largest_total_of_all():
    numbers = torch.Generator().manual_seed(1)
    for rows, columns in [(2, 2), (3, 3), (5, 3), (2, 3)]:
        scores = torch.rand(rows, columns, generator=numbers)
        pairs = assign(scores, torch.ones(rows, columns, dtype=torch.bool))
        few, many = sorted((rows, columns))
        best = max(
            sum(float(scores[(a, b) if rows <= columns else (b, a)]) for a, b in enumerate(order))
            for order in itertools.permutations(range(many), few)
        )
        assert sum(float(scores[pair]) for pair in pairs) == pytest.approx(best)
        assert len(pairs) == few == len({row for row, _ in pairs}) == len({column for _, column in pairs})


def test_the_total_decides_and_not_each_person_s_likest_face():
    scores = torch.tensor([[0.9, 0.8], [0.8, 0.1]])
    assert assign(scores, torch.ones(2, 2, dtype=torch.bool)) == [(0, 1), (1, 0)]


def test_what_is_not_allowed_is_left_out_however_alike():
    allowed = torch.tensor([[False, True], [False, True]])
    assert assign(torch.tensor([[1.0, -1.0], [1.0, -0.5]]), allowed) == [(1, 1)]
    assert assign(torch.zeros(0, 2), torch.zeros(0, 2, dtype=torch.bool)) == []


def test_swapped_faces_are_matched_rightly():
    loss = people_loss([RED, BLUE], BOTH)
    drawn, swapped = preview(left=RED, right=BLUE), preview(left=BLUE, right=RED)
    assert loss(swapped)[0].item() == pytest.approx(loss(drawn)[0].item(), abs=1e-6)
    assert loss(swapped)[0].item() < 0.2
    without = people_loss([RED, BLUE], BOTH, matching=ORDER)
    assert without(drawn)[0].item() < 0.2 and without(swapped)[0].item() > 0.7


def test_the_value_is_the_mean_of_one_minus_each_person_s_own_cosine():
    loss = people_loss([RED, GREEN, BLUE], [face("middle"), face("right"), face("left")])
    x = preview(left=BLUE, middle=RED, right=GREEN)
    alone = [
        IdentityLoss(Colour(), Seen([face(place)]), person(colour))(x)[0]
        for place, colour in (("left", BLUE), ("middle", RED), ("right", GREEN))
    ]
    value, valid = loss(x)
    assert valid.all() and value.item() == pytest.approx(torch.stack(alone).mean().item(), abs=1e-6)


def test_each_person_is_shown_where_their_own_face_is():
    """People of one colour each, whose faces are swapped in the preview: the colours follow the faces."""

    def in_one_colour(colour):
        picture = (colour.view(3, 1, 1) * 0.8 + 0.1).expand(3, SIZE, SIZE)
        return FaceReferences(colour[None], face("middle").points[None], torch.tensor([[SIZE, SIZE]]), (picture,))

    loss, x = people_loss([in_one_colour(RED), in_one_colour(BLUE)], BOTH), preview(left=BLUE, right=RED)
    shown, heads = loss.shown(x)
    assert shown.shape == x.shape and heads.shape == (1, 1, SIZE, SIZE)
    for place, colour in (("left", BLUE), ("right", RED)):
        column, row = face(place).points.mean(0).long().tolist()
        assert torch.allclose((shown[0, :, row, column] + 1) / 2, colour * 0.8 + 0.1, atol=0.05), place
        assert heads[0, 0, row, column] == 1
    assert not people_loss([in_one_colour(RED)], [[]]).shown(x)[1].any()


def test_neither_the_people_s_order_nor_the_faces_changes_value_or_gradient():
    x = preview(left=BLUE, middle=GREEN, right=RED)
    found = [face(place) for place in PLACES]
    seen = []
    for people, faces in zip(itertools.permutations([RED, GREEN, BLUE]), itertools.permutations(found), strict=True):
        leaf = x.clone().requires_grad_()
        value, _ = people_loss(people, list(faces))(leaf)
        value.sum().backward()
        seen.append((value.detach(), leaf.grad))
    assert all(torch.allclose(value, seen[0][0], atol=1e-6) for value, _ in seen)
    assert all(torch.allclose(gradient, seen[0][1], atol=1e-7) for _, gradient in seen)


def test_one_person_has_the_value_and_the_gradient_of_the_loss_of_one_person_bit_for_bit():
    x = torch.cat([preview(left=BLUE), preview(left=RED), preview(left=GREEN)])
    references = person(RED, GREEN)
    results = []
    for loss in (
        IdentityLoss(Colour(), Seen([face("left")]), references),
        PeopleLoss(Colour(), Seen([face("left")]), (references,)),
    ):
        leaf = x.clone().requires_grad_()
        values, valid = bind_rng(loss, torch.Generator())(leaf)
        values.sum().backward()
        results.append((values.detach(), valid, leaf.grad))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    assert results[0][2].abs().max() > 0


def test_each_face_is_pulled_to_its_own_person_alone():
    loss = people_loss([RED, BLUE], BOTH)
    x = preview(left=RED * 0.6 + GREEN * 0.4, right=BLUE * 0.6 + GREEN * 0.4).requires_grad_()
    loss(x)[0].sum().backward()
    (left, right) = (-x.grad[0, :, :, half].sum((1, 2)) for half in (slice(0, 32), slice(32, 64)))
    assert left[0] > 0 > left[1] and right[2] > 0 > right[1]
    assert left[0] > left[2] and right[2] > right[0]


def test_each_image_of_a_batch_has_its_own_assignment_and_references():
    two = person(RED, GREEN), person(BLUE)
    x = torch.cat([preview(left=RED, right=BLUE), preview(left=BLUE, right=GREEN)])
    loss = people_loss(two, BOTH)
    assert loss(x)[0].max() < 0.2
    assert loss(x.flip(0), rows=torch.tensor([1, 0]))[0].max() < 0.2
    assert loss(x.flip(0))[0].min() > 0.3


def test_who_judges_in_a_run_takes_the_faces_for_those_of_the_run(caplog):
    """Not for those whom they have come to look like; and the run learns nothing by it."""
    loss = bind_rng(Combined(((1.0, people_loss([RED, BLUE], BOTH, BOTH, BOTH)),)), torch.Generator())
    loss(preview(left=RED, right=BLUE))
    turned = preview(left=BLUE, right=RED)
    judge = rebind_rng(loss, torch.Generator())
    assert judge(turned)[0].item() > 0.5 > bind_rng(loss, torch.Generator())(turned)[0].item()
    own, theirs = (which.parts[0][1].memory.places for which in (loss, judge))
    assert own is not theirs and own[0] is not theirs[0] and not draws(loss)


def test_a_person_without_a_face_counts_as_unlike_and_it_is_said_once_a_run(caplog):
    loss = bind_rng(people_loss([RED, BLUE], [face("right")]), torch.Generator())
    x = preview(right=BLUE).requires_grad_()
    with caplog.at_level(logging.WARNING):
        value, valid = loss(x)
        loss(x.detach())
    alone = IdentityLoss(Colour(), Seen([face("right")]), person(BLUE))(x)[0]
    assert valid.all() and value.item() == pytest.approx((alone.item() + UNLIKE) / 2, abs=1e-6)
    assert caplog.text.count("fewer faces than 2 people") == 1
    value.sum().backward()
    assert x.grad.abs().max() > 0


def test_a_preview_without_faces_is_not_valid_and_none_of_a_batch_s_gradient():
    loss = bind_rng(people_loss([RED, BLUE], [BOTH, []]), torch.Generator())
    x = torch.cat([preview(left=RED, right=BLUE)] * 2).requires_grad_()
    values, valid = loss(x)
    assert valid.tolist() == [True, False] and values[1] == 0
    values.sum().backward()
    assert x.grad[0].abs().max() > 0 and x.grad[1].abs().max() == 0
    nobody, valid = bind_rng(people_loss([RED], [[]]), torch.Generator())(x[:1])
    assert nobody.item() == 0 and not valid.any()


def test_faces_beyond_the_people_are_left_alone():
    loss = people_loss([RED, BLUE], [face("middle"), *BOTH])
    x = preview(left=BLUE, middle=GREEN, right=RED).requires_grad_()
    value, _ = loss(x)
    value.sum().backward()
    assert value.item() < 0.2
    assert x.grad[0, :, 50:, 24:40].abs().max() == 0  # below the crops of the other two


def test_a_run_holds_whose_a_face_is_and_follows_it():
    """Else faces would change hands with every draw of the preview."""
    moved = [face("right", 2.0), face("left", 2.0)]
    loss = bind_rng(people_loss([RED, BLUE], BOTH, moved), torch.Generator())
    assert loss(preview(left=RED, right=BLUE))[0].item() < 0.2
    assert loss(preview(left=BLUE, right=RED))[0].item() > 0.7
    places = loss.memory.places[0]
    assert torch.equal(places[0], face("left", 2.0).points) and torch.equal(places[1], face("right", 2.0).points)
    again = bind_rng(loss, torch.Generator())
    assert again(preview(left=BLUE, right=RED))[0].item() < 0.2


def test_a_lost_face_stays_where_it_was_and_nobody_takes_another_s():
    loss = bind_rng(people_loss([RED, BLUE], BOTH, [face("right")], [face("middle"), face("right")]), torch.Generator())
    loss(preview(left=RED, right=BLUE))
    for _ in range(2):  # the left face is not found; then there is one too far off to be it
        assert loss(preview(left=RED, right=BLUE))[0].item() < 0.2
        assert torch.equal(loss.memory.places[0][0], face("left").points)


def test_who_had_no_face_gets_one_that_appears():
    loss = bind_rng(people_loss([RED, BLUE], [face("right")], BOTH), torch.Generator())
    x = preview(left=RED, right=BLUE)
    assert loss(x)[0].item() > 0.5 > loss(x)[0].item()


def test_places_are_kept_when_previews_become_smaller():
    half = [Face(one.box / 2, (one.points + 0.5) / 2 - 0.5, 0.9) for one in BOTH]
    loss = bind_rng(people_loss([RED, BLUE], BOTH, half), torch.Generator())
    loss(preview(left=RED, right=BLUE))
    smaller = F.avg_pool2d(preview(left=BLUE, right=RED), 2)
    assert loss(smaller)[0].item() > 0.7
    assert torch.allclose(loss.memory.places[0][0], half[0].points, atol=1e-4)


def test_masks_say_whose_a_face_is_however_alike_the_other_person_is():
    left, right = half_masks(8)
    loss = people_loss([RED, BLUE], BOTH, masks=(left, right))
    assert loss(preview(left=RED, right=BLUE))[0].item() < 0.2
    assert loss(preview(left=BLUE, right=RED))[0].item() > 0.7
    other = people_loss([RED, BLUE], BOTH, masks=(right, left))
    assert other(preview(left=BLUE, right=RED))[0].item() < 0.2


def test_under_one_mask_for_all_or_none_likeness_decides():
    whole = torch.ones(1, 8, 8)
    loss = people_loss([RED, BLUE], BOTH, masks=(whole, None))
    assert loss(preview(left=BLUE, right=RED))[0].item() < 0.2


def test_nobody_has_a_face_outside_of_their_mask():
    left, _ = half_masks(8)
    loss = people_loss([RED, BLUE], [face("right")], masks=(left, torch.zeros(1, 8, 8)))
    assert not loss(preview(right=RED))[1].any()


def test_each_image_has_its_own_mask():
    left, right = half_masks(8)
    masks = torch.cat([left, right]), torch.cat([right, left])
    loss = people_loss([RED, BLUE], BOTH, masks=masks)
    assert loss(torch.cat([preview(left=RED, right=BLUE), preview(left=BLUE, right=RED)]))[0].max() < 0.2


def test_without_matching_the_largest_faces_are_the_people_from_left_to_right():
    found = [face("right", width=10), face("middle", width=5), face("left", width=9)]
    x = preview(left=RED, middle=GREEN, right=BLUE)
    assert people_loss([RED, BLUE], found, matching=ORDER)(x)[0].item() < 0.2
    assert people_loss([RED, GREEN, BLUE], found, matching=ORDER)(x)[0].item() < 0.2


def test_in_a_sum_of_losses_a_lost_person_is_no_gain():
    alone = people_loss([RED, BLUE], [BOTH, [face("left")]])
    both = bind_rng(Combined(((1.0, alone), (1.0, L1Loss(preview(left=RED, right=BLUE))))), torch.Generator())
    (there, lost), _ = both(torch.cat([preview(left=RED, right=BLUE)] * 2))
    assert there < lost


def test_bad_people_matchings_and_masks_are_refused():
    with pytest.raises(ValueError, match="nobody to compare with: give one person"):
        people_loss([], BOTH)
    with pytest.raises(ValueError, match="matching is 'nearest': use one of likeness, order"):
        people_loss([RED], BOTH, matching="nearest")
    with pytest.raises(ValueError, match="2 people and 1 masks: give a mask or None for each"):
        people_loss([RED, BLUE], BOTH, masks=(None,))


def test_two_drawn_people_in_one_picture_are_found_and_told_apart():
    """With the mini pack's detector and recogniser; swapped, only the masks of the right order mind."""
    pytest.importorskip("insightface")
    pytest.importorskip("onnx2torch")
    detector = FaceModels(WEIGHTS / "insightface/models/mini", threads=1)
    recogniser = read(WEIGHTS / "insightface/models/mini/rec_mini.onnx")
    photos = render(data.group_of_people("held_out", 2, STYLES), 128, seed=4).view(2, -1, 3, 128, 128)[:, :2]
    people = tuple(read_references(recogniser, detector, [one[0]], True) for one in photos)
    drawn, swapped = (torch.cat([photos[a, 1], photos[b, 1]], 2)[None] * 2 - 1 for a, b in ((0, 1), (1, 0)))
    assert [len(faces) for faces in detector((drawn + 1) / 2)] == [2]
    left, right = half_masks(8)
    matched, masked = (PeopleLoss(recogniser, detector, people, masks=m) for m in ((), (left, right)))
    assert abs(matched(drawn)[0] - matched(swapped)[0]) < 0.02
    assert matched(drawn)[0] + 0.3 < masked(swapped)[0]
