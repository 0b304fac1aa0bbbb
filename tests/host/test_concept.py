"""A concept in the real host: the numbers of the oracle, the base to the bit where it is off, and company."""

import asyncio
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import concept_oracle as oracle
import pytest
import torch
from damaged import check_that_nothing_is_kept_of_a_file_cut_short
from tensors import relative
from worlds import ROOT
from writing_patches import pure, with_patches, writing


@pytest.fixture(scope="module", params=["mini", "sdxl"])
def case(request, worlds, tools, pack):
    with torch.inference_mode():
        return Case(worlds(request.param), tools, pack)


@pytest.fixture(scope="module")
def small(worlds, tools, pack):
    with torch.inference_mode():
        return Case(worlds("mini"), tools, pack)


class Case:
    """A world with a concept of random offsets, a soft and a hard prompt, and one noised latent."""

    def __init__(self, world, tools, pack):
        self.world, self.tools, self.pack = world, tools, pack
        self.unet = tools.diffusers_unet(world)
        self.offsets = oracle.random_offsets(self.unet)
        self.effect = pack.module("nodes.concept.concept_effect")
        g = torch.Generator().manual_seed(11)
        self.soft, self.hard = torch.randn(2, 1, 77, world.context, generator=g)
        self.pooled = torch.randn(1, world.pooled, generator=g)
        self.z = torch.randn(1, 4, 8, 8, generator=g)

    def concept(self, blend=0.25, offsets=None):
        kind = self.pack.module("lookahead.method.concept").Concept
        return kind(torch.zeros(3), torch.zeros(3), "mug", 1, self.offsets if offsets is None else offsets, blend)

    def text(self, context=None, hard=True):
        extra = {self.effect.HARD: self.hard} if hard else {}
        return [[self.soft if context is None else context, {"pooled_output": self.pooled, **extra}]]

    def apply(self, model=None, concept=None, **options):
        model = self.world.model if model is None else model
        return self.tools.run("LookaheadApplyConcept", model, concept or self.concept(), **options)

    def noise(self, model, positive=None, sigma=2.0):
        """The noise that the host predicts for one latent under the positive prompt alone."""
        text = self.text() if positive is None else positive
        return (self.z - self.tools.denoised(model, text, text, self.z, sigma)) / sigma

    def expected(self, blend, strength=1.0, soft=None, sigma=2.0):
        model = self.world.model.model
        sigma = torch.tensor([sigma])
        x = self.z / (sigma**2 + 1).sqrt().view(-1, 1, 1, 1)
        t = model.model_sampling.timestep(sigma).float()
        time_ids = torch.tensor([[64.0, 64, 0, 0, 64, 64]])
        soft = self.soft if soft is None else soft
        return oracle.predict(self.unet, self.offsets, x, t, soft, self.hard, self.pooled, time_ids, blend, strength)


# --- the numbers


@pytest.mark.parametrize("blend", [0.25, 1.0])
def test_noise_with_a_concept_agrees_with_the_oracle(case, blend):
    found = case.noise(case.apply(blend=blend))
    assert relative(found, case.expected(blend)) < 1e-4
    assert relative(found, case.noise(case.world.model)) > 1e-2, "the concept changes nothing"


def test_blend_0_is_the_model_under_the_hard_prompt_to_the_bit(small):
    assert torch.equal(small.noise(small.apply(blend=0.0)), small.noise(small.world.model, small.text(small.hard)))


def test_strength_0_is_the_model_without_the_node_to_the_bit(small):
    assert small.apply(strength=0.0) is small.world.model


def test_strength_multiplies_the_offsets_alone(small):
    assert relative(small.noise(small.apply(strength=0.5)), small.expected(0.25, strength=0.5)) < 1e-4


def test_a_text_without_hard_prompt_is_read_by_both_paths(small):
    found = small.noise(small.apply(blend=0.25), small.text(hard=False))
    both = Case.expected
    small.hard, kept = small.soft, small.hard
    try:
        assert relative(found, both(small, 0.25)) < 1e-4
    finally:
        small.hard = kept


