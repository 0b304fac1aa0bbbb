"""KV injection in whole runs of the host: samplers, sizes, batches, neighbours of the model; nothing remains of it."""

import gc
import weakref

import pytest
import torch
from host_tools import interrupt
from tensors import relative
from worlds import control_net

LATENT = (1, 4, 8, 8)
EXPECTED = {("positive", 0, ("face 0",)), ("negative", 0, ("zeros 0",))}


@pytest.fixture
def reference(tiny, tools):
    return tools.kv_reference(tiny, tools.picture(1))


@pytest.fixture
def trained(tiny, tools):
    return tools.kv_reference(tiny, tools.picture(1), encoder=tools.kv_encoder(tiny))


@pytest.fixture
def watch(tiny, texts, tools):
    with tools.watch(tiny, positive=texts[0], negative=texts[1]) as watch:
        yield watch


@pytest.fixture
def draw(texts, tools):
    def run(model, latent=LATENT, **options):
        return tools.sample(model, *texts, torch.zeros(latent), **{"steps": 2, **options})

    return run


# -- nothing remains


@pytest.mark.contract
def test_the_model_without_the_node_is_bit_equal_before_and_after(tiny, trained, tools, draw):
    before = draw(tiny.model)
    with_kv = draw(tools.inject(tiny.model, trained))
    assert relative(with_kv, before) > 1e-2
    assert torch.equal(draw(tiny.model), before)
    assert torch.equal(draw(tools.inject(tiny.model, trained, weight=0.0)), before)
    assert "lookahead" not in tiny.model.model_options["transformer_options"] and not tiny.model.additional_models


@pytest.mark.parametrize("where", ["between steps", "in a reference pass", "in the picture's pass"])
@pytest.mark.contract
def test_an_interrupt_leaves_nothing_behind(tiny, trained, tools, draw, texts, where):
    """It is a BaseException in newer hosts."""
    import comfy.model_management

    model = tools.inject(tiny.model, trained, cache_gb=0.0)
    plain, patched = draw(tiny.model), draw(model)
    guider = tools.guider(model, *texts, 3.0)  # one that a graph keeps: the next run starts from the same object
    passes = []

    def on_pass(_, args, kwargs):
        passes.append(kwargs["transformer_options"].get("lookahead") is None)
        if len(passes) > 2 and passes[-1] == (where == "in a reference pass"):
            interrupt()

    unet, between = tiny.model.model.diffusion_model, where == "between steps"
    hook = unet.register_forward_pre_hook(on_pass, with_kwargs=True) if not between else None
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        draw(model, guider=guider, **({"callback": interrupt} if between else {}))
    if hook:
        hook.remove()
    assert torch.equal(draw(tiny.model), plain) and torch.equal(draw(model), patched)
    assert torch.equal(draw(model, guider=guider), patched)
    context = model.model_options["transformer_options"]["lookahead"]
    assert (len(context.effects), context.run, context.call, context.batch) == (1, None, None, None)


def test_what_lives_as_long_as_a_run_goes_with_it(tiny, trained, tools, draw, pack, monkeypatch):
    made = []
    kv_injection = pack.module("nodes.conditioning.kv_injection")

    class Watched(kv_injection.ReferencePass):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(weakref.ref(self))

    monkeypatch.setattr(kv_injection, "ReferencePass", Watched)
    model = tools.inject(tiny.model, trained)
    context = model.model_options["transformer_options"]["lookahead"]
    before = [dict(vars(part)) for part in (context, context.effects[0], context.effects[0].source)]
    draw(model)
    gc.collect()
    assert [ref() for ref in made] == [None]
    assert model.model_options["transformer_options"]["lookahead"] is context
    assert [vars(part) for part in (context, context.effects[0], context.effects[0].source)] == before


def test_two_branches_do_not_touch_each_other(tiny, tools, draw):
    def branch(seed):
        return tools.inject(tiny.model, tools.kv_reference(tiny, tools.picture(seed)))

    first, second = branch(1), branch(2)
    a, b = draw(first), draw(second)
    assert relative(a, b) > 1e-3
    tools.inject(first, tools.kv_reference(tiny, tools.picture(3)))  # a third branch that grows out of the first
    assert torch.equal(draw(second), b) and torch.equal(draw(first), a)


