"""Lookahead guidance in whole runs of the host, with random weights: a simple loss falls, and nothing remains."""

import gc
import weakref

import guided_cases
import pytest
import torch
from concept_oracle import random_offsets
from guided_cases import LATENT, falls, means
from tensors import relative
from worlds import control_net
from writing_patches import pure, with_patches, writing

draw, guide, loss, shortcut, vae = guided_cases.ALL  # fixtures


# -- guided runs


@pytest.mark.parametrize("kind", ["one-step", "plain x0"])
@pytest.mark.contract
def test_the_loss_falls_and_the_picture_changes(guide, draw, shortcut, kind, mini):
    sampler, report = guide(of=shortcut(kind=kind), jitter=0.0)  # so that losses can be compared
    out = draw(sampler)
    losses = means(report)
    assert len(losses) == 4 and falls(losses)  # measured: to 0.958 and 0.946
    assert relative(out, draw("euler")) > 1e-3


def guiders(model, positive, other, negative):
    """Those of the host that are none of CFGGuider's own kind, by name."""
    from comfy_extras.nodes_custom_sampler import Guider_Basic, Guider_DualCFG
    from comfy_extras.nodes_perpneg import Guider_PerpNeg

    basic, dual, perp = Guider_Basic(model), Guider_DualCFG(model), Guider_PerpNeg(model)
    basic.set_conds(positive)
    dual.set_conds(positive, other, negative)
    dual.set_cfg(3.0, 2.0)
    perp.set_conds(positive, negative, other)
    perp.set_cfg(3.0, 1.0)
    return {"BasicGuider": basic, "DualCFGGuider": dual, "PerpNegGuider": perp}


@pytest.mark.parametrize("name", ["BasicGuider", "DualCFGGuider", "PerpNegGuider"])
@pytest.mark.contract
def test_runs_of_other_guiders_of_the_host_are_guided(guide, tools, mini, texts, name):
    def drawn(sampler):
        guider = guiders(mini.model, texts[0], mini.text(3), texts[1])[name]
        return tools.sample(mini.model, None, None, torch.zeros(LATENT), guider=guider, sampler=sampler, steps=2)

    sampler, report = guide(jitter=0.0)
    out = drawn(sampler)
    assert falls(means(report)) and relative(out, drawn("euler")) > 1e-3  # measured: to 0.958


@pytest.mark.contract
def test_a_model_of_v_prediction_is_guided(guide, tools, mini, texts, shortcut):
    def as_v(model):
        return tools.host_node("nodes_model_advanced", "ModelSamplingDiscrete", model, "v_prediction", False)

    base, x = as_v(mini.model), 4 * torch.randn(LATENT)
    with_lora = as_v(tools.with_lora(mini.model))
    sampler, report = guide(of=shortcut(with_lora), jitter=0.0)
    tools.sample(base, *texts, torch.zeros(LATENT), sampler=sampler, steps=2)
    assert falls(means(report), 0.99)  # measured: to 0.984
    assert relative(tools.denoised(base, *texts, x, 4.0), tools.denoised(mini.model, *texts, x, 4.0)) > 0.05


@pytest.mark.parametrize("node", ["FreeU", "FreeU_V2"])
def test_a_model_with_free_u_is_guided(guide, tools, mini, texts, shortcut, node):
    """It writes into the tensors that it is given, which autograd needs as they were."""
    model = tools.host_node("nodes_freelunch", node, mini.model, 1.3, 1.4, 0.9, 0.2)
    sampler, report = guide(of=shortcut(tools.with_lora(model)), jitter=0.0)
    tools.sample(model, *texts, torch.zeros(LATENT), sampler=sampler, steps=2)
    assert falls(means(report))  # measured: to 0.954 and 0.968


def test_patches_that_write_into_what_they_get_have_the_gradient_of_those_that_do_not(
    guide, mini, tools, draw, shortcut
):
    def patched(change):
        model = with_patches(mini.model, change)
        model.set_model_unet_function_wrapper(
            lambda f, given: f(change(given["input"]), given["timestep"], **given["c"])
        )
        return model

    drawn, losses = [], []
    for change in (pure, writing):
        model = patched(change)
        sampler, report = guide(of=shortcut(tools.with_lora(model)), iterations=2, jitter=0.0)
        drawn.append(draw(sampler, model=model))
        losses.append(means(report))
    assert losses[0] == pytest.approx(losses[1], rel=1e-3) and relative(*drawn) < 1e-3
    assert relative(drawn[0], draw("euler", model=patched(pure))) > 1e-3


