"""Lookahead Guider: which evaluations it makes, what it does with them, and what other nodes see of it."""

import pytest
import torch
from host_tools import interrupt
from tensors import close

LATENT = (1, 4, 8, 8)
PLAIN = {("positive", 0, ()), ("negative", 0, ())}
POSITIVE, NEGATIVE = ("positive", 0, ("face 0",)), ("negative", 0, ("zeros 0",))


@pytest.fixture
def model(tiny, tools):
    return tools.inject(tiny.model, tools.kv_reference(tiny, tools.picture(1)))


@pytest.fixture
def watch(tiny, texts, tools):
    with tools.watch(tiny, positive=texts[0], negative=texts[1]) as watch:
        yield watch


@pytest.fixture
def draw(texts, tools):
    """draw(model, text, full, kv) -> a picture; with one number it is the host's own guider."""

    def run(model, *scales, latent=LATENT, **options):
        guider = (
            tools.guider(model, *texts, *scales) if len(scales) == 1 else tools.three_scales(model, *texts, *scales)
        )
        return tools.sample(model, *texts, torch.zeros(latent), guider=guider, **{"steps": 2, **options})

    return run


@pytest.fixture
def predict(texts, tools):
    """predict(model, ...) -> what the guider returns for fixed latents: a cfg or three scales."""
    x = torch.randn(2, *LATENT[1:], generator=torch.Generator().manual_seed(9))

    def call(model, *scales):
        guider = (
            tools.guider(model, *texts, *scales) if len(scales) == 1 else tools.three_scales(model, *texts, *scales)
        )
        return tools.denoised(model, None, None, x, 5.0, guider=guider)

    return call


# -- the guidance


@pytest.mark.parametrize(
    "scales", [(3.0, 2.0, 2.0), (2.0, 4.0, 0.0), (0.0, 2.0, 1.5), (4.0, 0.0, 1.0), (0.2, 0.3, 0.5)]
)
def test_it_weighs_the_four_predictions(tiny, model, predict, scales):
    """Which the host's own guider gives at 0 and at 1, without and with the KV injection."""
    (e_nu, e_nt), (e_fu, e_ft) = ((predict(m, 0.0), predict(m, 1.0)) for m in (tiny.model, model))
    text, full, kv = scales
    expected = (1 - text - full - kv) * e_nu + text * e_nt + full * e_ft + kv * e_fu
    assert close(predict(model, *scales), expected, 1e-4)


@pytest.mark.contract
def test_without_a_kv_injection_it_is_the_hosts_guider_at_text_plus_full(tiny, tools, draw):
    """To the bit, also with an image prompt, and for samplers that ask for the unconditional prediction."""
    prompted = tools.apply(tiny.model, tools.reference(tiny, tools.picture(1)))
    for plain in (tiny.model, prompted):
        assert torch.equal(draw(plain, 3.0, 2.0, 2.0), draw(plain, 5.0))
    assert torch.equal(
        draw(tiny.model, 3.0, 2.0, 2.0, sampler="euler_cfg_pp"), draw(tiny.model, 5.0, sampler="euler_cfg_pp")
    )
    assert torch.equal(draw(tiny.model, 0.4, 0.6, 2.0), draw(tiny.model, 1.0))


def test_a_kv_injection_without_effect_is_guidance_at_text_plus_full(tiny, tools, draw):
    """A mask of zeros: everything is evaluated, and nothing changes."""
    reference = tools.kv_reference(tiny, tools.picture(1))
    none = tools.inject(tiny.model, reference, mask=torch.zeros(1, 64, 64))
    expected = draw(tiny.model, 5.0)
    out = draw(none, 3.0, 2.0, 2.0)
    assert close(out, expected, 1e-4) and not torch.equal(out, expected)


def test_outside_of_the_part_in_which_the_kv_injection_acts_it_is_the_hosts_guider(tiny, tools, draw):
    reference = tools.kv_reference(tiny, tools.picture(1))
    never = tools.inject(tiny.model, reference, start=1.0, end=1.0)
    assert torch.equal(draw(never, 3.0, 2.0, 2.0), draw(tiny.model, 5.0))


def test_with_text_alone_the_kv_injection_is_left_out(tiny, model, watch, draw):
    out = draw(watch.model(model), 5.0, 0.0, 0.0)
    assert watch.references == [] and set(watch.rows) == PLAIN
    assert torch.equal(out, draw(tiny.model, 5.0))


# -- what is evaluated