# -- samplers and schedulers

SAMPLERS = ["euler", "euler_ancestral", "heun", "dpmpp_2m", "dpmpp_sde", "uni_pc", "lcm", "euler_cfg_pp"]
SAMPLERS += ["dpmpp_2m_cfg_pp", "ddim"]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_kind_of_sampler(tiny, reference, tools, draw, watch, sampler):
    """Each model call reads the reference at its own noise level, which is evaluated once for each level."""
    assert draw(watch.model(tools.inject(tiny.model, reference)), sampler=sampler, steps=3).isfinite().all()
    assert set(watch.rows) == EXPECTED
    levels = [one.t for one in watch.references]
    assert len(levels) == len(set(levels)) and set(levels) == {one.t for one in watch.passes}
    assert len(levels) == {"dpmpp_sde": 5}.get(sampler, 3)


@pytest.mark.parametrize("scheduler", ["karras", "sgm_uniform", "beta"])
@pytest.mark.contract
def test_ksampler_and_sampler_custom_advanced(tiny, reference, tools, texts, pack, watch, scheduler):
    """The two ways on which the host samples give the same picture."""
    import comfy.samplers
    from comfy_extras.nodes_custom_sampler import Noise_RandomNoise, SamplerCustomAdvanced

    model, latent = watch.model(tools.inject(tiny.model, reference)), {"samples": torch.zeros(LATENT)}
    (one,) = pack.host_nodes.common_ksampler(model, 5, 2, 3.0, "dpmpp_2m", scheduler, *texts, latent)
    assert set(watch.rows) == EXPECTED
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), scheduler, 2)
    guider, sampler = tools.guider(model, *texts, 3.0), comfy.samplers.sampler_object("dpmpp_2m")
    two = SamplerCustomAdvanced.execute(Noise_RandomNoise(5), guider, sampler, sigmas, latent).result[0]
    assert torch.equal(one["samples"], two["samples"])


@pytest.mark.contract
def test_image_to_image_and_inpainting(tiny, reference, tools, texts, pack, watch):
    """Only a part of the sampling; a mask keeps what is outside of it."""
    picture = 3 * torch.randn(LATENT, generator=torch.Generator().manual_seed(4))
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., :32] = 1
    drawn = {}
    for name, model in (("plain", tiny.model), ("with KV", watch.model(tools.inject(tiny.model, reference)))):
        watch.clear()
        latent = {"samples": picture, "noise_mask": mask}
        (out,) = pack.host_nodes.common_ksampler(model, 5, 2, 3.0, "euler", "normal", *texts, latent, denoise=0.5)
        drawn[name] = out["samples"]
    assert set(watch.rows) == EXPECTED and max(one.t for one in watch.references) < 600
    assert torch.allclose(drawn["with KV"][..., 4:], picture[..., 4:], atol=1e-4)
    assert relative(drawn["with KV"][..., :4], drawn["plain"][..., :4]) > 1e-3


def test_start_and_end(tiny, reference, tools, draw, watch):
    model, sampling = watch.model(tiny.model), tiny.model.get_model_object("model_sampling")
    middle = float(sampling.timestep(torch.tensor(sampling.percent_to_sigma(0.5))))
    for window, acts in (({"start": 0.5}, lambda t: t <= middle), ({"end": 0.5}, lambda t: t >= middle)):
        watch.clear()
        draw(tools.inject(model, reference, **window), steps=4)
        where = {one.t: any(row[2] for row in one.rows) for one in watch.passes}
        assert where == {t: acts(t) for t in where} and set(where.values()) == {True, False}
        assert {one.t for one in watch.references} == {t for t in where if acts(t)}


# -- sizes and batches


@pytest.mark.parametrize("batch", [2, 5])
def test_each_picture_of_a_batch_is_as_if_drawn_alone(tiny, trained, tools, draw, batch):
    model = tools.inject(tiny.model, trained)
    together = draw(model, (batch, *LATENT[1:]))
    # The noise of the first picture is the same in both.
    noise = [torch.randn(n, *LATENT[1:], generator=torch.Generator().manual_seed(1))[0] for n in (1, batch)]
    assert torch.equal(*noise) and relative(together[:1], draw(model)) < 1e-4
    assert together.shape[0] == batch and relative(together[:1], together[1:2]) > 1e-3


