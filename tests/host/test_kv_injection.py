"""Apply Lookahead KV Injection: what every row of every pass reads, masks, invariants, and what is refused."""

import inspect

import pytest
import torch
from tensors import close, randn

LATENT = (1, 4, 8, 8)
POSITIVE, NEGATIVE, OTHER = 1, 2, 3
FACE, ZEROS = ("face 0",), ("zeros 0",)
EXPECTED = {("positive", 0, FACE), ("negative", 0, ZEROS)}


@pytest.fixture
def flow(tiny, tools):
    """The tiny model switched to flow matching by the host's node."""
    return tools.host_node("nodes_model_advanced", "ModelSamplingSD3", tiny.model, 3.0)


@pytest.fixture
def texts(tiny):
    return {"positive": tiny.text(POSITIVE), "negative": tiny.text(NEGATIVE), "other": tiny.text(OTHER)}


@pytest.fixture
def reference(tiny, tools):
    """Without training: exported are the base's own projections, which `watch` sees."""
    return tools.kv_reference(tiny, tools.picture(1))


@pytest.fixture
def watch(tiny, tools, texts):
    with tools.watch(tiny, **texts) as watch:
        yield watch


@pytest.fixture
def draw(tiny, tools, texts):
    """draw(model) -> denoised predictions in one model call of the host's guider, with the run's own noise."""

    def predict(model, positive=None, cfg=3.0, x=None, guider=None, sigma=5.0, seed=1):
        import comfy.samplers

        positive, found = positive or texts["positive"], []
        guider = guider or tools.guider(model, positive, texts["negative"], cfg)
        x = randn(*LATENT, seed=9) if x is None else x

        def once(model_k, noise, sigmas, extra_args=None, callback=None, disable=None):
            found.append(model_k(x * sigma, sigmas[:1].expand(x.shape[0]), **extra_args))
            return noise

        sigmas = torch.tensor([sigma, 0.0])
        guider.sample(x, torch.zeros_like(x), comfy.samplers.KSAMPLER(once), sigmas, disable_pbar=True, seed=seed)
        return found[0]

    return predict


# -- which row reads what


def test_conditional_rows_read_the_reference_under_its_prompt_and_the_others_under_zeros(
    tiny, tools, reference, watch, draw
):
    draw(watch.model(tools.inject(tiny.model, reference)))
    assert len(watch.rows) == 2 and set(watch.rows) == EXPECTED
    (one,) = watch.references
    assert sorted(one.names) == ["face", "zeros"]


@pytest.mark.usefixtures("split_batches")
@pytest.mark.contract
def test_batches_split_by_memory(tiny, tools, reference, watch, draw):
    draw(watch.model(tools.inject(tiny.model, reference)))
    assert [len(one.rows) for one in watch.passes] == [1, 1] and set(watch.rows) == EXPECTED
    assert [len(one.names) for one in watch.references] == [1, 1]


def test_at_cfg_1_only_the_conditional_half_of_the_reference_pass_is_made(tiny, tools, reference, watch, draw):
    draw(watch.model(tools.inject(tiny.model, reference)), cfg=1.0)
    assert watch.rows == [("positive", 0, FACE)]
    assert [one.names for one in watch.references] == [["face"]]


@pytest.mark.parametrize("pictures", [2, 5])
def test_each_picture_of_a_batch_reads_the_reference_under_its_own_noise(tiny, tools, reference, watch, draw, pictures):
    draw(watch.model(tools.inject(tiny.model, reference)), x=randn(pictures, *LATENT[1:], seed=9))
    expected = {(text, n, (f"{kind} {n}",)) for n in range(pictures) for text, kind in roles()}
    assert len(watch.rows) == 2 * pictures and set(watch.rows) == expected


def roles():
    return ("positive", "face"), ("negative", "zeros")