def test_what_is_put_behind_the_text_stands_behind_the_hard_one_too(small):
    tail = torch.randn(1, 77, small.world.context, generator=torch.Generator().manual_seed(12))
    found = small.noise(small.apply(blend=0.25), small.text(torch.cat([small.soft, tail], 1)))
    soft, kept = torch.cat([small.soft, tail], 1), small.hard
    small.hard = torch.cat([kept, tail], 1)
    try:
        assert relative(found, small.expected(0.25, soft=soft)) < 1e-4
    finally:
        small.hard = kept


# --- rows, masks, several, company


def test_the_negative_is_left_alone_where_rows_say_so(small):
    model, other = small.apply(rows="conditional only", blend=1.0), small.text(small.hard, hard=False)
    only = small.tools.denoised(model, small.text(), other, small.z, 2.0, cfg=3.0)
    conditional = small.noise(small.apply(blend=1.0))
    negative = small.noise(small.world.model, other)
    expected = small.z - 2.0 * (negative + 3.0 * (conditional - negative))
    assert relative(only, expected) < 1e-4


def test_a_mask_leaves_the_model_where_it_is_black_and_the_concept_where_it_is_white(small):
    plain, whole = small.noise(small.world.model, small.text(hard=False)), small.noise(small.apply(blend=1.0))
    black = small.noise(small.apply(blend=1.0, mask=torch.zeros(1, 64, 64)), small.text(hard=False))
    white = small.noise(small.apply(blend=1.0, mask=torch.ones(1, 64, 64)))
    assert relative(black, plain) < 1e-5 and relative(white, whole) < 1e-5


def test_two_concepts_share_what_one_would_have_alone(small):
    halves = small.apply(small.apply(blend=0.25), blend=0.5)
    assert relative(small.noise(halves), small.noise(small.apply(blend=0.75))) < 1e-4


def test_concepts_that_leave_less_than_nothing_are_refused(small):
    with pytest.raises(ValueError, match="add up to 1.30") as error:
        small.apply(small.apply(blend=0.5), blend=0.8)
    small.tools.one_sentence(error)
    left, right = torch.zeros(2, 1, 64, 64)
    left[..., :32], right[..., 32:] = 1, 1
    small.apply(small.apply(blend=0.9, mask=left), blend=0.9, mask=right)


def test_a_later_start_leaves_the_beginning_to_the_model(small):
    late = small.apply(blend=1.0, start=0.9)
    assert torch.equal(small.noise(late, sigma=10.0), small.noise(small.world.model, sigma=10.0))
    assert not torch.equal(small.noise(late, sigma=0.1), small.noise(small.world.model, sigma=0.1))


def test_it_lives_beside_the_image_prompt_and_kv_injection(small):
    tools, world = small.tools, small.world
    picture = tools.picture(1)
    with_prompt = tools.apply(world.model, tools.reference(world, picture), weight=0.7)
    with_both = tools.inject(with_prompt, tools.kv_reference(world, picture, size=64))
    for model in (with_prompt, with_both):
        nothing = {name: (a, b * 0) for name, (a, b) in small.offsets.items()}
        same = small.apply(model, small.concept(offsets=nothing), blend=0.5)
        text = small.text(hard=False)
        assert relative(small.noise(same, text), small.noise(model, text)) < 1e-4
        assert relative(small.noise(small.apply(model, blend=0.5), text), small.noise(model, text)) > 1e-2


def test_a_block_of_another_node_is_left_to_it(small, caplog):
    def theirs(q, k, v, extra):
        return q * 0

    model = small.world.model.clone()
    model.set_model_attn2_replace(theirs, "middle", 0)
    small.noise(small.apply(model, blend=0.5))
    assert "another node replaces attentions of" in caplog.text


# --- tuning


@pytest.fixture(scope="module")
def checkpoint(pack):
    """MODEL, CLIP and VAE of the mini checkpoint by the host's own loader."""
    import comfy.sd

    extension = ROOT / "mini" / "host_extension"
    assert asyncio.run(pack.host_nodes.load_custom_node(str(extension), module_parent="custom_nodes"))
    with torch.inference_mode():
        return comfy.sd.load_checkpoint_guess_config(str(ROOT / "mini" / "weights" / "mini_sdxl.safetensors"))[:3]