@pytest.mark.parametrize(
    ("scales", "rows", "reference"),
    [
        ((3.0, 2.0, 2.0), PLAIN | {POSITIVE, NEGATIVE}, {"face", "zeros"}),
        ((0.0, 2.0, 2.0), {("negative", 0, ()), POSITIVE, NEGATIVE}, {"face", "zeros"}),
        ((3.0, 0.0, 2.0), PLAIN | {NEGATIVE}, {"zeros"}),
        ((3.0, 2.0, 0.0), PLAIN | {POSITIVE}, {"face"}),
        ((0.0, 0.0, 2.0), {("negative", 0, ()), NEGATIVE}, {"zeros"}),
        ((0.2, 0.3, 0.5), {("positive", 0, ()), POSITIVE, NEGATIVE}, {"face", "zeros"}),
        ((0.0, 1.0, 0.0), {POSITIVE}, {"face"}),
    ],
)
def test_a_scale_of_0_makes_no_evaluation(model, watch, predict, texts, tools, scales, rows, reference):
    """Nor the half of the reference pass that it needs; nor is the plain negative evaluated where they add up to 1."""
    tools.denoised(
        None, None, None, torch.randn(LATENT), 5.0, guider=tools.three_scales(watch.model(model), *texts, *scales)
    )
    assert len(watch.rows) == len(rows) and set(watch.rows) == rows
    (one,) = watch.references
    assert set(one.names) == reference and len(one.names) == len(reference)


def test_the_image_prompt_acts_in_both_passes(tiny, tools, texts, predict):
    reference = tools.kv_reference(tiny, tools.picture(1), encoder=tools.encoder(tiny.encoder))
    without = tools.apply(tiny.model, reference)
    both = tools.inject(without, reference)
    e_nu, e_nt, e_fu, e_ft = predict(without, 0.0), predict(without, 1.0), predict(both, 0.0), predict(both, 1.0)
    assert close(predict(both, 3.0, 2.0, 2.0), -6 * e_nu + 3 * e_nt + 2 * e_ft + 2 * e_fu, 1e-4)


def test_the_same_text_in_both_sockets_is_told_apart(model, watch, tiny, tools):
    same = tiny.text(1)
    guider = tools.three_scales(watch.model(model), same, same)
    tools.denoised(None, None, None, torch.randn(LATENT), 5.0, guider=guider)
    assert sorted(row[2] for row in watch.rows) == [(), (), ("face 0",), ("zeros 0",)]


@pytest.mark.parametrize("pictures", [2, 5])
def test_each_picture_of_a_batch_is_as_if_drawn_alone(model, draw, watch, pictures):
    together = draw(watch.model(model), 3.0, 2.0, 2.0, latent=(pictures, *LATENT[1:]))
    with_kv = {row for row in watch.rows if row[2]}
    kinds = {"positive": "face", "negative": "zeros"}
    assert with_kv == {(text, n, (f"{kind} {n}",)) for n in range(pictures) for text, kind in kinds.items()}
    noise = [torch.randn(n, *LATENT[1:], generator=torch.Generator().manual_seed(1))[0] for n in (1, pictures)]
    assert torch.equal(*noise) and close(together[:1], draw(model, 3.0, 2.0, 2.0), 1e-4)


@pytest.mark.contract
def test_areas_are_given_to_both_passes(model, watch, tiny, tools, texts):
    (text, options), negative = texts[0][0], texts[1]
    halves = [[text, {**options, "area": (8, 4, 0, column)}] for column in (0, 4)]
    tools.denoised(
        None, None, None, torch.randn(LATENT), 5.0, guider=tools.three_scales(watch.model(model), halves, negative)
    )
    assert {row for row in watch.rows if row[0] == "positive"} == {("positive", 0, ()), POSITIVE}
    assert {row for row in watch.rows if row[0] == "negative"} == {("negative", 0, ()), NEGATIVE}


# -- presets


def test_presets_are_scales(pack, model, draw, tools, texts):
    own = {"text": 1.5, "full": 0.5, "kv": 0.25}
    presets = pack.module("lookahead.method.reference_presets").GUIDER
    assert list(presets["paper"].values()) == [3.0, 2.0, 2.0]
    for name, scales in {"as set below": own, **presets}.items():
        guider = tools.three_scales(model, *texts, *own.values(), preset=name)
        assert {"text": guider.text, "full": guider.full, "kv": guider.kv} == scales
        assert guider.cfg == guider.text + guider.full
    out = tools.sample(
        model, *texts, torch.zeros(LATENT), steps=2, guider=tools.three_scales(model, *texts, preset="faster")
    )
    assert torch.equal(out, draw(model, 3.0, 3.0, 0.0))


# -- what other nodes see of it


