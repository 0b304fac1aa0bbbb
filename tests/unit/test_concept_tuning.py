"""Tuning a concept: it goes down the slope, is a function of its seed, and leaves what it was given."""

from dataclasses import replace

import pytest
import torch
from lcm_lookahead.lookahead.method.concept import Concept, Dictionary, low_rank, word_direction
from lcm_lookahead.lookahead.method.concept_input import ConceptError, check_picture, with_stand_in, with_word
from lcm_lookahead.lookahead.method.concept_tuning import Tuning, real_word, tune, words_to_try
from lcm_lookahead.lookahead.method.schedule import alphas_cumprod
from tensors import randn

ALPHA_BAR = alphas_cumprod().float()


@pytest.fixture
def concept():
    offsets = {"layer": (randn(2, 4, seed=1), 0.1 * randn(4, 2, seed=2))}
    return Concept(randn(6, seed=3), randn(8, seed=4), "mug", 7, offsets, 0.25, {"steps": "0"})


@pytest.fixture
def real(concept):
    return Dictionary(torch.tensor([7]), randn(1, 6, seed=5), randn(1, 8, seed=6), ("mug",))


VIEWS = torch.ones(2, 4, 2, 2)


def predict(concept, x, t, number):
    """A model whose noise is right where the offsets give ones and the words have no mean."""
    a, b = concept.offsets["layer"]
    change = low_rank(torch.ones(1, 1, 4), a[None], b[None]).view(1, 4, 1, 1)
    noise = (x - ALPHA_BAR[t].sqrt().view(-1, 1, 1, 1)) / (1 - ALPHA_BAR[t]).sqrt().view(-1, 1, 1, 1)
    return noise + change - 1 + concept.word_l.mean() + concept.word_g.mean()


def test_the_loss_falls_and_only_the_copy_changes(concept):
    before = concept.word_l.clone(), concept.offsets["layer"][0].clone()
    tuned, losses = tune(concept, VIEWS, ALPHA_BAR, predict, Tuning(20, 2, 0.05, 0.05, 0.5))
    assert losses[-1] < 0.2 * losses[0]
    assert torch.equal(concept.word_l, before[0]) and torch.equal(concept.offsets["layer"][0], before[1])
    assert tuned.blend == 0.5 and tuned.about["steps"] == "20" and tuned.word == "mug" and concept.blend == 0.25
    assert not any(m.requires_grad for m in (tuned.word_l, tuned.word_g, *tuned.offsets["layer"]))


def test_the_same_seed_gives_the_same_bits_and_another_one_not(concept):
    first, again, other = (tune(concept, VIEWS, ALPHA_BAR, predict, Tuning(3, 2, seed=s))[0] for s in (1, 1, 2))
    assert torch.equal(first.word_l, again.word_l)
    assert not torch.equal(noise_seen(1), noise_seen(2)) and other.about == first.about


def noise_seen(seed):
    seen = []

    def look(concept, x, t, number):
        seen.append(x)
        return predict(concept, x, t, number)

    concept = Concept(randn(6), randn(8), "mug", 7, {"layer": (randn(2, 4), randn(4, 2))})
    tune(concept, VIEWS, ALPHA_BAR, look, Tuning(1, 1, seed=seed))
    return seen[0]