@pytest.fixture
def face(pack, checkpoint):
    """A concept that is the real word, without offsets: its path with the concept is the model."""
    clip = checkpoint[1]
    place = clip.tokenize("face")["l"][0][1][0]
    known = pack.module("nodes.concept.clip_words").dictionary_of(clip, {place: "face"})
    kind = pack.module("lookahead.method.concept").Concept
    return kind(known.rows_l[0], known.rows_g[0], "face", place, {}, 1.0, {"size": "64"})


@pytest.mark.parametrize("shift", [None, 3.0], ids=["as it is", "switched to flow matching"])
def test_the_loss_of_tuning_is_that_of_the_noise_as_the_model_is_given_it(checkpoint, face, pack, tools, shift):
    model, clip, vae = checkpoint
    if shift is not None:
        model = tools.host_node("nodes_model_advanced", "ModelSamplingSD3", model, shift)
    image = tools.picture(5, height=64, width=64)
    image = (image + image.flip(2)) / 2  # so that both views are the same
    said = pack.nodes["LookaheadTuneConcept"].execute(face, model, clip, vae, image, steps=1, batch=1, seed=2).result[1]
    tuning = pack.module("lookahead.method.concept_tuning")
    view, sampling = model.model.process_latent_in(vae.encode(image)), model.get_model_object("model_sampling")
    settings = tuning.Tuning.of(face, steps=1, batch=1, seed=2)
    t, _, noise = tuning.noised_sample(view.expand(2, -1, -1, -1), torch.ones(1000), settings, 0)
    sigma = float(sampling.sigmas[t])
    x = sampling.noise_scaling(torch.tensor(sigma), noise.clone(), view)
    text, pooled = clip.encode_from_tokens(clip.tokenize("a photo of a face"), return_pooled=True)
    positive = [[text, {"pooled_output": pooled, "width": 64, "height": 64}]]
    kept = 1.0 if shift is None else 1 - sigma
    predicted = (x - kept * tools.denoised(model, positive, positive, x, sigma)) / sigma
    assert said.startswith("1: ") and 0.1 < sigma < 10
    assert float(said[3:]) == pytest.approx(float((predicted - noise).square().mean()), rel=1e-3)


def test_patches_that_write_into_what_they_get_have_the_gradient_of_those_that_do_not(checkpoint, face, small, pack):
    """As FreeU writes into the tensors that it is given, which autograd needs as they were."""
    model, clip, _ = checkpoint
    concept = replace(face, offsets=small.offsets, blend=0.4)

    plain, without, with_writing = (
        torch.cat([one.flatten() for one in gradient(pack, patched, clip, concept, small.z)])
        for patched in (model, with_patches(model, pure), with_patches(model, writing))
    )
    assert relative(with_writing, without) < 1e-5 and relative(without, plain) > 1e-2


def test_the_gradient_beside_free_u_is_what_finite_differences_say(checkpoint, face, small, pack, tools):
    model, clip, _ = checkpoint
    model = tools.host_node("nodes_freelunch", "FreeU_V2", model, 1.3, 1.4, 0.9, 0.2)
    concept = replace(face, offsets=small.offsets, blend=0.4)
    slope, *_ = gradient(pack, model, clip, concept, small.z)
    step = 1e-2 * slope / slope.norm() * concept.word_l.norm()
    with predictor(pack, model, clip, concept) as predict, torch.no_grad():
        moved = [replace(concept, word_l=concept.word_l + way * step) for way in (1, -1)]
        ahead, behind = (predict(one, small.z, torch.tensor([601]), 0).square().mean() for one in moved)
    assert float(ahead - behind) / 2 == pytest.approx(float((slope * step).sum()), rel=2e-2)


@contextmanager
def predictor(pack, model, clip, concept):
    """What tuning predicts noise with, outside of the inference mode in which nodes begin."""
    made = pack.module("nodes.concept.host_predictor").HostPredictor
    with torch.inference_mode(False), made(model, clip, concept, ["a photo of a S*"], concept.blend, 64) as opened:
        yield opened


