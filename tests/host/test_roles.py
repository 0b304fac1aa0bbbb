"""Which row of a batch gets the reference's tokens and which the null tokens (design, host contract 7)."""

from types import SimpleNamespace

import pytest
import torch
from other_packs import in_one_batch

pytestmark = pytest.mark.contract

POSITIVE, NEGATIVE, OTHER = 1, 2, 3
LATENT = (1, 4, 16, 16)


@pytest.fixture
def watched(tiny, tools, pack, monkeypatch):
    """A model with an image prompt; `watched.seen` gets (text seed, "reference" or "null") for each row that ran."""
    patch = pack.module("nodes.conditioning.cross_attention")
    reference = tools.reference(tiny, tools.picture(1))
    model = tools.apply(tiny.model, reference)
    texts = {seed: tiny.text(seed)[0][0] for seed in (POSITIVE, NEGATIVE, OTHER)}
    kinds = {
        "reference": reference.subjects[0].keys_values,
        "null": reference.subjects[0].null_keys_values,
    }
    watched = SimpleNamespace(model=model, seen=[], passes=[])
    made = []

    def name(row, known):
        return next(k for k, v in known.items() if torch.equal(row[: v.shape[1]], v[0]))

    class Recorded(patch.PromptRows):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    def see(executor, x, t, c_concat=None, c_crossattn=None, *args, **kwargs):
        rows = made.pop().keys_values()
        watched.passes.append(len(rows))
        watched.seen += [(name(c, texts), name(kv, kinds)) for c, kv in zip(c_crossattn, rows, strict=True)]
        return executor(x, t, c_concat, c_crossattn, *args, **kwargs)

    monkeypatch.setattr(patch, "PromptRows", Recorded)
    model.add_wrapper_with_key("apply_model", "test", see)
    return watched


@pytest.fixture
def texts(tiny):
    return {seed: tiny.text(seed) for seed in (POSITIVE, NEGATIVE, OTHER)}


EXPECTED = {(POSITIVE, "reference"), (NEGATIVE, "null")}


def test_cfg_guider(watched, texts, tools):
    tools.denoised(watched.model, texts[POSITIVE], texts[NEGATIVE], torch.randn(LATENT), 5.0, cfg=3.0)
    assert len(watched.seen) == 2 and set(watched.seen) == EXPECTED


@pytest.mark.usefixtures("split_batches")
def test_cfg_guider_with_batches_split_by_memory(watched, texts, tools):
    tools.denoised(watched.model, texts[POSITIVE], texts[NEGATIVE], torch.randn(LATENT), 5.0, cfg=3.0)
    assert watched.passes == [1, 1] and set(watched.seen) == EXPECTED


def test_batch_of_pictures(watched, texts, tools):
    tools.denoised(watched.model, texts[POSITIVE], texts[NEGATIVE], torch.randn(3, *LATENT[1:]), 5.0, cfg=3.0)
    assert sorted(watched.seen) == sorted([(POSITIVE, "reference")] * 3 + [(NEGATIVE, "null")] * 3)


@pytest.mark.parametrize("pictures", [1, 3])
def test_tiles_of_the_picture_in_one_batch_keep_their_roles(watched, texts, tools, pictures):
    watched.model.set_model_unet_function_wrapper(in_one_batch)
    x = torch.randn(pictures, *LATENT[1:])
    tools.denoised(watched.model, texts[POSITIVE], texts[NEGATIVE], x, 5.0, cfg=3.0)
    assert watched.passes == [4 * pictures]
    assert sorted(watched.seen) == sorted([(POSITIVE, "reference"), (NEGATIVE, "null")] * 2 * pictures)


def test_tiles_of_a_batch_see_the_reference_of_their_picture(tiny, tools):
    """Two tiles of two pictures in one batch draw what each picture draws in tiles of its own."""
    reference = tools.reference(tiny, tools.picture(4, n=2), several="one per picture")
    x = torch.randn(2, *LATENT[1:], generator=torch.Generator().manual_seed(9))

    def draw(x, reference):
        model = tools.apply(tiny.model, reference)
        model.set_model_unet_function_wrapper(in_one_batch)
        return tools.denoised(model, tiny.text(1), tiny.text(2), x, 5.0, cfg=3.0)

    both = draw(x, reference)
    for n in range(2):
        alone = draw(x[n : n + 1], tools.reference(tiny, tools.picture(4, n=2)[n : n + 1]))
        assert torch.allclose(both[n : n + 1], alone, atol=1e-4 * float(alone.abs().max()))


def test_no_negative_at_cfg_1(watched, texts, tools):
    tools.denoised(watched.model, texts[POSITIVE], texts[NEGATIVE], torch.randn(LATENT), 5.0, cfg=1.0)
    assert watched.seen == [(POSITIVE, "reference")]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("alone", [False, True])
def test_dual_cfg_has_the_negative_first(watched, texts, tools, nested, alone, request):
    from comfy_extras.nodes_custom_sampler import Guider_DualCFG

    if alone:
        request.getfixturevalue("split_batches")
    guider = Guider_DualCFG(watched.model)
    guider.set_conds(texts[POSITIVE], texts[OTHER], texts[NEGATIVE])
    guider.set_cfg(3.0, 2.0, nested=nested)
    tools.denoised(watched.model, None, None, torch.randn(LATENT), 5.0, guider=guider)
    assert set(watched.seen) == {(POSITIVE, "reference"), (OTHER, "reference"), (NEGATIVE, "null")}
    assert len(watched.seen) == 3


