"""Masks, areas, and life beside other nodes that patch the same cross-attentions."""

import dataclasses

import pytest
import torch
from other_packs import in_tiles, row_by_row
from tensors import half_masks, relative
from worlds import VISION, make_encoder, widths_of

LATENT = (1, 4, 16, 16)


@pytest.fixture
def reference(tiny, tools):
    return tools.reference(tiny, tools.picture(1))


@pytest.fixture
def draw(tiny, tools):
    """draw(model) -> one denoised prediction for fixed noise and text."""
    x = torch.randn(2, *LATENT[1:], generator=torch.Generator().manual_seed(9))

    def predict(model, positive=None, negative=None, cfg=3.0):
        return tools.denoised(model, positive or tiny.text(1), negative or tiny.text(2), x, 5.0, cfg=cfg)

    return predict


def test_a_mask_of_ones_is_no_mask_and_a_mask_of_zeros_no_image_prompt(tiny, tools, reference, draw):
    plain, full = draw(tiny.model), draw(tools.apply(tiny.model, reference))
    ones, zeros = torch.ones(1, 128, 128), torch.zeros(1, 128, 128)
    assert torch.equal(draw(tools.apply(tiny.model, reference, mask=ones)), full)
    assert torch.equal(draw(tools.apply(tiny.model, reference, mask=zeros)), plain)
    assert not torch.equal(full, plain)


def test_an_empty_mask_is_logged(tiny, tools, reference, caplog):
    with caplog.at_level("WARNING"):
        tools.apply(tiny.model, reference, mask=half_masks()[0])
        assert "LCM-Lookahead" not in caplog.text
        tools.apply(tiny.model, reference, mask=torch.zeros(1, 64, 64))
    assert caplog.text.count("LCM-Lookahead") == 1 and "mask" in caplog.text


def test_two_masks_that_share_the_picture_are_the_whole_prompt(tiny, tools, reference, draw):
    left, right = half_masks()
    both = tools.apply(tools.apply(tiny.model, reference, mask=left), reference, mask=right)
    whole = draw(tools.apply(tiny.model, reference))
    assert torch.allclose(draw(both), whole, atol=1e-4 * float(whole.abs().max()))


def test_a_mask_of_one_half_is_half_the_weight(tiny, tools, reference, draw):
    half = draw(tools.apply(tiny.model, reference, mask=torch.full((1, 32, 32), 0.5)))
    weight = draw(tools.apply(tiny.model, reference, weight=0.5))
    assert torch.allclose(half, weight, atol=1e-4 * float(weight.abs().max()))


def test_masks_go_to_the_pictures_of_a_batch_in_turn(tiny, tools, reference, draw):
    masks = torch.stack([torch.ones(64, 64), torch.zeros(64, 64)])
    out, plain = draw(tools.apply(tiny.model, reference, mask=masks)), draw(tiny.model)
    full = draw(tools.apply(tiny.model, reference))
    assert torch.allclose(out[0], full[0], atol=1e-4) and torch.allclose(out[1], plain[1], atol=1e-4)
    assert not torch.allclose(out[1], full[1], atol=1e-2)


