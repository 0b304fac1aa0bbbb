"""The image prompt in whole runs of the host: nothing remains of it, nothing leaks, sizes and batches."""

import pytest
import torch
from host_tools import interrupt
from tensors import relative

LATENT = (1, 4, 16, 16)


@pytest.fixture
def reference(mini, tools):
    return tools.reference(mini, tools.picture(1))


def test_the_image_prompt_changes_the_picture(mini, texts, reference, tools):
    plain = tools.sample(mini.model, *texts, torch.zeros(LATENT))
    assert relative(tools.sample(tools.apply(mini.model, reference), *texts, torch.zeros(LATENT)), plain) > 1e-2


@pytest.mark.contract
def test_weight_0_is_bit_equal_to_no_node(mini, texts, reference, tools):
    before = tools.sample(mini.model, *texts, torch.zeros(LATENT))
    model = tools.apply(mini.model, reference, weight=0.0)
    assert "lookahead" not in model.model_options["transformer_options"]  # nothing is installed at all
    assert torch.equal(tools.sample(model, *texts, torch.zeros(LATENT)), before)


@pytest.mark.contract
def test_the_model_without_the_node_is_bit_equal_before_and_after(mini, texts, reference, tools):
    before = tools.sample(mini.model, *texts, torch.zeros(LATENT))
    model = tools.apply(mini.model, reference)
    tools.sample(model, *texts, torch.zeros(LATENT))
    assert torch.equal(tools.sample(mini.model, *texts, torch.zeros(LATENT)), before)
    assert "lookahead" not in mini.model.model_options["transformer_options"]


@pytest.mark.contract
def test_an_interrupt_in_the_middle_leaves_nothing_behind(mini, texts, reference, tools):
    import comfy.model_management

    model = tools.apply(mini.model, reference)
    plain = tools.sample(mini.model, *texts, torch.zeros(LATENT))
    patched = tools.sample(model, *texts, torch.zeros(LATENT))
    context = model.model_options["transformer_options"]["lookahead"]

    def in_the_middle(step, *args):
        if step == 1:
            interrupt()

    guider = tools.guider(model, *texts, 3.0)  # one that a graph keeps: the next run starts from the same object
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        tools.sample(model, *texts, torch.zeros(LATENT), callback=in_the_middle, guider=guider)
    assert torch.equal(tools.sample(model, *texts, torch.zeros(LATENT), guider=guider), patched)
    assert torch.equal(tools.sample(mini.model, *texts, torch.zeros(LATENT)), plain)
    assert torch.equal(tools.sample(model, *texts, torch.zeros(LATENT)), patched)
    assert (len(context.effects), context.run, context.call, context.batch) == (1, None, None, None)


def test_two_branches_do_not_touch_each_other(mini, texts, tools):
    def branch(seed):
        return tools.apply(mini.model, tools.reference(mini, tools.picture(seed)))

    first, second = branch(1), branch(2)
    a, b = (tools.sample(m, *texts, torch.zeros(LATENT)) for m in (first, second))
    assert relative(a, b) > 1e-3
    tools.apply(first, tools.reference(mini, tools.picture(3)))  # a third branch that grows out of the first
    assert torch.equal(tools.sample(second, *texts, torch.zeros(LATENT)), b)
    assert torch.equal(tools.sample(first, *texts, torch.zeros(LATENT)), a)
    assert torch.equal(tools.sample(branch(1), *texts, torch.zeros(LATENT)), a)


def test_two_nodes_in_series_add_up(mini, texts, reference, tools):
    """The same reference twice at half weight is the reference once at full weight."""
    once = tools.apply(mini.model, reference, weight=0.8)
    twice = tools.apply(tools.apply(mini.model, reference, weight=0.4), reference, weight=0.4)
    a, b = (tools.sample(m, *texts, torch.zeros(LATENT)) for m in (once, twice))
    assert relative(b, a) < 1e-5
    alone = tools.sample(tools.apply(mini.model, reference, weight=0.4), *texts, torch.zeros(LATENT))
    assert relative(alone, a) > 1e-3


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5])
def test_each_picture_of_a_batch_is_as_if_drawn_alone(mini, texts, reference, tools, batch):
    model = tools.apply(mini.model, reference)
    alone = tools.sample(model, *texts, torch.zeros(LATENT))
    together = tools.sample(model, *texts, torch.zeros(batch, *LATENT[1:]))
    assert together.shape[0] == batch
    # The noise of the first picture is the same in both.
    noise = [torch.randn(n, *LATENT[1:], generator=torch.Generator().manual_seed(1))[0] for n in (1, batch)]
    assert torch.equal(*noise) and relative(together[:1], alone) < 1e-4