def test_windows_over_a_batch_have_the_lora_scales_of_their_own_pictures(guide, draw, mini, tools, shortcut):
    """The host's context windows evaluate two of four pictures at a time; each has its own LoRA scale by chance."""

    def windowed(model):
        windows = model, 2, 0, "standard_static", 1, False, "pyramid", 0, False
        return tools.host_node("nodes_context_windows", "ContextWindowsManualNode", *windows)

    drawn = []
    for model in (mini.model, windowed(mini.model)):
        sampler, _ = guide(iterations=1, jitter=0.9, of=shortcut(tools.with_lora(model)))
        drawn.append(draw(sampler, (4, *LATENT[1:]), model=model))
    assert relative(drawn[1], drawn[0]) < 1e-3


def test_a_model_of_flow_matching_is_guided_and_travels_in_time(guide, tools, mini, texts, shortcut, flow):
    sampler, report = guide(of=shortcut(tools.with_lora(flow)), iterations=3, jitter=0.0, time_travel=1)
    sigmas = torch.tensor([0.9, 0.5, 0.0])
    out = tools.sample(flow, *texts, torch.zeros(LATENT), sampler=sampler, sigmas=sigmas)
    losses = means(report)
    assert out.isfinite().all() and losses[3] < losses[0]


def test_one_run_is_guided_once(guide, tools):
    with pytest.raises(ValueError, match="Combine Lookahead Losses") as error:
        guide(guide()[0])
    tools.one_sentence(error)


def test_who_runs_its_function_past_it_is_told(guide, tools, mini, texts):
    """As nodes do that put something around a sampler: they would draw without guidance, and nobody would notice."""
    import comfy.samplers

    around = comfy.samplers.KSAMPLER(guide()[0].sampler_function)
    with pytest.raises(ValueError, match="not the other way round") as error:
        tools.sample(mini.model, *texts, torch.zeros(LATENT), sampler=around)
    tools.one_sentence(error)


def test_each_picture_of_a_batch_is_guided_as_if_alone(guide, draw):
    # One iteration: each multiplies by ten that a batch rounds otherwise than one picture (2e-5, 2e-4, 2e-3 measured).
    (sampler, _), (alone, _) = guide(iterations=1), guide(iterations=1)
    together = draw(sampler, (3, *LATENT[1:]))
    noise = [torch.randn(n, *LATENT[1:], generator=torch.Generator().manual_seed(1))[0] for n in (1, 3)]
    assert torch.equal(*noise) and relative(together[:1], draw(alone)) < 1e-3


def test_the_previews_by_which_the_benchmark_times_the_unet_alone_can_be_guided_by(guide, draw, pack, tools, mini):
    vae = pack.module("tools.bench_in_host")._ColourVAE()
    shortcut = tools.run("LookaheadShortcut", tools.with_lora(mini.model), vae)
    sampler, report = guide(of=shortcut, iterations=2)
    latent = {"samples": draw(sampler)}
    plot, previews, _ = pack.nodes["LookaheadGuidanceReport"].execute(latent, report).result
    assert len(means(report)) == 3 and previews.shape[-1] == 3 and float(previews.std()) > 0


def test_without_iterations_it_is_bit_equal_to_the_sampler(guide, draw):
    assert torch.equal(draw(guide(iterations=0)[0]), draw("euler"))


