"""The image prompt in whole runs of the host: nothing remains of it, nothing leaks, sizes and batches."""

import pytest
import torch
from host_tools import interrupt
from tensors import relative

LATENT = (1, 4, 8, 8)


@pytest.fixture
def reference(tiny, tools):
    return tools.reference(tiny, tools.picture(1))


@pytest.fixture
def draw(texts, tools):
    """draw(model) -> a picture of a few steps."""

    def run(model, latent=LATENT, **options):
        return tools.sample(model, *texts, torch.zeros(latent), **{"steps": 2, **options})

    return run


def test_the_image_prompt_changes_the_picture(tiny, reference, tools, draw):
    plain = draw(tiny.model)
    assert relative(draw(tools.apply(tiny.model, reference)), plain) > 1e-2


@pytest.mark.contract
def test_weight_0_is_bit_equal_to_no_node(tiny, reference, tools, draw):
    before = draw(tiny.model)
    model = tools.apply(tiny.model, reference, weight=0.0)
    assert "lookahead" not in model.model_options["transformer_options"]  # nothing is installed at all
    assert torch.equal(draw(model), before)


@pytest.mark.contract
def test_the_model_without_the_node_is_bit_equal_before_and_after(tiny, reference, tools, draw):
    before = draw(tiny.model)
    model = tools.apply(tiny.model, reference)
    draw(model)
    assert torch.equal(draw(tiny.model), before)
    assert "lookahead" not in tiny.model.model_options["transformer_options"]


@pytest.mark.contract
def test_an_interrupt_in_the_middle_leaves_nothing_behind(tiny, texts, reference, tools, draw):
    import comfy.model_management

    model = tools.apply(tiny.model, reference)
    plain = draw(tiny.model)
    patched = draw(model)
    context = model.model_options["transformer_options"]["lookahead"]

    def in_the_middle(step, *args):
        if step == 0:
            interrupt()

    guider = tools.guider(model, *texts, 3.0)  # one that a graph keeps: the next run starts from the same object
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        draw(model, callback=in_the_middle, guider=guider)
    assert torch.equal(draw(model, guider=guider), patched)
    assert torch.equal(draw(tiny.model), plain)
    assert torch.equal(draw(model), patched)
    assert (len(context.effects), context.run, context.call, context.batch) == (1, None, None, None)


def test_two_branches_do_not_touch_each_other(tiny, tools, draw):
    def branch(seed):
        return tools.apply(tiny.model, tools.reference(tiny, tools.picture(seed)))

    first, second = branch(1), branch(2)
    a, b = (draw(m) for m in (first, second))
    assert relative(a, b) > 1e-3
    tools.apply(first, tools.reference(tiny, tools.picture(3)))  # a third branch that grows out of the first
    assert torch.equal(draw(second), b)
    assert torch.equal(draw(first), a)
    assert torch.equal(draw(branch(1)), a)


def test_two_nodes_in_series_add_up(tiny, reference, tools, draw):
    """The same reference twice at half weight is the reference once at full weight."""
    once = tools.apply(tiny.model, reference, weight=0.8)
    twice = tools.apply(tools.apply(tiny.model, reference, weight=0.4), reference, weight=0.4)
    a, b = (draw(m) for m in (once, twice))
    assert relative(b, a) < 1e-5
    alone = draw(tools.apply(tiny.model, reference, weight=0.4))
    assert relative(alone, a) > 1e-3


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5])
def test_each_picture_of_a_batch_is_as_if_drawn_alone(tiny, reference, tools, batch, draw):
    model = tools.apply(tiny.model, reference)
    alone = draw(model)
    together = draw(model, (batch, *LATENT[1:]))
    assert together.shape[0] == batch
    # The noise of the first picture is the same in both.
    noise = [torch.randn(n, *LATENT[1:], generator=torch.Generator().manual_seed(1))[0] for n in (1, batch)]
    assert torch.equal(*noise) and relative(together[:1], alone) < 1e-4