def test_a_reference_of_another_size_is_noised_from_the_seed(tiny, tools, draw, watch):
    """One noise for all pictures of the batch, and another for another seed."""
    reference = tools.kv_reference(tiny, tools.picture(1), size=96)
    model, scale = tools.inject(tiny.model, reference), tiny.model.model.latent_format.scale_factor
    drawn = []
    for seed in (1, 2):
        watch.clear()
        drawn.append(draw(watch.model(model), (2, *LATENT[1:]), seed=seed))
        assert {row[2] for row in watch.rows} == {("face 0",), ("zeros 0",)}
        noise = torch.randn(1, 4, 12, 12, generator=torch.Generator().manual_seed(seed))
        sigma = float(tiny.model.get_model_object("model_sampling").sigma_max)
        expected = (scale * reference.subjects[0].latents + sigma * noise) / (sigma**2 + 1) ** 0.5
        assert torch.allclose(watch.references[0].x[:1], expected, atol=1e-5)
    assert relative(*drawn) > 1e-3


def test_a_run_without_noise_noises_the_reference_from_the_seed(tiny, reference, tools, draw, watch, texts):
    """As a second sampler in a row is given no noise: a reference without any would be no reference at that level."""
    guider = tools.guider(watch.model(tools.inject(tiny.model, reference)), *texts, 3.0)
    x, sigmas = torch.randn(LATENT), torch.tensor([5.0, 0.0])
    import comfy.samplers

    sampler = comfy.samplers.sampler_object("euler")
    guider.sample(torch.zeros(LATENT), x, sampler, sigmas, disable_pbar=True, seed=3)
    noise = torch.randn(LATENT, generator=torch.Generator().manual_seed(3))
    scaled = tiny.model.model.latent_format.scale_factor * reference.subjects[0].latents
    assert torch.allclose(watch.references[0].x[:1], (scaled + 5.0 * noise) / 26**0.5, atol=1e-5)


def test_two_stages_are_one_run_for_every_picture_of_a_batch(tiny, reference, tools, texts, pack, caplog):
    """KSamplerAdvanced with leftover noise, then without new noise: the second stage gets no noise to share."""
    node, latent = pack.host_nodes.KSamplerAdvanced(), {"samples": torch.zeros(3, *LATENT[1:])}
    model = tools.inject(tiny.model, reference)

    def stage(samples, noise, first, last, leftover):
        asked = (model, noise, 5, 4, 3.0, "euler", "normal", *texts, samples, first, last, leftover)
        return node.sample(*asked)[0]

    whole = stage(latent, "enable", 0, 4, "disable")["samples"]
    caplog.set_level("INFO")
    half = stage(latent, "enable", 0, 2, "enable")
    assert "noise of seed" not in caplog.text
    halves = stage(half, "disable", 2, 4, "disable")["samples"]
    assert relative(halves, whole) < 1e-4 and "noise of seed 5" in caplog.text
    assert not [record for record in caplog.records if record.levelname == "WARNING"]  # nothing is wrong with it


def test_a_later_stage_by_disable_noise_is_warned_of_since_it_has_no_seed(tiny, reference, tools, texts, caplog):
    """The page shows warnings. With the same noise at all seeds there is nothing to warn of."""
    import comfy.samplers
    from comfy_extras.nodes_custom_sampler import Noise_EmptyNoise, SamplerCustomAdvanced

    euler, half = comfy.samplers.sampler_object("euler"), {"samples": torch.randn(LATENT)}
    said = []
    for noise in ("shared", "fixed"):
        caplog.clear()
        guider = tools.guider(tools.inject(tiny.model, reference, noise=noise), *texts, 3.0)
        SamplerCustomAdvanced.execute(Noise_EmptyNoise(), guider, euler, torch.tensor([5.0, 0.0]), half)
        said.append([record.getMessage() for record in caplog.records if record.levelname == "WARNING"])
    assert len(said[0]) == 1 and said[1] == []
    assert said[0][0].startswith("[LCM-Lookahead] this run adds no noise of its own") and "DisableNoise" in said[0][0]