@pytest.mark.parametrize("kind", ["mini", "sdxl"])
def test_520_x_392_pixels(worlds, tools, kind):
    world = worlds(kind)
    texts = world.text(1), world.text(2)
    latent = torch.zeros(1, 4, 49, 65)
    mask = torch.ones(1, 392, 520)
    mask[..., 300:] = 0
    model = tools.apply(world.model, tools.reference(world, tools.picture(1)), mask=mask)
    out = tools.sample(model, *texts, latent, steps=1)
    assert out.shape == latent.shape and out.isfinite().all()
    assert relative(out, tools.sample(world.model, *texts, latent, steps=1)) > 1e-3


@pytest.mark.contract
def test_start_and_end_hold_in_parts_of_the_sampling(mini, texts, reference, tools, pack, monkeypatch):
    patch = pack.module("nodes.conditioning.wrappers")
    sigmas = []

    class Recorded(patch.RowLayout):
        def __init__(self, x, options, rows):
            sigmas.append(float(options["sigmas"][0]))
            super().__init__(x, options, rows)

    monkeypatch.setattr(patch, "RowLayout", Recorded)
    sampling = mini.model.get_model_object("model_sampling")

    def run(**window):
        sigmas.clear()
        tools.sample(tools.apply(mini.model, reference, **window), *texts, torch.zeros(LATENT), steps=10)
        return list(sigmas)

    everywhere = run()
    middle = sampling.percent_to_sigma(0.5)
    assert len(everywhere) == 10
    assert run(start=0.5) == [s for s in everywhere if s <= middle]
    assert run(end=0.5) == [s for s in everywhere if s >= middle]
    assert 0 < len(run(start=0.5)) < 10


def test_outside_its_part_of_the_sampling_it_is_bit_equal_to_no_node(mini, texts, reference, tools):
    x = torch.randn(LATENT)
    early, late = (tools.apply(mini.model, reference, **w) for w in ({"end": 0.3}, {"start": 0.9}))
    plain = tools.denoised(mini.model, *texts, x, 0.5)
    assert torch.equal(tools.denoised(early, *texts, x, 0.5), plain)
    assert not torch.equal(tools.denoised(late, *texts, x, 0.05), tools.denoised(mini.model, *texts, x, 0.05))


@pytest.mark.contract
def test_with_a_lora_before_or_after(mini, texts, reference, tools):
    import comfy.lora
    import comfy.sd

    names = [k for k in comfy.lora.model_lora_keys_unet(mini.model.model, {}) if "attn2_to_q" in k and "lora_unet" in k]
    g = torch.Generator().manual_seed(8)
    lora = {}
    weights = mini.model.model.state_dict()
    for name in names:
        key = comfy.lora.model_lora_keys_unet(mini.model.model, {})[name]
        out, width = weights[key].shape
        lora[f"{name}.lora_down.weight"] = torch.randn(4, width, generator=g) * 0.3
        lora[f"{name}.lora_up.weight"] = torch.randn(out, 4, generator=g) * 0.3

    def with_lora(model):
        return comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)[0]

    before = tools.sample(tools.apply(with_lora(mini.model), reference), *texts, torch.zeros(LATENT))
    after = tools.sample(with_lora(tools.apply(mini.model, reference)), *texts, torch.zeros(LATENT))
    without = tools.sample(tools.apply(mini.model, reference), *texts, torch.zeros(LATENT))
    only_lora = tools.sample(with_lora(mini.model), *texts, torch.zeros(LATENT))
    assert torch.equal(before, after)
    assert relative(before, without) > 1e-3 and relative(before, only_lora) > 1e-3


@pytest.mark.contract
def test_an_inpainting_unet_works(worlds, texts, tools):
    world = worlds("mini", in_channels=9)
    inpaint = {"concat_latent_image": torch.randn(LATENT), "concat_mask": torch.ones(1, 1, 128, 128)}
    texts = world.text(1, **inpaint), world.text(2, **inpaint)
    model = tools.apply(world.model, tools.reference(world, tools.picture(1)))
    out = tools.sample(model, *texts, torch.zeros(LATENT), steps=2)
    assert relative(out, tools.sample(world.model, *texts, torch.zeros(LATENT), steps=2)) > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.contract
def test_a_model_in_16_bit(worlds, mini, tools, dtype):
    world = worlds("mini", dtype=dtype)
    texts = world.text(1), world.text(2)
    model = tools.apply(world.model, tools.reference(world, tools.picture(1)))
    out = tools.sample(model, *texts, torch.zeros(LATENT), steps=2)
    full = tools.apply(mini.model, tools.reference(mini, tools.picture(1)))
    assert relative(out, tools.sample(full, *texts, torch.zeros(LATENT), steps=2)) < 0.1
