"""The drawn faces: the same seed gives the same picture, and what is known about a picture is true of it."""

import torch
from lcm_lookahead.mini.world.faces import (
    IDENTITY_SIZE,
    STYLES,
    Faces,
    boxes,
    captions,
    frontal,
    identity_vector,
    landmarks,
    render,
    sample_identities,
    sample_nuisance,
)


def some_faces(n: int, seed: int = 0, style: str = "photo") -> Faces:
    numbers = torch.Generator().manual_seed(seed)
    styles = torch.full((n,), STYLES.index(style))
    return Faces(
        sample_identities(n, numbers), sample_nuisance(n, numbers, style=styles, place=torch.zeros_like(styles))
    )


def test_the_same_seed_draws_the_same_pictures_and_another_seed_other_ones():
    first, again, other = (render(some_faces(3, seed), 32) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert (first - other).abs().mean() > 0.02


def test_pictures_stay_between_zero_and_one_in_every_style():
    for style in STYLES:
        x = render(some_faces(2, style=style), 64)
        assert x.shape == (2, 3, 64, 64) and x.min() >= 0 and x.max() <= 1
        assert x.std() > 0.05, f"{style} shows nothing"


def test_a_picture_does_not_depend_on_what_else_is_in_the_batch():
    faces = some_faces(4, style="comic")  # a style without texture of its own
    assert torch.allclose(render(faces, 48)[2:3], render(faces.rows(slice(2, 3)), 48), atol=1e-6)


def test_landmarks_lie_on_the_pupils_and_on_the_mouth():
    faces = some_faces(16, seed=5)
    faces.identity["glasses"].zero_()
    pupils = render(faces, 128)
    for row, points in enumerate(landmarks(faces, 128)):
        for x, y in points[:2].round().long().tolist():
            pupil = pupils[row, :, y - 1 : y + 2, x - 1 : x + 2].mean(0).min()
            eye = pupils[row, :, y - 5 : y + 6, x - 5 : x + 6].amin(0).max()
            assert pupil < 0.2 and eye > 0.6, f"no dark pupil in a white eye at {x}, {y} of picture {row}"
    # Moving the mouth's corners by a smile moves its landmarks by as much, and nothing else.
    happy = Faces(faces.identity, {**faces.nuisance, "smile": torch.ones(16)})
    sad = Faces(faces.identity, {**faces.nuisance, "smile": -torch.ones(16)})
    moved = (landmarks(happy, 128) - landmarks(sad, 128)).norm(dim=-1)
    assert (moved[:, :3] == 0).all() and (moved[:, 3:] > 2).all()


def test_boxes_hold_the_landmarks():
    faces = some_faces(32, seed=6)
    box, points = boxes(faces, 128), landmarks(faces, 128)
    assert (points >= box[:, None, :2]).all() and (points <= box[:, None, 2:]).all()


def test_frontal_faces_stand_upright_in_the_middle():
    faces = some_faces(8, seed=7)
    still = Faces(faces.identity, frontal(faces.nuisance))
    eyes = landmarks(still, 128)[:, :2]
    assert (eyes[:, 0, 1] - eyes[:, 1, 1]).abs().max() < 1e-3
    assert (eyes.mean(1)[:, 0] - 64).abs().max() < 1e-3


def test_captions_name_style_and_place_and_only_long_ones_describe_the_person():
    numbers = torch.Generator().manual_seed(3)
    faces = Faces(sample_identities(40, numbers), sample_nuisance(40, numbers))
    described = (" hair", "bald", "glasses", "beard", "moustache", "pale", "dark face", "bun")
    for i, (long, short) in enumerate(zip(captions(faces, True), captions(faces, False), strict=True)):
        style = STYLES[faces.nuisance["style"][i]]
        assert short.split(" ", 1)[1].startswith(f"{style} of a face")
        assert not any(word in short for word in described)
        assert any(word in long for word in described) and style in long
        assert ("glasses" in long) == bool(faces.identity["glasses"][i])


def test_identity_vectors_are_those_of_the_person_and_of_fixed_size():
    faces = some_faces(5)
    vectors = identity_vector(faces.identity)
    assert vectors.shape == (5, IDENTITY_SIZE)
    assert vectors[:, :15].abs().max() <= 1.0001
    assert torch.pdist(vectors).min() > 0.5