def test_the_time_steps_of_a_batch_are_spread_over_the_schedule(concept):
    seen = []

    def look(concept, x, t, number):
        seen.append(int(t))
        return predict(concept, x, t, number)

    tune(concept, VIEWS, ALPHA_BAR, look, Tuning(1, 4))
    assert [t // 250 for t in seen] == [0, 1, 2, 3]


def test_the_pull_brings_the_word_nearer_to_the_real_one(concept, real):
    def flat(concept, x, t, number):
        return x * 0 + 0 * concept.word_l.sum() + 0 * concept.offsets["layer"][1].sum()

    tuned, _ = tune(concept, VIEWS, ALPHA_BAR, flat, Tuning(10, 1, word_rate=0.05, word_weight=1.0), real)

    def cosine(c):
        return float((word_direction(c.word_l, c.word_g) * real.directions()[0]).sum())

    assert cosine(tuned) > cosine(concept) + 0.05


WORDS_L = randn(3, 6, seed=5)
NEAR = {"near": '[[7, "mug"], [9, "fish"], [8, "car"]]', "steps": "0"}


def by_word(concept, x, t, number):
    """A model that is right under one real word alone, the third; its soft word goes along where the word is tried."""
    if not concept.offsets:
        assert torch.equal(concept.word_l, {7: WORDS_L[0], 9: WORDS_L[1], 8: WORDS_L[2]}[concept.word_id])
        concept = replace(concept, offsets={"layer": (torch.zeros(2, 4), torch.zeros(4, 2))})
    return predict(concept, x, t, number) + 3 * (concept.word_id != 8)


def words(concept, tuning):
    tried = words_to_try(concept, tuning)
    n = len(tried)
    return Dictionary(torch.tensor(list(tried)), WORDS_L[:n], randn(3, 8, seed=6)[:n], tuple(tried.values()))


@pytest.mark.parametrize(("count", "word"), [(1, "mug"), (2, "mug"), (3, "car"), (16, "car")])
def test_the_real_word_is_the_one_under_which_the_picture_is_predicted_best(concept, count, word):
    """Of as many as are tried, each alone; where it makes no difference (two of three) the nearest stays."""
    asked = replace(concept, about=NEAR)
    tuning = Tuning(2, 2, words=count)
    known = words(asked, tuning)
    tuned, losses = tune(asked, VIEWS, ALPHA_BAR, by_word, tuning, known)
    assert tuned.word == word and tuned.word_id == {"mug": 7, "car": 8}[word] and asked.word == "mug"
    begun = real_word(asked, known, 2) if word == "car" else asked  # the soft word begins anew where it was refuted
    assert losses[0] == tune(begun, VIEWS, ALPHA_BAR, by_word, Tuning(1, 2))[1][0]


@pytest.mark.parametrize(
    ("about", "tuning"),
    [
        ({**NEAR, "steps": "12"}, Tuning(2, words=3)),  # tuned before: its word has been chosen
        (NEAR, Tuning(0, words=3)),
        ({"steps": "0"}, Tuning(2, words=3)),  # of a file that does not say what is near
    ],
)
def test_no_other_real_word_is_tried_where_there_is_nothing_to_choose(concept, about, tuning):
    assert words_to_try(replace(concept, about=about), tuning) == {7: "mug"}


def test_a_tuning_that_is_interrupted_or_finds_no_finite_loss_changes_nothing(concept):
    def stop(step, loss):
        raise KeyboardInterrupt

    before = concept.word_l.clone()
    with pytest.raises(KeyboardInterrupt):
        tune(concept, VIEWS, ALPHA_BAR, predict, Tuning(3, 1), progress=stop)
    with pytest.raises(ConceptError, match="tuning step 1 is not finite"):
        tune(concept, VIEWS, ALPHA_BAR, lambda c, x, t, n: predict(c, x, t, n) * float("nan"), Tuning(3, 1))
    assert torch.equal(concept.word_l, before) and not concept.word_l.requires_grad


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"steps": 101}, "101: give 0 to 100"),
        ({"blend": 1.2}, "blend is 1.2"),
        ({"batch": 0}, "batch of the tuning is 0"),
        ({"words": 17}, "17: give 1"),
        ({"words": 1.5}, "1.5: give 1"),
    ],
)
def test_settings_out_of_range_are_refused_in_a_sentence(values, match):
    with pytest.raises(ConceptError, match=match):
        Tuning(**values)


def test_a_prompt_is_read_with_its_placeholder_once():
    assert with_stand_in("a comic of a S*, at night") == "a comic of a ldnont, at night"
    assert with_word("a comic of a (S*:1.2)", "mug") == "a comic of a (mug:1.2)"
    for prompt in ("a mug", "two S*s", "CATS* and dogs", "a S* and a S*", "a S* LDNONT"):
        with pytest.raises(ConceptError):
            with_word(prompt, "mug")


def test_a_picture_needs_64_pixels_a_side():
    check_picture(64, 900)
    with pytest.raises(ConceptError, match="900 x 63 pixels.*give a larger one"):
        check_picture(63, 900)