@pytest.mark.parametrize("end", ["guided", "interrupted", "failed", "interrupted while it looks at noises"])
@pytest.mark.contract
def test_the_next_run_is_bit_equal_and_nothing_is_kept_alive(guide, draw, tools, mini, pack, loss, end, monkeypatch):
    import comfy.model_management

    made, module = [], pack.module("nodes.guidance.guidance_sampler")

    class Watched(module.GuidedRun):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(weakref.ref(self))

    monkeypatch.setattr(module, "GuidedRun", Watched)

    calls = []

    def failing(picture, rows):
        calls.append(rows)
        if end.startswith("interrupted"):
            comfy.model_management.interrupt_current_processing()
        elif end == "failed":
            raise RuntimeError("no loss today")
        return loss.loss(picture, rows)

    def tensors():
        gc.collect()
        return sum(isinstance(o, torch.Tensor) for o in gc.get_objects())

    unet = mini.model.model.diffusion_model
    before, dicts = draw("euler"), [set(m.__dict__) for m in unet.modules()]
    options = {"best_of": 3} if "noises" in end else {}
    of = pack.module("nodes.losses.lookahead_loss").LookaheadLoss(failing)
    sampler, report = guide(iterations=2, loss=of, **options)
    known = tensors()
    if end == "guided":
        draw(sampler)
    else:
        with pytest.raises((comfy.model_management.InterruptProcessingException, RuntimeError)):
            draw(sampler)
        assert len(calls) == 1  # heeded within one iteration
    report.runs.clear()
    assert torch.equal(draw("euler"), before) and [set(m.__dict__) for m in unet.modules()] == dicts
    branches = len(list(next(iter(sampler.lookahead[0].shortcut.networks.values())).model.parameters()))
    gc.collect()
    assert [ref() for ref in made] == [None] and tensors() <= known + branches + 4


def test_a_guided_run_is_the_same_each_time(guide, draw):
    sampler, _ = guide("euler_ancestral", jitter=0.5, time_travel=1, best_of=3)
    assert torch.equal(draw(sampler), draw(sampler))


def test_without_backward_no_pass_of_the_unet_is_recorded_and_the_loss_falls(guide, draw, mini):
    recorded = []
    block = mini.model.model.diffusion_model.middle_block[0]
    hook = block.register_forward_hook(lambda *_: recorded.append(torch.is_grad_enabled()))
    sampler, report = guide(jitter=0.0, backward=False)
    out = draw(sampler)
    hook.remove()
    assert not any(recorded) and len(recorded) >= 4 and falls(means(report))  # measured: to 0.963
    assert relative(out, draw("euler")) > 1e-3


def test_the_best_of_several_noises_is_taken_at_the_first_step_of_a_run(guide, draw, pack):
    """Never worse than the picture's own; the first picture of a batch as if alone; nothing else is moved."""
    sampler, report = guide(iterations=0, best_of=6)
    alone, together = draw(sampler), draw(sampler, (3, *LATENT[1:]))
    assert relative(together[:1], alone) < 1e-3 and torch.equal(draw(sampler), alone)
    assert relative(together, draw("euler", (3, *LATENT[1:]))) > 1e-3
    text = pack.nodes["LookaheadGuidanceReport"].execute({"samples": together}, report).result[2]
    before, after = (float(value) for value in text.removeprefix("best of 6 noises: colour ").split(" -> "))
    assert after < before


def test_later_steps_and_travels_go_on_from_the_noise_that_was_chosen(guide, draw):
    sampler, report = guide(iterations=1, guided_steps=2, time_travel=1, best_of=3)
    draw(sampler, steps=3)
    (run,) = report.runs.values()
    assert run.text().count("noises") == 1 and len(run.iterates) == 8


def test_time_travel_goes_back_and_guides_again(guide, draw):
    (sampler, report), (plain, _) = guide(iterations=2, time_travel=2), guide(iterations=2)
    assert relative(draw(sampler), draw(plain)) > 1e-3
    assert len(means(report)) == 9


def test_noises_to_choose_from_and_to_travel_with_are_none_that_the_run_has_seen(guide, draw, pack, monkeypatch):
    module, seen = pack.module("nodes.guidance.guided_run"), []
    run, best_start, time_travel = module.GuidedRun, module.best_start, module.time_travel
    guide_once = run.guide

    def watched(self, x, call, step):
        seen.append(self._noise)
        guide_once(self, x, call, step)

    def chosen(judge, z, draws, *others):
        return best_start(judge, z, [lambda draw=draw: seen.append(draw()) or seen[-1] for draw in draws], *others)

    def travelled(x, denoised, sigma, sigma_next, noise, flow):
        seen.append(noise)
        return time_travel(x, denoised, sigma, sigma_next, noise, flow)

    for name, watching in (("best_start", chosen), ("time_travel", travelled)):
        monkeypatch.setattr(module, name, watching)
    monkeypatch.setattr(run, "guide", watched)
    draw(guide(iterations=1, time_travel=2, best_of=3)[0])
    assert len(seen) == 5
    alike = torch.corrcoef(torch.stack([noise.flatten() for noise in seen])).triu(1).abs()
    assert float(alike.max()) < 5 / LATENT[-1] / LATENT[1] ** 0.5  # five standard errors of chance