@pytest.mark.parametrize("noise", ["shared", "fixed"])
def test_the_reference_is_noised_to_the_level_of_the_picture(tiny, tools, reference, watch, draw, noise):
    """With the noise of each picture, or with one for all."""
    x, sigma = randn(3, *LATENT[1:], seed=9), 5.0
    draw(watch.model(tools.inject(tiny.model, reference, noise=noise, noise_seed=6)), x=x)
    (one,) = watch.references
    own = x if noise == "shared" else randn(*LATENT, seed=6)
    scaled = tiny.model.model.latent_format.scale_factor * reference.subjects[0].latents
    expected = (scaled + sigma * own) / (sigma**2 + 1) ** 0.5
    for name in ("face", "zeros"):
        rows = one.x[[n for n, own_name in enumerate(one.names) if own_name == name]]
        assert rows.shape == expected.shape and close(rows, expected)
    if noise == "fixed":
        assert {row[2] for row in watch.rows} == {FACE, ZEROS} and len(watch.rows) == 6


def test_the_reference_is_noised_by_the_rule_of_the_model(tiny, tools, reference, watch, draw, flow):
    """Of a model that was switched to flow matching: (1 - sigma) z + sigma e, which the UNet reads as it is."""
    x, sigma = randn(2, *LATENT[1:], seed=9), 0.6
    draw(watch.model(tools.inject(flow, reference)), x=x, sigma=sigma)
    scaled = tiny.model.model.latent_format.scale_factor * reference.subjects[0].latents
    rows = watch.references[0].x[[n for n, name in enumerate(watch.references[0].names) if name == "face"]]
    assert close(rows, (1 - sigma) * scaled + sigma * x)


def test_the_reference_has_its_own_sizes_and_pooled_text(tiny, tools, reference, draw, texts, monkeypatch):
    """As in training: width and height are the reference's own, and zeros have a pooled text of zeros."""
    base, seen = tiny.model.model, []
    encode_adm = base.encode_adm

    def watched(**kwargs):
        seen.append((kwargs.get("width"), kwargs.get("height"), kwargs["pooled_output"]))
        return encode_adm(**kwargs)

    monkeypatch.setattr(base, "encode_adm", watched)
    draw(tools.inject(tiny.model, reference), x=randn(1, 4, 8, 12, seed=9))
    of_reference = [s for s in seen if s[:2] == (64, 64)]
    assert len(of_reference) == 2 and len(seen) == 4
    assert {s[:2] for s in seen} == {(64, 64), (96, 64)}
    prompt = reference.subjects[0].kv_prompt[0][1]["pooled_output"]
    assert sorted(bool(s[2].any()) for s in of_reference) == [False, True]
    assert any(torch.equal(s[2].cpu(), prompt) for s in of_reference)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.contract
def test_dual_cfg(tiny, tools, reference, watch, draw, texts, nested):
    from comfy_extras.nodes_custom_sampler import Guider_DualCFG

    guider = Guider_DualCFG(watch.model(tools.inject(tiny.model, reference)))
    guider.set_conds(texts["positive"], texts["other"], texts["negative"])
    guider.set_cfg(3.0, 2.0, nested=nested)
    draw(None, guider=guider)
    assert len(watch.rows) == 3 and set(watch.rows) == EXPECTED | {("other", 0, FACE)}


@pytest.mark.contract
def test_perp_neg_has_two_unconditional_lists(tiny, tools, reference, watch, draw, texts):
    from comfy_extras.nodes_perpneg import Guider_PerpNeg

    guider = Guider_PerpNeg(watch.model(tools.inject(tiny.model, reference)))
    guider.set_conds(texts["positive"], texts["negative"], texts["other"])
    guider.set_cfg(3.0, 1.0)
    draw(None, guider=guider)
    assert len(watch.rows) == 3 and set(watch.rows) == EXPECTED | {("other", 0, ZEROS)}