@pytest.mark.parametrize("kind", ["tiny", "sdxl"])
def test_520_x_392_pixels(worlds, tools, kind):
    world = worlds(kind)
    texts, latent = (world.text(1), world.text(2)), torch.zeros(1, 4, 49, 65)
    mask = torch.ones(1, 392, 520)
    mask[..., 300:] = 0
    reference = tools.kv_reference(world, tools.picture(1), size=104)  # 13x13 latents
    plain = tools.sample(world.model, *texts, latent, steps=1, cfg=1.0)
    for options in ({}, {"mask": mask}) if kind == "tiny" else ({"mask": mask},):
        out = tools.sample(tools.inject(world.model, reference, **options), *texts, latent, steps=1, cfg=1.0)
        assert out.shape == latent.shape and out.isfinite().all() and relative(out, plain) > 1e-3


# -- beside other parts of the model


def test_with_a_lora_before_or_after(tiny, trained, tools, draw):
    before = draw(tools.inject(tools.with_lora(tiny.model), trained))
    after = draw(tools.with_lora(tools.inject(tiny.model, trained)))
    assert torch.equal(before, after)
    for other in (tools.inject(tiny.model, trained), tools.with_lora(tiny.model)):
        assert relative(before, draw(other)) > 1e-3


@pytest.mark.contract
def test_a_lora_as_a_hook_does_not_reach_the_reference(tiny, reference, tools, watch):
    (text, options), negative = tiny.text(1)[0], tiny.text(2)
    exported, drawn = [], []
    for extra in ({}, {"hooks": tools.with_lora(tiny.model, hook=True)}):
        watch.clear()
        model = watch.model(tools.inject(tiny.model, reference, cache_gb=0.0))
        drawn.append(tools.sample(model, [[text, {**options, **extra}]], negative, torch.zeros(LATENT), steps=2))
        exported.append([one.keys.clone() for one in watch.references])
        assert set(watch.rows) == EXPECTED
    assert all(torch.equal(a, b) for a, b in zip(*exported, strict=True)) and relative(*drawn) > 1e-3


@pytest.mark.contract
def test_with_a_control_net(tiny, reference, tools, watch, texts):
    """It acts on the picture, and the reference pass has none of it."""
    net = control_net(tiny).set_cond_hint(torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(3)), 0.5)
    controlled = [[[text, {**options, "control": net}]] for ((text, options),) in texts]
    controls = []

    def seen(_, args, kwargs):
        controls.append(kwargs.get("control", args[3] if len(args) > 3 else None) is not None)

    hook = watch.unet.register_forward_pre_hook(seen, with_kwargs=True)
    model = watch.model(tools.inject(tiny.model, reference))
    out = tools.sample(model, *controlled, torch.zeros(LATENT), steps=2)
    hook.remove()
    assert set(watch.rows) == EXPECTED and controls == [False, True] * 2
    assert relative(out, tools.sample(model, *texts, torch.zeros(LATENT), steps=2)) > 1e-3
    assert relative(out, tools.sample(tiny.model, *controlled, torch.zeros(LATENT), steps=2)) > 1e-3


def test_the_reference_pass_has_no_image_prompt_and_no_patches_of_the_picture(tiny, tools, watch, draw):
    """Every place of the host where another node can put something is taken."""
    import comfy.patcher_extension

    inside = []

    def note(name, answer):
        def call(*args, **kwargs):
            inside.append((name, watch.now.of_reference))
            return answer(*args)

        return call

    def passing(executor, *args, **kwargs):
        inside.append(("wrapper", watch.now.of_reference))
        return executor(*args, **kwargs)

    reference = tools.kv_reference(tiny, tools.picture(1), encoder=tools.encoder(tiny.encoder))
    draw(watch.model(tools.inject(tiny.model, tools.kv_reference(tiny, tools.picture(1)))))
    plain_keys = [one.keys for one in watch.references]
    watch.clear()
    model = watch.model(tools.inject(tools.apply(tiny.model, reference), reference))
    model.set_model_attn1_patch(note("attn1_patch", lambda n, context, value, extra: (n * 1.1, context, value)))
    model.set_model_attn2_patch(note("attn2_patch", lambda n, context, value, extra: (n * 1.1, context, value)))
    for place in ("attn1_output", "attn2_output", "middle"):
        model.set_model_patch(note(place, lambda n, extra: n * 1.1), f"{place}_patch")
    model.set_model_input_block_patch(note("input block", lambda h, options: h * 1.1))
    model.set_model_output_block_patch(note("output block", lambda h, hsp, options: (h * 1.1, hsp)))
    model.set_model_unet_function_wrapper(lambda apply, args: apply(args["input"], args["timestep"], **args["c"]))
    model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "test", passing)
    draw(model)
    assert {name for name, _ in inside} >= {"attn1_patch", "attn2_patch", "middle", "output block", "wrapper"}
    assert not any(of_reference for _, of_reference in inside)
    assert all(torch.equal(a.keys, b) for a, b in zip(watch.references, plain_keys, strict=True))
    assert set(watch.rows) == EXPECTED