@pytest.mark.contract
def test_under_an_inpainting_mask_what_is_kept_stays(guide, tools, mini, texts):
    latent, mask = torch.randn(LATENT), torch.zeros(1, 1, 64, 64)
    mask[..., 32:, :] = 1

    def run(sampler):
        return tools.sample(mini.model, *texts, latent, sampler=sampler, steps=2, denoise_mask=mask)

    guided, plain = run(guide()[0]), run("euler")
    assert torch.allclose(guided[..., :4, :], latent[..., :4, :], atol=1e-4)
    assert relative(guided[..., 4:, :], plain[..., 4:, :]) > 1e-3


def test_a_mask_says_where_the_latent_moves(guide, draw, mini, pack, monkeypatch):
    """Outside of it, the state that the sampler goes on from is the same to the bit."""
    states, module = [], pack.module("nodes.guidance.guidance_sampler")
    guide_once = module.GuidedRun.guide

    def watched(self, x, call, step):
        before = x.clone()
        guide_once(self, x, call, step)
        states.append((before, x.clone()))

    monkeypatch.setattr(module.GuidedRun, "guide", watched)
    mask = torch.zeros(1, 64, 64)
    mask[:, :32] = 1
    draw(guide(mask=mask)[0])
    ((before, after),) = states
    assert torch.equal(before[..., 5:, :], after[..., 5:, :])
    assert relative(after[..., :4, :], before[..., :4, :]) > 1e-3


def test_img2img_is_guided_at_its_first_step(guide, tools, mini, texts):
    sampler, report = guide(start=0.12)
    sigmas = torch.tensor([3.0, 1.0, 0.0])
    tools.sample(mini.model, *texts, torch.randn(LATENT), sampler=sampler, sigmas=sigmas)
    (run,) = report.runs.values()
    assert {(i.step, i.sigma) for i in run.iterates} == {(0, 3.0)}


def test_a_run_that_ends_before_start_is_not_guided_and_says_so(guide, tools, mini, texts, caplog):
    sampler, report = guide(start=0.9)
    sigmas = torch.tensor([14.0, 9.0, 5.0])
    out = tools.sample(mini.model, *texts, torch.zeros(LATENT), sampler=sampler, sigmas=sigmas)
    plain = tools.sample(mini.model, *texts, torch.zeros(LATENT), sampler="euler", sigmas=sigmas)
    assert torch.equal(out, plain) and "no step of this run is guided" in caplog.text


@pytest.mark.parametrize("split", [False, True])
def test_a_run_of_one_step_is_guided_at_it(guide, tools, mini, texts, split):
    """As of Turbo or DMD2: the step leads past start, so it is the last that can be guided."""
    import comfy.samplers

    euler = comfy.samplers.sampler_object("euler")
    if split:
        euler = type(
            "Other",
            (comfy.samplers.KSAMPLER,),
            {"sample": lambda self, *a, **k: super(type(self), self).sample(*a, **k)},
        )(euler.sampler_function)
    (sampler, report), sigmas = guide(euler, start=0.12), torch.tensor([14.6, 0.0])
    out = tools.sample(mini.model, *texts, torch.zeros(LATENT), sampler=sampler, sigmas=sigmas)
    plain = tools.sample(mini.model, *texts, torch.zeros(LATENT), sampler="euler", sigmas=sigmas)
    (run,) = report.runs.values()
    assert {i.step for i in run.iterates} == {0} and relative(out, plain) > 1e-3


@pytest.mark.contract
def test_a_sampler_of_another_kind_is_split(guide, draw, tools, mini, texts):
    """At the first step, and in the middle; under a mask it is refused."""
    import comfy.samplers

    class Other(comfy.samplers.Sampler):
        def sample(self, *args, **kwargs):
            return comfy.samplers.sampler_object("euler").sample(*args, **kwargs)

    for start in (0.0, 0.4):
        expected = draw(guide("euler", start=start)[0], steps=3)
        assert relative(draw(guide(Other(), start=start)[0], steps=3), expected) < 1e-4
    with pytest.raises(ValueError, match="under an inpainting mask") as error:
        mask = torch.ones(1, 1, 64, 64)
        tools.sample(mini.model, *texts, torch.zeros(LATENT), sampler=guide(Other())[0], steps=2, denoise_mask=mask)
    tools.one_sentence(error)