@pytest.mark.parametrize("which", ["cond", "uncond"])
@pytest.mark.contract
def test_nodes_that_evaluate_one_list_alone_after_the_guider(tiny, tools, reference, watch, draw, which):
    import comfy.samplers

    def after(args):
        watch.passes.clear()
        options = args["model_options"]
        comfy.samplers.calc_cond_batch(args["model"], [args[which]], args["input"], args["sigma"], options)
        return args["denoised"]

    model = watch.model(tools.inject(tiny.model, reference))
    model.set_model_sampler_post_cfg_function(after)
    draw(model)
    assert watch.rows == [("positive", 0, FACE) if which == "cond" else ("negative", 0, ZEROS)]
    assert len(watch.references) == 1  # the same noise level: nothing is evaluated again


@pytest.mark.contract
def test_areas_and_masks_of_conditions(tiny, tools, reference, watch, draw, texts):
    (text, options), other = texts["positive"][0], texts["other"][0]
    mask = torch.zeros(1, 64, 64)
    mask[:, 16:48, 16:48] = 1
    positive = [
        [text, {**options, "area": (8, 4, 0, 0)}],
        [other[0], {**other[1], "mask": mask, "mask_strength": 1.0, "set_area_to_bounds": True}],
    ]
    draw(watch.model(tools.inject(tiny.model, reference)), positive)
    assert {row for row in watch.rows if row[0] != "negative"} == {("positive", 0, FACE), ("other", 0, FACE)}
    assert {row[2] for row in watch.rows if row[0] == "negative"} == {ZEROS}


@pytest.mark.parametrize("several", ["together", "average", "one per picture"])
@pytest.mark.parametrize("noise", ["shared", "fixed"])
def test_several_pictures_of_a_reference(tiny, tools, watch, draw, several, noise):
    """Together (and on average, which keys and values have none of) every image reads all; else each its own."""
    reference = tools.kv_reference(tiny, tools.picture(4, n=2), several=several)
    x = randn(3, *LATENT[1:], seed=9)
    draw(watch.model(tools.inject(tiny.model, reference, noise=noise)), x=x, cfg=1.0)
    (one,) = watch.references
    scaled = tiny.model.model.latent_format.scale_factor * reference.subjects[0].latents
    noises = x if noise == "shared" else randn(*LATENT, seed=0).expand(3, -1, -1, -1)

    def row(image, picture):
        expected = (scaled[picture] + 5.0 * noises[image]) / 26**0.5
        return next(f"face {n}" for n, given in enumerate(one.x) if close(given, expected))

    read = (lambda n: [n % 2]) if several == "one per picture" else (lambda n: [0, 1])
    assert watch.rows == [("positive", n, tuple(row(n, picture) for picture in read(n))) for n in range(3)]


def test_two_nodes_in_series_are_read_under_one_softmax(tiny, tools, texts, watch, draw):
    first, second = (tools.kv_reference(tiny, tools.picture(seed)) for seed in (1, 2))
    both = tools.kv_reference(tiny, torch.cat([tools.picture(1), tools.picture(2)]))
    x = randn(2, *LATENT[1:], seed=9)

    def series(a, b):
        return tools.inject(tools.inject(tiny.model, a), b)

    together = draw(tools.inject(tiny.model, both), x=x)
    assert close(draw(series(first, second), x=x), together)
    assert close(draw(series(second, first), x=x), together)
    assert not close(draw(tools.inject(tiny.model, first), x=x), together, 1e-3)


def test_the_order_of_nodes_does_not_matter(tiny, tools, draw):
    reference = tools.kv_reference(tiny, tools.picture(1), encoder=tools.kv_encoder(tiny))
    before = draw(tools.apply(tools.inject(tiny.model, reference), reference))
    after = draw(tools.inject(tools.apply(tiny.model, reference), reference))
    assert torch.equal(before, after)
    for alone in (tools.apply(tiny.model, reference), tools.inject(tiny.model, reference)):
        assert not close(before, draw(alone), 1e-3)