def test_another_guidance_is_refused_before_anything_is_evaluated(tiny, model, watch, draw, tools):
    for other in (model, tiny.model):
        watch.clear()
        replaced = tools.host_node("nodes_model_advanced", "RescaleCFG", watch.model(other), 0.7)
        with pytest.raises(ValueError) as error:
            draw(replaced, 3.0, 2.0, 2.0)
        assert "RescaleCFG" in tools.one_sentence(error) and watch.passes == watch.references == []


@pytest.mark.parametrize("scales", [(3.0, 2.0, 2.0), (5.0, 0.0, 2.0), (0.0, 0.0, 2.0)])
@pytest.mark.contract
def test_functions_before_and_after_the_guidance(tiny, model, predict, scales):
    """They get the prediction with text and KV (without KV where that is not made) and the plain unconditional one."""
    (e_nu, e_nt), (e_fu, e_ft) = ((predict(m, 0.0), predict(m, 1.0)) for m in (tiny.model, model))
    cond = e_ft if scales[1] else e_nt if scales[0] else e_nu
    seen = []

    def before(args):
        assert args["cond_scale"] == scales[0] + scales[1] and args["sigma"] is args["timestep"]
        assert close(args["conds_out"][0], cond, 1e-4) and close(args["conds_out"][1], e_nu, 1e-4)
        assert args["model_options"]["transformer_options"] and args["input"].shape == e_nu.shape
        seen.append("before")
        return args["conds_out"]

    def after(args):
        assert close(args["cond_denoised"], cond, 1e-4) and close(args["uncond_denoised"], e_nu, 1e-4)
        assert args["denoised"].shape == args["input"].shape and args["model"] is tiny.model.model
        seen.append("after")
        return args["denoised"] + 1

    expected = predict(model, *scales)
    model = model.clone()
    model.set_model_sampler_pre_cfg_function(before)
    model.set_model_sampler_post_cfg_function(after)
    assert close(predict(model, *scales), expected + 1)
    assert seen == ["before", "after"]


def test_what_a_function_before_the_guidance_changes_counts(model, predict):
    expected = predict(model, 3.0, 2.0, 2.0)

    def doubled(args):
        cond, uncond = args["conds_out"]
        return [cond + 1, uncond + 10]

    changed = model.clone()
    changed.set_model_sampler_pre_cfg_function(doubled)
    assert close(predict(changed, 3.0, 2.0, 2.0), expected + 2 * 1 - 6 * 10, 1e-4)


@pytest.mark.parametrize("which", ["cond", "uncond"])
@pytest.mark.contract
def test_functions_after_the_guidance_evaluate_with_the_options_of_the_full_pass(model, watch, texts, tools, which):
    import comfy.samplers

    def after(args):
        watch.passes.clear()
        options = args["model_options"]
        comfy.samplers.calc_cond_batch(args["model"], [args[which]], args["input"], args["sigma"], options)
        return args["denoised"]

    other = watch.model(model)
    other.set_model_sampler_post_cfg_function(after)
    tools.denoised(None, None, None, torch.randn(LATENT), 5.0, guider=tools.three_scales(other, *texts))
    assert watch.rows == [POSITIVE if which == "cond" else NEGATIVE] and len(watch.references) == 1


@pytest.mark.contract
def test_a_function_in_place_of_the_evaluation_makes_both_passes(model, predict):
    import comfy.samplers

    passes = []

    def evaluate(args):
        passes.append([cond is not None for cond in args["conds"]])
        names = ("model", "conds", "input", "sigma", "model_options")
        return comfy.samplers.calc_cond_batch(*(args[name] for name in names))

    other = model.clone()
    other.model_options["sampler_calc_cond_batch_function"] = evaluate
    assert torch.equal(predict(other, 3.0, 2.0, 0.0), predict(model, 3.0, 2.0, 0.0))
    assert passes == [[True, True], [True, False]]


@pytest.mark.contract
def test_the_two_passes_have_names_of_their_own_that_stay_from_step_to_step(model, watch, texts, tools):
    """Nodes that keep something for each condition know it by its uuid."""
    guider = tools.three_scales(watch.model(model), *texts)
    found = []
    for seed in (1, 2):
        watch.clear()
        tools.sample(model, *texts, torch.zeros(LATENT), steps=3, guider=guider, seed=seed)
        for one in watch.passes:
            kv = [bool(row[2]) for row in one.rows]
            found += zip(
                one.options["uuids"],
                [(row[0], with_kv) for row, with_kv in zip(one.rows, kv, strict=True)],
                strict=True,
            )
    assert len(found) == 4 * 3 * 2 and len(set(found)) == 4 and len({uuid for uuid, _ in found}) == 4


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m", "uni_pc", "euler_cfg_pp", "dpmpp_2m_cfg_pp"])
@pytest.mark.contract
def test_every_kind_of_sampler(model, draw, watch, sampler):
    assert draw(watch.model(model), 3.0, 2.0, 2.0, sampler=sampler, steps=3).isfinite().all()
    assert set(watch.rows) == PLAIN | {POSITIVE, NEGATIVE} and len(watch.rows) == 4 * len(watch.passes) / 2
    levels = [one.t for one in watch.references]
    assert len(levels) == len(set(levels)) and set(levels) == {one.t for one in watch.passes}