# -- beside the rest of the pack and of the host


@pytest.mark.contract
def test_image_prompt_and_kv_injection_act_in_the_preview(guide, tools, mini, texts, loss):
    """With the pack's own guider; the reference pass itself runs without the shortcut's LoRA, once."""
    reference = tools.kv_reference(mini, tools.picture(1), encoder=tools.encoder(mini.encoder))
    seen = []
    with tools.watch(mini, positive=texts[0], negative=texts[1]) as watch:
        model = watch.model(tools.inject(tools.apply(mini.model, reference), reference, cache_gb=0.0))
        guider = tools.three_scales(model, *texts, 1.0, 1.0, 0.5)
        sampler, report = guide(iterations=2)
        hook = (
            mini.model.model.diffusion_model.middle_block[1]
            .transformer_blocks[0]
            .attn1.to_k.register_forward_hook(lambda module, args, out: seen.append(args[0].shape[0]))
        )
        with_lora = tools.sample(model, None, None, torch.zeros(LATENT), guider=guider, sampler=sampler, steps=1)
        hook.remove()
    assert len(watch.references) == 1 and len(means(report)) == 3 and with_lora.isfinite().all()
    # A pass of the preview has the positive row alone; its keys and values are twice as long.
    options = [one.options for one in watch.passes[:3]]
    assert all(one.names == ["positive"] for one in watch.passes[:3])
    assert all("attn1" in o["patches_replace"] and "attn2" in o["patches_replace"] for o in options)


@pytest.mark.contract
def test_with_a_control_net_whose_effect_counts(guide, tools, mini, texts, worlds):
    net = control_net(mini).set_cond_hint(torch.rand(1, 3, 64, 64), 0.5)
    controlled = [[[text, {**options, "control": net}]] for ((text, options),) in texts]
    sampler, report = guide(iterations=2)
    tools.sample(mini.model, *controlled, torch.zeros(LATENT), sampler=sampler, steps=1)
    plain, plain_report = guide(iterations=2)
    tools.sample(mini.model, *texts, torch.zeros(LATENT), sampler=plain, steps=1)
    assert means(report)[0] != means(plain_report)[0]


def test_a_guider_without_positive_conditions_is_refused(guide, tools, mini, texts):
    import comfy.samplers

    guider = comfy.samplers.CFGGuider(mini.model)
    guider.inner_set_conds({"wanted": texts[0]})
    guider.predict_noise = lambda x, *args, **kwargs: x
    with pytest.raises(ValueError, match="has no positive conditions") as error:
        tools.sample(mini.model, None, None, torch.zeros(LATENT), guider=guider, sampler=guide()[0], steps=1)
    tools.one_sentence(error)


# -- what is told


@pytest.mark.contract
def test_progress_previews_and_the_report(guide, draw, pack, monkeypatch):
    import comfy.utils

    told = []
    hook = comfy.utils.PROGRESS_BAR_HOOK
    comfy.utils.set_progress_bar_global_hook(
        lambda value, total, preview, node_id=None: told.append((value, total, preview))
    )
    try:
        sampler, report = guide(iterations=3, live_previews=1)
        out = draw(sampler, (2, *LATENT[1:]), steps=3)
    finally:
        comfy.utils.set_progress_bar_global_hook(hook)
    assert [t[:2] for t in told[:4]] == [(n, 3) for n in range(4)]
    assert all(kind == "JPEG" and image.size[0] == 2 * 64 for kind, image, _ in (t[2] for t in told))
    assert [t[:2] for t in told[4:]] == [(1, 3), (2, 3)]  # live, but for the last step: there the picture is finished
    curve, previews, text = pack.nodes["LookaheadGuidanceReport"].execute({"samples": out}, report).result
    assert curve.shape == (1, 432, 768, 3) and 0 <= float(curve.min()) < float(curve.max()) <= 1
    assert previews.shape == (4, 64, 64, 3) and relative(previews[:2], previews[2:]) > 1e-4
    assert text.startswith("step 1 (sigma 14.6): colour ") and text.endswith("in 3 iterations, kept: best")
    with pytest.raises(ValueError, match="knows no guided run"):
        pack.nodes["LookaheadGuidanceReport"].execute({"samples": out + 1}, report)