# -- invariants (method.md, D3)


def test_all_low_rank_weights_zero_are_no_training_at_all(tiny, tools, pack, draw):
    """Exported are then the base's own projections."""
    weights = tools.kv_weights(tiny)
    zero = {k: torch.zeros_like(v) if "lora_B" in k else v for k, v in weights.items()}
    own = {"format": "lcm-lookahead-encoder", "format_version": "1"}

    def drawn(kv):
        encoder = tools.encoder(tiny.encoder | kv, own) if kv is not None else None
        return draw(tools.inject(tiny.model, tools.kv_reference(tiny, tools.picture(1), encoder=encoder)))

    untrained = drawn(None)
    assert torch.equal(drawn(zero), untrained)
    assert not close(drawn(weights), untrained, 1e-3)


def test_what_the_last_block_puts_out_reaches_no_exported_keys_and_values(tiny, tools, watch, draw):
    """The pass ends there, in the attention that exports last."""
    from comfy.ldm.modules.attention import BasicTransformerBlock

    projected, ended = [], []
    blocks = [m for m in watch.unet.modules() if isinstance(m, BasicTransformerBlock)]
    hooks = [block.attn1.to_k.register_forward_hook(lambda *_: projected.append(1)) for block in blocks]
    hooks += [block.register_forward_hook(lambda *_: ended.append(1)) for block in blocks]
    for encoder in (None, tools.kv_encoder(tiny)):
        model = tools.inject(tiny.model, tools.kv_reference(tiny, tools.picture(1), encoder=encoder))
        # Without the picture's own pass.
        model.add_wrapper_with_key("apply_model", "test", lambda executor, x, *args, **kwargs: torch.zeros_like(x))
        projected.clear(), ended.clear()
        draw(model)
        # The last projects, and does not end; and the inputs that the pass gave are projected after it.
        assert len(projected) == 2 * 17 and len(ended) == 16
    for hook in hooks:
        hook.remove()


def test_a_picture_mask_of_zeros_and_weight_0_are_the_plain_model(tiny, tools, reference, draw):
    plain = draw(tiny.model)
    assert torch.equal(draw(tools.inject(tiny.model, reference, mask=torch.zeros(1, 64, 64))), plain)
    assert "lookahead" not in tools.inject(tiny.model, reference, weight=0.0).model_options["transformer_options"]


def test_rows_of_a_batch_outside_of_the_mask_are_plain(tiny, tools, reference, draw):
    x = randn(2, *LATENT[1:], seed=9)
    masks = torch.stack([torch.ones(64, 64), torch.zeros(64, 64)])
    out = draw(tools.inject(tiny.model, reference, mask=masks), x=x)
    plain, full = draw(tiny.model, x=x), draw(tools.inject(tiny.model, reference), x=x)
    assert close(out[0], full[0]) and torch.equal(out[1], plain[1])
    assert not close(full[1], plain[1], 1e-3)


# -- masks, weight, blocks


def test_a_mask_of_ones_is_no_mask(tiny, tools, reference, draw):
    full = draw(tools.inject(tiny.model, reference))
    assert close(draw(tools.inject(tiny.model, reference, mask=torch.ones(1, 32, 32))), full)