def gradient(pack, model, clip, concept, z):
    """That of the squared noise that is predicted of a latent, to half of the soft word and to the offsets."""
    with predictor(pack, model, clip, concept) as predict, torch.enable_grad():
        offsets = {
            name: tuple(half.clone().requires_grad_() for half in pair) for name, pair in concept.offsets.items()
        }
        word = concept.word_l.clone().requires_grad_()
        value = predict(replace(concept, word_l=word, offsets=offsets), z.clone(), torch.tensor([601]), 0)
        return torch.autograd.grad(value.square().mean(), [word, *(half for pair in offsets.values() for half in pair)])


# --- bad input


def test_colours_under_full_transparency_do_not_count_and_grey_is_read_as_colour(small, pack):
    predict = pack.module("nodes.concept.predict_concept")
    picture = small.tools.picture(5, channels=3)
    alpha = torch.ones(1, 96, 96, 1)
    alpha[:, :, :48] = 0
    other = torch.where(alpha > 0, picture, 1 - picture)
    squares = [predict.square_of(torch.cat([colour, alpha], -1), 64) for colour in (picture, other)]
    assert torch.equal(*squares) and squares[0][:, :, :24].min() > 0.999
    assert torch.equal(squares[0], predict.square_of(torch.where(alpha > 0, picture, torch.ones(3)), 64))
    grey = picture[..., :1]
    assert torch.equal(predict.square_of(grey, 64), predict.square_of(grey.expand(-1, -1, -1, 3), 64))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"strange.path.attn1.to_q": (torch.zeros(2, 8), torch.zeros(8, 2))}, "no such block"),
        ({"mid_block.attentions.0.transformer_blocks.0.attn1.to_q": (torch.zeros(2, 7), torch.zeros(9, 2))}, "7 -> 9"),
    ],
)
def test_a_concept_of_another_base_is_refused(small, change, match):
    with pytest.raises(ValueError, match=match) as error:
        small.apply(concept=small.concept(offsets=change))
    small.tools.one_sentence(error)


def test_the_model_given_is_never_changed(small):
    before = small.noise(small.world.model)
    small.noise(small.apply(blend=0.5))
    assert torch.equal(small.noise(small.world.model), before)


def test_saving_never_replaces_a_file_and_refuses_a_name_that_is_a_path(small, pack):
    folder = pack.base / "models" / "lookahead_concepts"
    paths = [small.tools.run("LookaheadSaveConcept", small.concept(), "a mug") for _ in range(2)]
    assert [folder / "a mug.safetensors", folder / "a mug_2.safetensors"] == [type(folder)(p) for p in paths]
    again = small.tools.run("LookaheadLoadConcept", "a mug_2.safetensors")
    assert again.word == "mug" and again.offsets.keys() == small.offsets.keys()
    for name in ("../mug", "", "a/b"):
        with pytest.raises(ValueError, match="is none for a file") as error:
            small.tools.run("LookaheadSaveConcept", small.concept(), name)
        small.tools.one_sentence(error)
    with pytest.raises(ValueError, match="has 202 bytes") as error:
        small.tools.run("LookaheadSaveConcept", small.concept(), "é" * 101)
    small.tools.one_sentence(error)


def test_of_a_concept_that_was_cut_short_nothing_is_kept(small):
    path = Path(small.tools.run("LookaheadSaveConcept", small.concept(), "cut_mug"))
    check_that_nothing_is_kept_of_a_file_cut_short(path, lambda: small.tools.run("LookaheadLoadConcept", path.name))


def test_a_picture_of_one_pixel_and_a_batch_are_refused(small, pack):
    square_of = pack.module("nodes.concept.predict_concept").square_of
    for image, match in ((torch.zeros(1, 1, 1, 3), "1 x 1 pixels"), (torch.zeros(2, 64, 64, 3), "batch of 2 pictures")):
        with pytest.raises(ValueError, match=match) as error:
            square_of(image, 64)
        small.tools.one_sentence(error)