@pytest.mark.parametrize("kind", ["tiny", "sdxl"])
def test_520_x_392_pixels(worlds, tools, kind):
    world = worlds(kind)
    texts = world.text(1), world.text(2)
    latent = torch.zeros(1, 4, 49, 65)
    mask = torch.ones(1, 392, 520)
    mask[..., 300:] = 0
    model = tools.apply(world.model, tools.reference(world, tools.picture(1)), mask=mask)
    out = tools.sample(model, *texts, latent, steps=1, cfg=1.0)
    assert out.shape == latent.shape and out.isfinite().all()
    assert relative(out, tools.sample(world.model, *texts, latent, steps=1, cfg=1.0)) > 1e-3


@pytest.mark.contract
def test_start_and_end_hold_in_parts_of_the_sampling(tiny, reference, tools, pack, monkeypatch, draw):
    patch = pack.module("nodes.conditioning.wrappers")
    sigmas = []

    class Recorded(patch.RowLayout):
        def __init__(self, x, options, rows):
            sigmas.append(float(options["sigmas"][0]))
            super().__init__(x, options, rows)

    monkeypatch.setattr(patch, "RowLayout", Recorded)
    sampling = tiny.model.get_model_object("model_sampling")

    def run(**window):
        sigmas.clear()
        draw(tools.apply(tiny.model, reference, **window), steps=4)
        return list(sigmas)

    everywhere, late = run(), run(start=0.5)
    middle = sampling.percent_to_sigma(0.5)
    assert len(everywhere) == 4
    assert late == [s for s in everywhere if s <= middle]
    assert run(end=0.5) == [s for s in everywhere if s >= middle]
    assert 0 < len(late) < 4


def test_outside_its_part_of_the_sampling_it_is_bit_equal_to_no_node(tiny, texts, reference, tools):
    x = torch.randn(LATENT)
    early, late = (tools.apply(tiny.model, reference, **w) for w in ({"end": 0.3}, {"start": 0.9}))
    plain = tools.denoised(tiny.model, *texts, x, 0.5)
    assert torch.equal(tools.denoised(early, *texts, x, 0.5), plain)
    assert not torch.equal(tools.denoised(late, *texts, x, 0.05), tools.denoised(tiny.model, *texts, x, 0.05))


@pytest.mark.contract
def test_with_a_lora_before_or_after(tiny, reference, tools, draw):
    before = draw(tools.apply(tools.with_lora(tiny.model), reference))
    after = draw(tools.with_lora(tools.apply(tiny.model, reference)))
    without = draw(tools.apply(tiny.model, reference))
    only_lora = draw(tools.with_lora(tiny.model))
    assert torch.equal(before, after)
    assert relative(before, without) > 1e-3 and relative(before, only_lora) > 1e-3


@pytest.mark.contract
def test_an_inpainting_unet_works(worlds, texts, tools):
    world = worlds("tiny", in_channels=9)
    inpaint = {"concat_latent_image": torch.randn(LATENT), "concat_mask": torch.ones(1, 1, 128, 128)}
    texts = world.text(1, **inpaint), world.text(2, **inpaint)
    model = tools.apply(world.model, tools.reference(world, tools.picture(1)))
    out = tools.sample(model, *texts, torch.zeros(LATENT), steps=2)
    assert relative(out, tools.sample(world.model, *texts, torch.zeros(LATENT), steps=2)) > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.contract
def test_a_model_in_16_bit(worlds, tiny, tools, dtype):
    world = worlds("tiny", dtype=dtype)
    texts = world.text(1), world.text(2)
    model = tools.apply(world.model, tools.reference(world, tools.picture(1)))
    out = tools.sample(model, *texts, torch.zeros(LATENT), steps=2)
    full = tools.apply(tiny.model, tools.reference(tiny, tools.picture(1)))
    assert relative(out, tools.sample(full, *texts, torch.zeros(LATENT), steps=2)) < 0.1
