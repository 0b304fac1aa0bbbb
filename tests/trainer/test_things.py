"""The drawn things: what a picture shows is known exactly, and is a function of its parameters."""

import torch
from lcm_lookahead.mini import drawn_things
from lcm_lookahead.mini.stages.text import tokenizer
from lcm_lookahead.mini.world import things
from lcm_lookahead.mini.world.faces import STYLES
from lcm_lookahead.mini.world.things import CLASSES, IDENTITY_SIZE, Things


def sample(n, seed=1, **fixed):
    g = torch.Generator().manual_seed(seed)
    identity = things.sample_things(n, g)
    nuisance = things.sample_nuisance(
        n, g, style=torch.zeros(n, dtype=torch.long), place=torch.zeros(n, dtype=torch.long)
    )
    return Things(identity | fixed, nuisance)


def test_every_class_is_one_token_of_clip():
    tokens = tokenizer()
    assert [len(tokens(name).input_ids) for name in CLASSES] == [3] * len(CLASSES)  # with begin and end


def test_classes_that_are_held_out_are_never_drawn_unless_they_are_asked_for():
    kinds = things.sample_things(400, torch.Generator().manual_seed(2))["kind"]
    assert set(kinds.tolist()) == set(range(len(CLASSES) - things.HELD_OUT))


def test_a_picture_is_the_same_alone_and_among_others():
    chosen = sample(12, kind=torch.arange(12) % len(CLASSES))
    many = things.render(chosen, 64, seed=3)
    photo_noise = 0.06  # the style's own texture is drawn for the batch
    for row in (0, 5, 11):
        one = things.render(chosen.rows(slice(row, row + 1)), 64, seed=3)
        assert (many[row] - one[0]).abs().max() < 2 * photo_noise


def test_every_parameter_of_a_thing_changes_its_picture():
    for kind in range(len(CLASSES)):
        base = sample(1, seed=kind, kind=torch.tensor([kind]), pattern=torch.tensor([1]))
        drawn = things.render(base, 64)
        for name in ("first", "second"):
            other = Things(base.identity | {name: (base.identity[name] + 0.4) % 1}, base.nuisance)
            assert (things.render(other, 64) - drawn).abs().mean() > 2e-3, (CLASSES[kind], name)
        for number in range(things.SHAPE):
            shape = base.identity["shape"].clone()
            shape[:, number] = -shape[:, number].sign()
            other = Things(base.identity | {"shape": shape}, base.nuisance)
            assert (things.render(other, 64) - drawn).abs().mean() > 2e-4, (CLASSES[kind], number)


def test_patterns_are_seen():
    base = sample(1, seed=4, kind=torch.tensor([0]))
    drawn = [things.render(Things(base.identity | {"pattern": torch.tensor([p])}, base.nuisance), 64) for p in range(3)]
    assert all((drawn[a] - drawn[b]).abs().mean() > 5e-3 for a, b in ((0, 1), (0, 2), (1, 2)))


def test_the_identity_vector_tells_all_things_apart_and_knows_nothing_of_the_picture():
    identity = things.sample_things(50, torch.Generator().manual_seed(5))
    vectors = things.identity_vector(identity)
    assert vectors.shape == (50, IDENTITY_SIZE)
    assert torch.pdist(vectors).min() > 0.1


def test_captions_name_style_class_and_place_alone():
    g = torch.Generator().manual_seed(6)
    identity = things.sample_things(1, g, kind=torch.tensor([CLASSES.index("umbrella")]))
    style, place = torch.tensor([STYLES.index("oil painting")]), torch.tensor([2])
    caption = things.captions(Things(identity, things.sample_nuisance(1, g, style, place)))
    assert caption == ["an oil painting of an umbrella on a beach"]


def test_colours_are_the_colour_wheel_s():
    wheel = things.rgb(torch.tensor([[0.0, 1, 1], [1 / 3, 1, 1], [2 / 3, 1, 1], [0.1, 0, 0.5]]))
    expected = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0.5, 0.5, 0.5]])
    assert torch.allclose(wheel, expected, atol=1e-5)


def test_concept_pictures_are_photos_on_one_light_ground_of_the_classes_that_training_sees():
    shown = drawn_things.concept_things(60, drawn_things.SEED)
    people = drawn_things.concept_people(20, drawn_things.SEED)
    grounds = torch.cat([shown.nuisance["background"], people.nuisance["background"]])
    assert (grounds == grounds[0]).all() and grounds[0].min() > 0.8
    assert set(shown.identity["kind"].tolist()) <= set(range(len(CLASSES) - things.HELD_OUT))
    assert set(shown.nuisance["style"].tolist()) == {0} == set(shown.nuisance["place"].tolist())
    held_out = drawn_things.concept_things(4, seed=1, kind=torch.tensor([8, 9, 8, 9]))
    assert held_out.identity["kind"].tolist() == [8, 9, 8, 9]