def test_the_report_of_a_run_without_guidance_says_so_and_lets_the_graph_end(guide, draw, pack):
    node = pack.nodes["LookaheadGuidanceReport"]
    sampler, report = guide(iterations=0)
    latent = {"samples": draw(sampler)}
    for given in ({"report": report}, {}):  # switched off, and bypassed
        curve, previews, text = node.execute(latent=latent, **given).result
        assert "Nothing was guided" in text and curve.shape == previews.shape == (1, 432, 768, 3)


def test_the_report_says_when_the_few_step_lora_is_not_where_it_belongs(guide, draw, pack, mini, shortcut):
    sampler, report = guide(of=shortcut(mini.model), iterations=1)
    out = pack.nodes["LookaheadGuidanceReport"].execute({"samples": draw(sampler)}, report)
    guided, note = out.result[2].splitlines()
    assert guided.startswith("step 1") and "no LoRA" in note and "before Lookahead Shortcut" in note
    assert tuple(out.ui.as_dict()["text"]) == (out.result[2],)


def test_live_previews_change_nothing(guide, draw):
    assert torch.equal(draw(guide(iterations=0, live_previews=1)[0], steps=3), draw("euler", steps=3))


def test_with_too_little_memory_it_takes_less_in_a_stated_order(guide, draw, loss, pack, caplog, tools):
    calls = []

    def hungry(picture, rows):
        calls.append((tuple(picture.shape), rows))
        if len(picture) > 1 or picture.shape[-1] > 32:
            raise torch.OutOfMemoryError("out of memory (a test)")
        return loss.loss(picture, rows)

    sampler, report = guide(
        iterations=1, loss=pack.module("nodes.losses.lookahead_loss").LookaheadLoss(hungry), checkpointing="never"
    )
    draw(sampler, (2, *LATENT[1:]), steps=1)
    order = ["every block is computed twice", "decoded one by one", "at half their size"]
    places = [caplog.text.find(text) for text in order]
    assert -1 < places[0] < places[1] < places[2] and len(means(report)) == 2
    assert [int(rows) for _, rows in calls[-2:]] == [0, 1]

    def never(picture, rows):
        raise torch.OutOfMemoryError("out of memory (a test)")

    with pytest.raises(ValueError, match="memory is too small") as error:
        draw(guide(iterations=1, loss=pack.module("nodes.losses.lookahead_loss").LookaheadLoss(never))[0], steps=1)
    tools.one_sentence(error)


def test_with_previews_of_half_size_the_warm_start_has_the_latent_s_own(guide, draw, pack):
    """Memory that runs out while noises are looked at halves the previews of the rest of the run."""

    class Hungry:
        shows = True

        def __call__(self, picture, rows=None):
            if picture.shape[-1] > 32:
                raise torch.OutOfMemoryError("out of memory (a test)")
            return picture.square().mean((1, 2, 3)), torch.ones(len(picture), dtype=torch.bool)

        def shown(self, preview, rows=None):
            return preview.new_ones(preview.shape), preview.new_ones(len(preview), 1, *preview.shape[-2:])

    loss = pack.module("nodes.losses.lookahead_loss").LookaheadLoss(Hungry())
    leaned, plain = (draw(guide(iterations=0, loss=loss, best_of=2, lean=lean)[0]) for lean in (0.3, 0.0))
    assert relative(leaned, plain) > 1e-2


def test_reports_decode_when_somebody_looks(pack):
    decoded = []

    def decode(latent):
        decoded.append(latent.shape)
        return torch.rand(1, 1024, 512, 3)

    run = pack.module("nodes.guidance.guidance_report").RunReport("loss", decode=decode)
    for when in ("before", "after"):
        run.add(f"step 1, {when}", torch.rand(LATENT))
    assert not decoded
    assert {tuple(picture.shape) for picture in run.pictures()} == {(1, 512, 256, 3)} and decoded == 2 * [LATENT]


def test_it_guides_a_model_that_draws_a_concept(guide, shortcut, draw, tools, mini, pack):
    offsets = random_offsets(tools.diffusers_unet(mini), scale=0.1)
    concept = pack.module("lookahead.method.concept").Concept(torch.zeros(3), torch.zeros(3), "mug", 1, offsets, 0.5)
    model = tools.run("LookaheadApplyConcept", tools.with_lora(mini.model), concept)
    sampler, report = guide(of=shortcut(model))
    draw(sampler, model=model, steps=1)
    losses = means(report)
    assert losses[-1] < losses[0]