def test_perp_neg_has_two_unconditional_lists(watched, texts, tools):
    from comfy_extras.nodes_perpneg import Guider_PerpNeg

    guider = Guider_PerpNeg(watched.model)
    guider.set_conds(texts[POSITIVE], texts[NEGATIVE], texts[OTHER])
    guider.set_cfg(3.0, 1.0)
    tools.denoised(watched.model, None, None, torch.randn(LATENT), 5.0, guider=guider)
    assert set(watched.seen) == {(POSITIVE, "reference"), (NEGATIVE, "null"), (OTHER, "null")}
    assert len(watched.seen) == 3


@pytest.mark.parametrize("which", ["cond", "uncond"])
def test_nodes_that_evaluate_one_list_alone_after_the_guider(watched, texts, tools, which):
    """As self-attention guidance (negative alone) and perturbed-attention guidance (positive alone) do."""
    import comfy.samplers

    def after(args):
        watched.seen.clear()
        options = args["model_options"]
        comfy.samplers.calc_cond_batch(args["model"], [args[which]], args["input"], args["sigma"], options)
        return args["denoised"]

    watched.model.set_model_sampler_post_cfg_function(after)
    tools.denoised(watched.model, texts[POSITIVE], texts[NEGATIVE], torch.randn(LATENT), 5.0, cfg=3.0)
    assert watched.seen == [(POSITIVE, "reference") if which == "cond" else (NEGATIVE, "null")]


@pytest.mark.parametrize("text", [POSITIVE, NEGATIVE, OTHER])
def test_a_list_that_the_guider_does_not_hold_goes_by_its_text(watched, texts, tools, text):
    """The same text as the positive's is conditional, any other unconditional."""
    import comfy.sampler_helpers
    import comfy.samplers

    def after(args):
        watched.seen.clear()
        fresh = comfy.sampler_helpers.convert_cond(texts[text])
        fresh = comfy.samplers.encode_model_conds(args["model"].extra_conds, fresh, args["input"], "cpu", "positive")
        comfy.samplers.calc_cond_batch(args["model"], [fresh], args["input"], args["sigma"], args["model_options"])
        return args["denoised"]

    watched.model.set_model_sampler_post_cfg_function(after)
    tools.denoised(watched.model, texts[POSITIVE], texts[NEGATIVE], torch.randn(LATENT), 5.0, cfg=3.0)
    assert watched.seen == [(text, "reference" if text == POSITIVE else "null")]


def test_a_copy_of_a_list_goes_by_what_is_its_own(watched, tiny, texts, tools):
    """The host appends the areas of other lists to each list: those do not say what a copy of the list is."""
    import comfy.samplers

    def after(args):
        watched.seen.clear()
        copy = [dict(cond) for cond in args["uncond"]]
        comfy.samplers.calc_cond_batch(args["model"], [copy], args["input"], args["sigma"], args["model_options"])
        return args["denoised"]

    watched.model.set_model_sampler_post_cfg_function(after)
    text, options = texts[NEGATIVE][0]
    area = [[text, {**options, "area": (16, 8, 0, 8)}]]
    tools.denoised(watched.model, texts[POSITIVE], area, torch.randn(LATENT), 5.0, cfg=3.0)
    assert watched.seen == [(NEGATIVE, "null")]


def test_the_same_text_in_both_sockets_is_told_apart_by_its_list(watched, texts, tools):
    tools.denoised(watched.model, texts[OTHER], texts[OTHER], torch.randn(LATENT), 5.0, cfg=3.0)
    assert sorted(watched.seen) == [(OTHER, "null"), (OTHER, "reference")]


def test_areas_keep_the_role_of_their_list(watched, tiny, texts, tools):
    """The host gives the negative a copy of each area of the positive."""
    areas = [
        [texts[POSITIVE][0][0], {**texts[POSITIVE][0][1], "area": (16, 8, 0, 0)}],
        [texts[OTHER][0][0], {**texts[OTHER][0][1], "area": (16, 8, 0, 8)}],
    ]
    tools.denoised(watched.model, areas, texts[NEGATIVE], torch.randn(LATENT), 5.0, cfg=3.0)
    assert {s for s in watched.seen if s[0] != NEGATIVE} == {(POSITIVE, "reference"), (OTHER, "reference")}
    assert [s for s in watched.seen if s[0] == NEGATIVE] == [(NEGATIVE, "null")] * 3


def test_one_reference_per_picture_of_the_batch(tiny, tools, pack, monkeypatch):
    patch = pack.module("nodes.conditioning.cross_attention")
    reference = tools.reference(tiny, tools.picture(4, n=2), several="one per picture")
    rows = reference.subjects[0].keys_values
    assert len(rows) == 2 and not torch.equal(rows[0], rows[1])
    made = []

    class Recorded(patch.PromptRows):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self.keys_values())

    monkeypatch.setattr(patch, "PromptRows", Recorded)
    model = tools.apply(tiny.model, reference)
    tools.denoised(model, tiny.text(1), tiny.text(2), torch.randn(3, *LATENT[1:]), 5.0, cfg=1.0)
    assert torch.equal(made[0], rows[[0, 1, 0]])