@pytest.mark.parametrize("scales", [(0.2, 0.3, 0.5), (0.0, 1.0, 0.0)])
@pytest.mark.contract
def test_samplers_that_need_the_unconditional_prediction_get_it_also_where_the_scales_add_up_to_1(
    model, draw, watch, scales
):
    draw(watch.model(model), *scales, sampler="euler_cfg_pp")
    assert ("negative", 0, ()) in watch.rows


@pytest.mark.contract
def test_sampler_custom_advanced(model, tools, texts, watch):
    import comfy.samplers
    from comfy_extras.nodes_custom_sampler import Noise_RandomNoise, SamplerCustomAdvanced

    guider, sampler = tools.three_scales(watch.model(model), *texts), comfy.samplers.sampler_object("euler")
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "karras", 2)
    latent = {"samples": torch.zeros(LATENT)}
    first, second = (
        SamplerCustomAdvanced.execute(Noise_RandomNoise(5), guider, sampler, sigmas, latent).result[0]["samples"]
        for _ in range(2)
    )
    assert torch.equal(first, second) and len(watch.references) == 2
    assert set(watch.rows) == PLAIN | {POSITIVE, NEGATIVE}


@pytest.mark.contract
def test_an_interrupt_leaves_nothing_behind(tiny, model, tools, texts, draw):
    import comfy.model_management

    plain, guided = draw(tiny.model, 3.0), draw(model, 3.0, 2.0, 2.0)
    guider = tools.three_scales(model, *texts)
    before = dict(vars(guider))
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        tools.sample(model, *texts, torch.zeros(LATENT), steps=2, guider=guider, callback=interrupt)
    again = tools.sample(model, *texts, torch.zeros(LATENT), steps=2, guider=guider)
    assert torch.equal(again, guided) and torch.equal(draw(tiny.model, 3.0), plain)
    assert guider.model_options is before["model_options"]
    context = guider.model_options["transformer_options"]["lookahead"]
    assert (len(context.effects), context.run, context.call, context.batch) == (1, None, None, None)


def test_outside_of_start_and_end_it_does_not_guide(tiny, tools, model, texts, watch):
    """The prediction is that of prompt and reference alone, in one evaluation."""
    x = torch.randn(LATENT, generator=torch.Generator().manual_seed(9))
    sampling = tiny.model.get_model_object("model_sampling")
    prompted = tools.apply(tiny.model, tools.reference(tiny, tools.picture(1)))

    def at(model, share, **options):
        guider = tools.three_scales(model, *texts, 3.0, 2.0, 2.0, **options)
        return tools.denoised(model, None, None, x, sampling.percent_to_sigma(share), guider=guider)

    for m in (model, prompted):
        for share in (0.1, 0.9):
            sigma = sampling.percent_to_sigma(share)
            assert torch.equal(at(m, share, start=0.2, end=0.8), tools.denoised(m, *texts, x, sigma, cfg=1.0))
        assert torch.equal(at(m, 0.5, start=0.2, end=0.8), at(m, 0.5))
    watch.clear()
    fresh = tools.inject(tiny.model, tools.kv_reference(tiny, tools.picture(1)))  # the other's passes are in its cache
    at(watch.model(fresh), 0.9, end=0.8)
    assert watch.rows == [POSITIVE]
    with pytest.raises(ValueError) as error:
        at(model, 0.5, start=0.8, end=0.2)
    assert "0.8" in tools.one_sentence(error)


def test_the_page_writes_a_preset_s_numbers(tiny, texts, pack):
    """The same scales act, by the preset or by what the page writes into the fields."""
    node = pack.nodes["LookaheadGuider"]
    (asked,) = [i for i in node.define_schema().inputs if i.id == "preset"]
    about = asked.as_dict()
    assert list(about["lookahead_presets"]) == about["options"][1:] and about["options"][0] == about["default"]
    for name, numbers in about["lookahead_presets"].items():
        (by_name,) = node.execute(tiny.model, *texts, preset=name).result
        (by_numbers,) = node.execute(tiny.model, *texts, **numbers).result
        assert [by_name.text, by_name.full, by_name.kv] == [by_numbers.text, by_numbers.full, by_numbers.kv]
    assert (
        len({tuple(numbers.values()) for numbers in about["lookahead_presets"].values()}) == len(about["options"]) - 1
    )