def test_the_mask_holds_on_the_tokens_of_its_part_alone(tiny, tools, reference, draw, pack, monkeypatch):
    """On every grid, what is added is zero on the tokens of the other half and not on those of its own."""
    patch = pack.module("nodes.conditioning.cross_attention")
    attend, grids = patch.PromptRows.attend, set()

    def checked(self, q, key, extra, attention):
        added = attend(self, q, key, extra, attention)
        height, width = extra["activations_shape"][-2:]
        grid = added.unflatten(1, (height, width))
        assert grid[:, :, width // 2 :].abs().max() == 0 and grid[:, :, : width // 2].abs().min(-1).values.min() > 0
        grids.add((height, width))
        return added

    monkeypatch.setattr(patch.PromptRows, "attend", checked)
    draw(tools.apply(tiny.model, reference, mask=half_masks()[0]))
    assert grids == {(8, 8), (4, 4)}


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.contract
def test_an_area_sees_its_own_part_of_the_mask(tiny, tools, reference, draw, monkeypatch, split):
    """A condition on the right half: a mask over the right half is all ones there, one over the left half all zeros.

    Left and right areas have one size, so they share a batch: each still gets its own part.
    """
    if split:
        monkeypatch.setattr(tiny.model.model, "memory_required", lambda *args, **kwargs: float("inf"))
    left, right = half_masks()

    def areas(*columns):
        positive = []
        for n, column in enumerate(columns):
            text = tiny.text(20 + n)[0]
            positive.append([text[0], {**text[1], "area": (16, 8, 0, column)}])
        return positive

    def close(a, b):
        return torch.allclose(a, b, atol=1e-5)

    only_right = areas(8)
    plain, full = (draw(m, only_right, cfg=1.0) for m in (tiny.model, tools.apply(tiny.model, reference)))
    assert not close(plain, full)
    assert close(draw(tools.apply(tiny.model, reference, mask=right), only_right, cfg=1.0), full)
    assert close(draw(tools.apply(tiny.model, reference, mask=left), only_right, cfg=1.0), plain)

    beyond = [[only_right[0][0], {**only_right[0][1], "area": (16, 20, 0, 8)}]]  # reaches out of the picture
    assert close(draw(tools.apply(tiny.model, reference, mask=right), beyond, cfg=1.0), full)

    both = areas(0, 8)
    plain, full = (draw(m, both, cfg=1.0) for m in (tiny.model, tools.apply(tiny.model, reference)))
    out = draw(tools.apply(tiny.model, reference, mask=left), both, cfg=1.0)
    assert close(out[..., :8], full[..., :8]) and close(out[..., 8:], plain[..., 8:])
    assert not close(out[..., :8], plain[..., :8])


@pytest.mark.contract
def test_masked_conditions_run(tiny, tools, reference, draw):
    text = tiny.text(1)[0]
    mask = torch.zeros(1, 128, 128)
    mask[:, 32:96, 32:96] = 1
    for extra in ({"mask": mask, "mask_strength": 1.0}, {"mask": mask, "set_area_to_bounds": True}):
        positive = [[text[0], {**text[1], **extra}], tiny.text(3)[0]]
        model = tools.apply(tiny.model, reference, mask=half_masks()[0])
        assert not torch.equal(draw(model, positive), draw(tiny.model, positive))


def halved(calls):
    """Another pack's replacement of a cross-attention: the plain attention at half strength."""

    def replacement(q, k, v, extra):
        from comfy.ldm.modules.attention import optimized_attention

        calls.append(extra["block"])
        return optimized_attention(q, k, v, extra["n_heads"]) * 0.5

    return replacement


@pytest.mark.parametrize("key", ["triple", "pair"])
@pytest.mark.contract
def test_a_replacement_of_another_node_is_wrapped_in_either_order(tiny, tools, reference, draw, key):
    def other(model, calls):
        model = model.clone()
        extra = {"transformer_index": 0} if key == "triple" else {}
        model.set_model_attn2_replace(halved(calls), "output", 3, **extra)
        return model

    calls = []
    alone = draw(other(tiny.model, calls))
    count = len(calls)
    before = draw(tools.apply(other(tiny.model, calls), reference))
    after = draw(other(tools.apply(tiny.model, reference), calls))
    assert count > 0 and len(calls) == 3 * count
    assert torch.equal(before, after)
    assert not torch.equal(before, draw(tools.apply(tiny.model, reference)))
    assert not torch.equal(before, alone)
    # Nothing of ours stands where other packs' code would touch it.
    model = tools.apply(tiny.model, reference)
    assert "patches_replace" not in model.model_options["transformer_options"]


@pytest.mark.contract
def test_an_attention_override_of_another_node_sees_text_and_image_prompt(tiny, tools, reference):
    lengths = []

    def override(attention, q, k, v, *args, **kwargs):
        lengths.append(k.shape[1])
        return attention(q, k, v, *args, **kwargs)

    def draw(model):  # grids of 12x12 and 6x6: no self-attention has as many keys as text or image prompt
        x = torch.randn(1, 4, 24, 24, generator=torch.Generator().manual_seed(9))
        return tools.denoised(model, tiny.text(1), tiny.text(2), x, 5.0)

    model = tools.apply(tiny.model, reference)
    expected = draw(model)
    model.model_options["transformer_options"]["optimized_attention_override"] = override
    assert torch.equal(draw(model), expected)
    assert lengths.count(77) == 17 and lengths.count(16) == 17


@pytest.mark.contract
def test_rows_cut_into_tiles_see_the_image_prompt_of_their_row(tiny, tools, pack):
    """HyperTile and its like hand on more, shorter rows than the batch has."""
    patch = pack.module("nodes.conditioning.cross_attention")
    reference = tools.reference(tiny, tools.picture(4, n=2), several="one per picture")
    subject = reference.subjects[0]
    layout = {("middle", 0, 0): (0, 64)}
    prompt = patch.ImagePrompt(
        subject.keys_values[..., :128], subject.null_keys_values[..., :128], layout, torch.tensor(1.0)
    )
    x = torch.randn(2, 4, 16, 16)
    roles = pack.module("nodes.conditioning.rows")
    layout = roles.RowLayout(x, {"cond_or_uncond": [0]}, roles.CondBatch((True,), {}, (16, 16), range(2)))
    term = patch.PromptRows(prompt, layout)
    plain = pack.module("lookahead.method.attention").softmax_attention
    q = torch.randn(2, 16, 64)
    extra = {"n_heads": 2, "activations_shape": [2, 64, 4, 4]}
    whole = term.attend(q, ("middle", 0, 0), extra, plain)
    tiles = term.attend(q.reshape(8, 4, 64), ("middle", 0, 0), extra, plain)
    assert torch.allclose(tiles.reshape(2, 16, 64), whole, atol=1e-5)
    for rows in (3, 4):  # neither a multiple of the batch, nor rows that are there twice as if they were tiles
        assert term.attend(torch.randn(rows, 16, 64), ("middle", 0, 0), extra, plain) is None


def test_a_block_that_cannot_be_followed_runs_without_the_image_prompt_and_is_logged_once(
    tiny, tools, reference, draw, caplog
):
    def doubled(q, context, value, extra):
        return torch.cat([q, q]), torch.cat([context, context]), torch.cat([value, value])

    def first_half(n, extra):
        return n[: len(n) // 2]

    def other(model):
        model = model.clone()
        model.set_model_attn2_patch(doubled)
        model.set_model_patch(first_half, "attn2_output_patch")
        return model

    plain = draw(tiny.model)
    with caplog.at_level("WARNING"):
        out = draw(other(tools.apply(tiny.model, reference)))
    # Some processors round a doubled batch otherwise; the image prompt would change the picture by far more.
    assert relative(out, plain) < 1e-4 < 1e-2 < relative(draw(tools.apply(tiny.model, reference)), plain)
    assert len([r for r in caplog.records if "LCM-Lookahead" in r.getMessage()]) == 1


@pytest.mark.parametrize(("wrapper", "masked"), [(row_by_row, False), (in_tiles, True)])
def test_a_batch_that_cannot_be_followed_runs_without_the_image_prompt_and_is_logged_once(
    tiny, tools, reference, draw, caplog, wrapper, masked
):
    def other(model):
        model = model.clone()
        model.set_model_unet_function_wrapper(wrapper)
        return model

    plain = draw(other(tiny.model))
    mask = half_masks()[0] if masked else None
    with caplog.at_level("WARNING"):
        out = draw(other(tools.apply(tiny.model, reference, mask=mask)))
    assert torch.equal(out, plain)
    assert len([r for r in caplog.records if "LCM-Lookahead" in r.getMessage()]) == 1


def test_tiles_that_run_one_after_the_other_see_an_image_prompt_without_a_mask(tiny, tools, reference, draw, caplog):
    def other(model):
        model = model.clone()
        model.set_model_unet_function_wrapper(in_tiles)
        return model

    out = draw(other(tools.apply(tiny.model, reference)))
    assert not torch.allclose(out, draw(other(tiny.model)), atol=1e-2)
    assert "LCM-Lookahead" not in caplog.text


def test_a_pass_keeps_no_keys_and_values_of_every_row(tiny, tools, reference, pack):
    """For 16 images and four pictures together those of SDXL would be 680 MB."""
    patch = pack.module("nodes.conditioning.cross_attention")
    model = tools.apply(tiny.model, reference)
    prompt = model.model_options["transformer_options"]["lookahead"].effects[0]
    roles = pack.module("nodes.conditioning.rows")
    rows = roles.CondBatch((True, False), {}, (16, 16), range(16))
    layout = roles.RowLayout(torch.zeros(32, 4, 16, 16), {"cond_or_uncond": [0, 1]}, rows)
    term = patch.PromptRows(prompt, layout)
    kept = [v for v in vars(term).values() if isinstance(v, torch.Tensor)]
    assert sum(t.numel() * t.element_size() for t in kept) == 32 * 8
    assert torch.equal(term.keys_values()[:16], prompt.keys_values.expand(16, -1, -1))
    assert torch.equal(term.keys_values()[16:], prompt.null_keys_values.expand(16, -1, -1))


@pytest.mark.contract
def test_a_compiled_model_follows_the_weight_and_says_what_it_cannot_follow(tiny, tools, draw, caplog):
    """TorchCompileModel drops dynamo's guards on all that the image prompt travels in; tensors are read anew."""
    from comfy.ldm.modules.attention import attention_pytorch
    from comfy_api.torch_helpers import set_torch_compile_wrapper
    from comfy_extras.nodes_torch_compile import skip_torch_compile_dict

    def pytorch(attention, *args, **kwargs):  # the host's own for CPUs cannot be compiled in one piece
        return attention_pytorch(*args, **kwargs)

    def drawn(model, weight):
        model = tools.apply(model, reference, weight=weight)
        model.model_options["transformer_options"]["optimized_attention_override"] = pytorch
        return draw(model)

    few = dataclasses.replace(tiny, depth=[0, 0, 1], middle=1)  # tracing takes long for each block
    few.model, few.encoder = tools.make_model(few), make_encoder(few, widths_of(few), VISION["hidden_size"])
    reference = tools.reference(few, tools.picture(1))
    torch._dynamo.reset()
    compiled = few.model.clone()
    set_torch_compile_wrapper(compiled, backend="eager", options={"guard_filter_fn": skip_torch_compile_dict})
    for weight in (1.0, 0.3):
        expected = drawn(few.model, weight)
        with caplog.at_level("WARNING"):
            caplog.clear()
            assert torch.allclose(drawn(compiled, weight), expected, atol=1e-5 * float(expected.abs().max()))
        assert len([r for r in caplog.records if "in a compiled model" in r.getMessage()]) == 1


def test_blocks_that_the_host_has_captured_are_said_since_patches_go_past_them(
    tiny, tools, reference, draw, caplog, monkeypatch
):
    """Hosts from 0.33 on keep the blocks whose CUDA graphs they replay in a set."""
    model_prefetch = pytest.importorskip("comfy.model_prefetch", reason="this host knows no such module")

    def said(model):
        with caplog.at_level("WARNING"):
            caplog.clear()
            draw(model)
        return [r.getMessage() for r in caplog.records if "--disable-cuda-graphs" in r.getMessage()]

    drawing = tools.apply(tiny.model, reference)
    monkeypatch.setattr(model_prefetch, "GRAPH_MODULES", {torch.nn.Linear(1, 1)}, raising=False)
    assert not said(drawing)  # those of another model
    block = tiny.model.model.diffusion_model.middle_block[1].transformer_blocks[0]
    monkeypatch.setattr(model_prefetch, "GRAPH_MODULES", {block})
    assert len(said(drawing)) == 1
    assert not said(tiny.model)


def test_attention_asks_the_device_for_nothing(tiny, tools, reference, draw, pack, monkeypatch):
    """No value of a tensor is read on the host inside a pass of the UNet."""
    patch = pack.module("nodes.conditioning.cross_attention")
    attend = patch.PromptRows.attend

    def guarded(self, *args):
        with monkeypatch.context() as m:
            for name in ("item", "cpu", "tolist", "__float__", "__bool__", "__int__", "numpy"):
                m.setattr(torch.Tensor, name, lambda *a, **k: pytest.fail("read a tensor's value inside attention"))
            return attend(self, *args)

    monkeypatch.setattr(patch.PromptRows, "attend", guarded)
    draw(tools.apply(tiny.model, reference, mask=half_masks()[0]))