@pytest.mark.contract
def test_an_inpainting_unet_works(worlds, texts, tools, tiny):
    world = worlds("tiny", in_channels=9)
    inpaint = {"concat_latent_image": torch.randn(LATENT), "concat_mask": torch.ones(1, 1, 64, 64)}
    texts = world.text(1, **inpaint), world.text(2, **inpaint)
    model = tools.inject(world.model, tools.kv_reference(world, tools.picture(1)))
    with tools.watch(world, positive=texts[0], negative=texts[1]) as watch:
        out = tools.sample(watch.model(model), *texts, torch.zeros(LATENT), steps=2)
    assert set(watch.rows) == EXPECTED
    # The reference is given as a picture to be painted anew: a mask of ones over a blank picture.
    (mask, blank) = watch.references[0].x[:, 4:5], watch.references[0].x[:, 5:]
    assert (mask == 1).all() and torch.equal(blank, blank[:1].expand_as(blank))
    assert relative(out, tools.sample(world.model, *texts, torch.zeros(LATENT), steps=2)) > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_16_bit(worlds, tiny, tools, dtype):
    world = worlds("tiny", dtype=dtype)

    def drawn(of):
        reference = tools.kv_reference(of, tools.picture(1), encoder=tools.kv_encoder(of))
        guider = tools.three_scales(tools.inject(of.model, reference), of.text(1), of.text(2), 1.0, 1.0, 0.5)
        return tools.sample(of.model, None, None, torch.zeros(LATENT), steps=1, guider=guider), reference

    out, reference = drawn(world)
    assert relative(out, drawn(tiny)[0]) < 0.1
    kept = next(iter(reference.subjects[0].cache.runs.values()))
    assert {k.dtype for rows in kept.values() for pairs in rows.values() for pair in pairs for k in pair} == {dtype}


# -- what the host's memory management is told


@pytest.mark.contract
def test_the_host_is_told_of_what_a_run_needs_and_loads_the_kv_encoder(tiny, trained, tools, draw, monkeypatch):
    import comfy.model_management

    asked = []
    load_models_gpu = comfy.model_management.load_models_gpu

    def watched(models, memory_required=0, **options):
        asked.append((models, memory_required))
        return load_models_gpu(models, memory_required=memory_required, **options)

    monkeypatch.setattr(comfy.model_management, "load_models_gpu", watched)

    def needed(model, latent=LATENT):
        asked.clear()
        draw(model, latent)
        return asked[0]

    plain = needed(tiny.model)[1]
    models, with_kv = needed(tools.inject(tiny.model, trained))
    network = trained.subjects[0].encoder.kv_patcher
    assert any(network.is_clone(model) for model in models)
    assert any(network.is_clone(loaded.model) for loaded in comfy.model_management.current_loaded_models)
    _, middle, deep = tiny.channels
    a_set = 4 * 2 * (5 * 16 * middle + 12 * 4 * deep)
    assert with_kv >= plain + 2 * a_set
    four = needed(tools.inject(tiny.model, trained), (4, *LATENT[1:]))[1]
    assert four >= needed(tiny.model, (4, *LATENT[1:]))[1] + 4 * 2 * a_set
    assert needed(tiny.model)[1] == plain  # and nothing of it stays


@pytest.mark.contract
def test_each_kv_encoder_is_loaded_once(tiny, trained, tools):
    other = tools.kv_reference(tiny, tools.picture(2), encoder=tools.kv_encoder(tiny, seed=9))
    model = tiny.model
    for reference in (trained, other, trained, tools.kv_reference(tiny, tools.picture(3))):
        model = tools.inject(model, reference)
    assert len(model.get_additional_models()) == 2