def test_weight_and_mask_blend_the_plain_and_the_extended_output(tiny, tools, pack, reference, draw, monkeypatch):
    """Half weight, and a mask of one half, are half the way in every attention."""
    half = draw(tools.inject(tiny.model, reference, weight=0.5))
    assert close(draw(tools.inject(tiny.model, reference, mask=torch.full((1, 16, 16), 0.5))), half)
    plain, full = draw(tiny.model), draw(tools.inject(tiny.model, reference))
    assert not close(half, plain, 1e-3) and not close(half, full, 1e-3)

    patch = pack.module("nodes.conditioning.self_attention")
    self_attention, seen = patch.self_attention, []

    def checked(key, references, once):
        replacement = self_attention(key, references, once)

        def compare(q, k, v, extra):
            out = replacement(q, k, v, extra)
            attention = patch.host_attention(extra)
            k_ext, v_ext = (torch.stack(t) for t in zip(*references[0].tokens(key, k), strict=True))
            plain = attention(q, k, v, extra["n_heads"])
            extended = attention(q, torch.cat([k, k_ext], 1), torch.cat([v, v_ext], 1), extra["n_heads"])
            assert close(out, plain + 0.5 * (extended - plain))
            seen.append(key)
            return out

        return compare

    monkeypatch.setattr(patch, "self_attention", checked)
    draw(tools.inject(tiny.model, reference, weight=0.5))
    assert len(seen) == len(set(seen)) == 17


def test_the_mask_holds_on_the_tokens_of_its_part_alone(tiny, tools, pack, reference, draw, monkeypatch):
    patch = pack.module("nodes.conditioning.self_attention")
    self_attention, grids = patch.self_attention, set()

    def checked(key, references, once):
        replacement = self_attention(key, references, once)

        def compare(q, k, v, extra):
            height, width = extra["activations_shape"][-2:]
            change = replacement(q, k, v, extra) - patch.host_attention(extra)(q, k, v, extra["n_heads"])
            change = change.unflatten(1, (height, width)).abs()
            assert change[:, :, width // 2 :].max() == 0 and change[:, :, : width // 2].amax(-1).min() > 0
            grids.add((height, width))
            return replacement(q, k, v, extra)

        return compare

    monkeypatch.setattr(patch, "self_attention", checked)
    left = torch.zeros(1, 64, 64)
    left[..., :32] = 1
    draw(tools.inject(tiny.model, reference, mask=left))
    assert grids == {(4, 4), (2, 2)}


def test_an_area_sees_its_own_part_of_the_picture_mask(tiny, tools, reference, draw, texts):
    left, right = torch.zeros(1, 64, 64), torch.zeros(1, 64, 64)
    left[..., :32], right[..., 32:] = 1, 1
    text, options = texts["positive"][0]
    on_the_right = [[text, {**options, "area": (8, 4, 0, 4)}]]
    plain, full = (draw(m, on_the_right, cfg=1.0) for m in (tiny.model, tools.inject(tiny.model, reference)))
    assert close(draw(tools.inject(tiny.model, reference, mask=right), on_the_right, cfg=1.0), full)
    assert torch.equal(draw(tools.inject(tiny.model, reference, mask=left), on_the_right, cfg=1.0), plain)
    assert not close(full, plain, 1e-3)


def test_a_mask_on_the_reference_leaves_only_the_tokens_under_it(tiny, tools, watch, draw):
    left = torch.zeros(1, 96, 96)
    left[..., :48] = 1
    lengths = {}

    def override(attention, q, k, v, *args, **kwargs):
        if k.shape[1] != 77:
            options = kwargs["transformer_options"]
            lengths.setdefault(options["block"][0], set()).add((q.shape[1], k.shape[1]))
        return attention(q, k, v, *args, **kwargs)

    def drawn(**mask):
        lengths.clear()
        model = tools.inject(tiny.model, tools.kv_reference(tiny, tools.picture(1), **mask))
        model.model_options["transformer_options"]["optimized_attention_override"] = override
        return draw(model)

    whole = drawn()
    assert lengths == {"input": {(16, 32), (4, 8)}, "middle": {(4, 8)}, "output": {(16, 32), (4, 8)}}
    part = drawn(mask=left)
    assert lengths == {"input": {(16, 24), (4, 6)}, "middle": {(4, 6)}, "output": {(16, 24), (4, 6)}}
    assert not close(part, whole, 1e-3)
    assert torch.equal(drawn(mask=torch.ones(1, 96, 96)), whole)
    spot = torch.zeros(1, 96, 96)
    spot[:, 20:24, 20:24] = 1  # smaller than any token: the one that it covers most
    drawn(mask=spot)
    assert lengths["middle"] == {(4, 5)} and (16, 17) in lengths["input"]


def test_reference_masks_of_different_sizes_go_with_their_pictures(tiny, tools, draw):
    """One per picture: rows of one batch have different numbers of tokens, and each image draws as by itself."""
    images, masks = tools.picture(4, n=2), torch.ones(2, 96, 96)
    masks[1, :, 48:] = 0
    x = randn(2, *LATENT[1:], seed=9)
    both = draw(tools.inject(tiny.model, tools.kv_reference(tiny, images, several="one per picture", mask=masks)), x=x)
    for n in range(2):
        alone = tools.kv_reference(tiny, images[n : n + 1], mask=masks[n : n + 1])
        assert close(both[n : n + 1], draw(tools.inject(tiny.model, alone), x=x[n : n + 1]), 1e-4)


def test_a_reference_mask_that_the_crop_leaves_nothing_of_is_refused(tiny, tools):
    image, mask = tools.picture(1, height=64, width=128), torch.zeros(1, 64, 128)
    mask[..., :16] = 1  # the centre square does not see it
    with pytest.raises(ValueError) as error:
        tools.kv_reference(tiny, image, mask=mask)
    assert "mask" in tools.one_sentence(error)


@pytest.mark.parametrize(
    ("blocks", "where"),
    [
        ("all", {"input": 6, "middle": 2, "output": 9}),
        ("coarse", {"input": 4, "middle": 2, "output": 6}),
        ("fine", {"input": 2, "output": 3}),
        ("up", {"output": 9}),
        ("middle and up", {"middle": 2, "output": 9}),
    ],
)
@pytest.mark.contract
def test_the_chosen_blocks_read_the_reference(tiny, tools, reference, draw, blocks, where):
    found = {}

    def override(attention, q, k, v, *args, **kwargs):
        if k.shape[1] == 2 * q.shape[1]:
            group = kwargs["transformer_options"]["block"][0]
            found[group] = found.get(group, 0) + 1
        return attention(q, k, v, *args, **kwargs)

    model = tools.inject(tiny.model, reference, blocks=blocks)
    model.model_options["transformer_options"]["optimized_attention_override"] = override
    draw(model)
    assert found == where


def test_an_empty_mask_is_logged(tiny, tools, reference, caplog):
    with caplog.at_level("WARNING"):
        tools.inject(tiny.model, reference, mask=torch.ones(1, 64, 64))
        assert "LCM-Lookahead" not in caplog.text
        tools.inject(tiny.model, reference, mask=torch.zeros(1, 64, 64))
    assert caplog.text.count("LCM-Lookahead") == 1 and "mask" in caplog.text


def test_attention_asks_the_device_for_nothing(tiny, tools, pack, draw, monkeypatch):
    """No value of a tensor is read on the host inside an attention, of the picture or of the reference."""
    guarded_calls = []

    def guarded(module, name):
        make = getattr(module, name)

        def maker(*args):
            replacement = make(*args)

            def inside(*args):
                guarded_calls.append(name)
                with monkeypatch.context() as m:
                    for value in ("item", "cpu", "tolist", "__float__", "__bool__", "__int__", "numpy", "nonzero"):
                        m.setattr(torch.Tensor, value, lambda *a, **k: pytest.fail("a tensor's value inside attention"))
                    return replacement(*args)

            return inside

        monkeypatch.setattr(module, name, maker)

    guarded(pack.module("nodes.conditioning.self_attention"), "self_attention")
    export = pack.module("nodes.conditioning.reference_pass")._Export
    for name in ("_self_attention", "_cross_attention"):
        guarded(export, name)
    mask = torch.ones(1, 64, 64)
    mask[..., 32:] = 0
    reference = tools.kv_reference(tiny, tools.picture(1), encoder=tools.kv_encoder(tiny), mask=torch.ones(1, 96, 96))
    draw(tools.inject(tiny.model, reference, mask=mask))
    assert set(guarded_calls) == {"self_attention", "_self_attention", "_cross_attention"}


# -- what is refused


def refused(tools, *args, **options) -> str:
    with pytest.raises(ValueError) as error:
        tools.inject(*args, **options)
    return tools.one_sentence(error)


def test_a_reference_without_a_vae_or_a_prompt_is_refused(tiny, tools):
    encoder = tools.encoder(tiny.encoder)
    assert "vae" in refused(tools, tiny.model, tools.kv_reference(tiny, tools.picture(1), encoder=encoder, vae=None))
    without_prompt = tools.kv_reference(tiny, tools.picture(1), conditioning=None)
    for weight in (1.0, 0.0):
        assert "clip" in refused(tools, tiny.model, without_prompt, weight=weight)


@pytest.mark.contract
def test_a_vae_of_another_family_is_refused(tiny, tools):
    class Wide:
        def encode(self, pixels):
            return torch.zeros(len(pixels), 16, 8, 8)

    assert "16" in refused(tools, tiny.model, tools.kv_reference(tiny, tools.picture(1), vae=Wide()))


def test_a_prompt_of_another_family_is_refused(tiny, tools):
    narrow = [[torch.zeros(1, 77, 24), {"pooled_output": torch.zeros(1, tiny.pooled)}]]
    assert "24" in refused(tools, tiny.model, tools.kv_reference(tiny, tools.picture(1), conditioning=narrow))
    without_pooled = [[tiny.text(1)[0][0], {}]]
    refused(tools, tiny.model, tools.kv_reference(tiny, tools.picture(1), conditioning=without_pooled))


def test_a_kv_encoder_of_another_base_is_refused(worlds, tiny, tools):
    sdxl = worlds("sdxl")
    for world, other in ((tiny, sdxl), (sdxl, tiny)):
        text = tiny.text(7) if world is tiny else sdxl.text(7)
        reference = tools.kv_reference(other, tools.picture(1), encoder=tools.kv_encoder(other), conditioning=text)
        assert "another base model" in refused(tools, world.model, reference)


def test_a_kv_encoder_for_fewer_blocks_is_refused(tiny, tools):
    """All of its blocks are there and of the right width, but the model has more."""
    import dataclasses

    smaller = dataclasses.replace(tiny, middle=0)
    smaller.encoder = {k: v for k, v in tiny.encoder.items() if not k.startswith(("ip_adapter.31.", "ip_adapter.33."))}
    reference = tools.kv_reference(tiny, tools.picture(1), encoder=tools.kv_encoder(smaller))
    assert "another base model" in refused(tools, tiny.model, reference)


@pytest.mark.contract
def test_models_that_are_not_sdxl_are_refused(tiny, tools, reference):
    import comfy.model_base
    import comfy.model_patcher
    import comfy.supported_models

    config = {k: v for k, v in tiny.unet_config.items() if k not in ("num_classes", "adm_in_channels")}
    base = comfy.model_base.BaseModel(comfy.supported_models.SD15(config), device="cpu")
    cpu = torch.device("cpu")
    patcher = comfy.model_patcher.ModelPatcher(base, load_device=cpu, offload_device=cpu)
    assert "SDXL" in refused(tools, patcher, reference)


def test_a_start_after_the_end_is_refused(tiny, tools, reference):
    assert "0.8" in refused(tools, tiny.model, reference, start=0.8, end=0.2)


def test_a_new_node_ends_where_the_figures_are_best_and_an_old_api_graph_where_it_did(pack):
    node = pack.nodes["LookaheadApplyKVInjection"]
    (end,) = [asked for asked in node.define_schema().inputs if asked.id == "end"]
    assert end.default == 0.4 and inspect.signature(node.execute).parameters["end"].default == 1.0
