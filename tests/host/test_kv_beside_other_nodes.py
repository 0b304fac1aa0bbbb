"""KV injection beside nodes that patch the same self-attentions or act after the guidance, before and after ours."""

import pytest
import torch
from other_packs import in_one_batch, in_tiles, row_by_row
from tensors import close

pytestmark = pytest.mark.contract

BLOCKS = 17  # self-attentions of a tiny UNet, two of them in its middle


@pytest.fixture
def reference(tiny, tools):
    return tools.kv_reference(tiny, tools.picture(1), size=128)


@pytest.fixture
def ours(reference, tools):
    """ours(model, ...) -> with KV injection."""
    return lambda model, **options: tools.inject(model, reference, **options)


@pytest.fixture
def draw(texts, tools):
    """draw(model) -> a picture of two steps of the host's guider, or of ours."""

    def run(model, guided=False, latent=(1, 4, 16, 16)):
        guider = tools.three_scales(model, *texts) if guided else None
        return tools.sample(model, *texts, torch.zeros(latent), steps=2, guider=guider)

    return run


@pytest.fixture
def extended(texts):
    """extended(model) -> the model with a list of the self-attentions that read a reference, as they run."""

    def watch(model):
        found = []

        def override(attention, q, k, v, *args, **kwargs):
            options = kwargs.get("transformer_options") or {}
            if k.shape[1] != 77 and k.shape[1] == 2 * q.shape[1]:
                found.append((*options["block"], options["block_index"]))
            return attention(q, k, v, *args, **kwargs)

        model = model.clone()
        model.model_options["transformer_options"]["optimized_attention_override"] = override
        return model, found

    return watch


def logged(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if "LCM-Lookahead" in r.getMessage()]


@pytest.fixture(scope="module")
def drawn_by_ours_alone():
    """By `guided`, what stands beside each other node: it depends on none, and is drawn once."""
    return {}


@pytest.fixture
def both_orders(tiny, ours, draw, drawn_by_ours_alone, caplog):
    """both_orders(other) -> the picture with another node, which is the same before and after ours, and what was
    logged in a run."""

    def run(other, guided=False):
        drawn, said = [], []
        for model in (ours(other(tiny.model)), other(ours(tiny.model))):
            with caplog.at_level("WARNING"):
                caplog.clear()
                drawn.append(draw(model, guided))
            said.append(logged(caplog))
        assert torch.equal(*drawn) and said[0] == said[1]
        if guided not in drawn_by_ours_alone:
            drawn_by_ours_alone[guided] = draw(ours(tiny.model), guided)
        for alone in (drawn_by_ours_alone[guided], draw(other(tiny.model), guided)):
            assert not close(drawn[0], alone, 1e-3)
        return drawn[0], said[0]

    return run


# -- nodes of the host


@pytest.mark.parametrize("guided", [False, True])
def test_perturbed_attention_guidance_has_its_blocks_without_the_reference(tiny, both_orders, tools, guided):
    """Only while it evaluates; its node replaces the middle as a whole (a pair key)."""
    _, said = both_orders(lambda m: tools.host_node("nodes_pag", "PerturbedAttentionGuidance", m, 3.0), guided)
    assert len(said) == 1 and f"another node replaces 2 of {BLOCKS} self-attentions" in said[0]


@pytest.mark.parametrize("guided", [False, True])
def test_self_attention_guidance_has_its_block_without_the_reference(tiny, both_orders, tools, guided):
    """In every pass (a triple key)."""
    _, said = both_orders(lambda m: tools.host_node("nodes_sag", "SelfAttentionGuidance", m, 0.5, 2.0), guided)
    assert len(said) == 1 and f"another node replaces 1 of {BLOCKS} self-attentions" in said[0]


def test_all_other_blocks_read_the_reference_beside_these(tiny, ours, draw, tools, extended):
    model, found = extended(tools.host_node("nodes_pag", "PerturbedAttentionGuidance", ours(tiny.model), 3.0))
    draw(model)
    assert len(found) == 2 * (BLOCKS + BLOCKS - 2) and len(set(found)) == BLOCKS  # two steps of two evaluations
    model, found = extended(tools.host_node("nodes_sag", "SelfAttentionGuidance", ours(tiny.model), 0.5, 2.0))
    draw(model)
    assert len(found) == 2 * 2 * (BLOCKS - 1) and ("middle", 0, 0) not in found and ("middle", 0, 1) in found


def test_blocks_that_hypertile_cuts_run_without_the_reference(tiny, ours, both_orders, tools, draw, extended):
    """It cuts the queries alone: their batch is no longer that of keys and values."""

    def cut(model):
        return tools.host_node("nodes_hypertile", "HyperTile", model, 32, 1, 1, False)

    _, said = both_orders(cut)
    assert len(said) == 1 and "reshapes the tokens of some self-attentions" in said[0]
    model, found = extended(cut(ours(tiny.model)))
    draw(model)
    assert len(found) == 2 * (BLOCKS - 5) and not any(key[:2] in (("input", 4), ("output", 3)) for key in found)


def test_free_u(tiny, both_orders, tools, ours, draw, extended):
    """It changes the picture's decoder half, and takes no attention."""
    _, said = both_orders(lambda m: tools.host_node("nodes_freelunch", "FreeU", m, 1.1, 1.2, 0.9, 0.2))
    assert said == []
    model, found = extended(tools.host_node("nodes_freelunch", "FreeU", ours(tiny.model), 1.1, 1.2, 0.9, 0.2))
    draw(model)
    assert len(found) == 2 * BLOCKS


# -- nodes of other packs


def foreign(calls, key):
    """Another pack's replacement of a self-attention: the plain attention at half strength."""

    def replacement(q, k, v, extra):
        from comfy.ldm.modules.attention import optimized_attention

        calls.append((*extra["block"], extra["block_index"], k.shape[1] == q.shape[1]))
        return optimized_attention(q, k, v, extra["n_heads"]) * 0.5

    def other(model):
        model = model.clone()
        extra = {"transformer_index": 1} if key == "triple" else {}
        model.set_model_attn1_replace(replacement, "input", 7, **extra)
        return model

    return other


@pytest.mark.parametrize("key", ["triple", "pair"])
def test_a_replacement_of_another_node_keeps_its_block(tiny, ours, both_orders, draw, extended, key):
    calls = []
    other = foreign(calls, key)
    _, said = both_orders(other)
    taken = {("input", 7, 1)} if key == "triple" else {("input", 7, 0), ("input", 7, 1)}
    assert len(said) == 1 and f"replaces {len(taken)} of {BLOCKS}" in said[0]
    assert {call[:3] for call in calls} == taken and all(call[3] for call in calls)  # called as without us
    model, found = extended(other(ours(tiny.model)))
    draw(model)
    assert len(set(found)) == BLOCKS - len(taken) and not taken & set(found)
    # Nothing of ours stands where other packs' code would touch it.
    assert "patches_replace" not in ours(tiny.model).model_options["transformer_options"]


def test_a_replacement_of_a_block_that_does_not_take_part_is_not_mentioned(tiny, ours, draw, caplog):
    with caplog.at_level("WARNING"):
        draw(foreign([], "pair")(ours(tiny.model, blocks="up")))
    assert logged(caplog) == []


def test_what_is_logged_is_logged_once_in_each_run(tiny, ours, draw, caplog):
    model = ours(foreign([], "triple")(tiny.model))
    with caplog.at_level("WARNING"):
        draw(model)
        draw(model)
    assert len(logged(caplog)) == 2


def wrapped(model, wrapper):
    model = model.clone()
    model.set_model_unet_function_wrapper(wrapper)
    return model


@pytest.mark.parametrize(("wrapper", "masked"), [(row_by_row, False), (in_tiles, True), (in_one_batch, True)])
def test_a_batch_that_cannot_be_followed_runs_without_the_reference_and_is_logged_once(
    tiny, ours, draw, caplog, wrapper, masked
):
    mask = torch.ones(1, 128, 128) if masked else None
    plain = draw(wrapped(tiny.model, wrapper), latent=(2, 4, 16, 16))
    with caplog.at_level("WARNING"):
        out = draw(wrapped(ours(tiny.model, mask=mask), wrapper), latent=(2, 4, 16, 16))
    assert torch.equal(out, plain) and len(logged(caplog)) == 1


def test_tiles_in_one_batch_read_what_tiles_one_after_the_other_read(tiny, ours, draw, caplog):
    out = draw(wrapped(ours(tiny.model), in_one_batch), latent=(2, 4, 16, 16))
    assert close(out, draw(wrapped(ours(tiny.model), in_tiles), latent=(2, 4, 16, 16)), 1e-4)
    assert not close(out, draw(wrapped(tiny.model, in_tiles), latent=(2, 4, 16, 16)), 1e-3) and logged(caplog) == []


def test_rows_cut_into_tiles_read_the_whole_reference_of_their_row(tiny, ours, tools, texts, reference):
    """By a pack that cuts keys and values as well: each tile attends to itself and to the reference."""
    from comfy.ldm.modules.attention import optimized_attention

    latent, seen = (2, 4, 16, 16), []

    def cut(n, context, value, extra):
        seen.append(len(n))
        return tuple(t.unflatten(1, (2, -1)).flatten(0, 1) for t in (n, context, value))

    def joined(n, extra):
        return n.unflatten(0, (-1, 2)).flatten(1, 2)

    def expected(attention, q, k, v, heads, *args, **kwargs):
        """The same written out, where keys and values of a reference come last."""
        n = q.shape[1]
        if k.shape[1] > n and k.shape[1] != 77:
            assert k.shape[1] == n + 2 * n and torch.equal(k[0, n:], k[1, n:]) and not torch.equal(k[1, n:], k[2, n:])
            seen.append("extended")
        return optimized_attention(q, k, v, heads)

    model = ours(tiny.model).clone()
    model.set_model_attn1_patch(cut)
    model.set_model_patch(joined, "attn1_output_patch")
    model.model_options["transformer_options"]["optimized_attention_override"] = expected
    tools.sample(model, *texts, torch.zeros(latent), steps=1, cfg=1.0)
    assert seen.count("extended") == BLOCKS


def test_an_attention_override_of_another_node_sees_the_extended_keys(tiny, ours, draw, extended):
    expected = draw(ours(tiny.model))
    model, found = extended(ours(tiny.model))
    assert torch.equal(draw(model), expected) and len(found) == 2 * BLOCKS


@pytest.mark.parametrize("effects", ["image prompt", "KV injection"])
def test_windows_over_a_batch_read_the_references_and_masks_of_their_own_pictures(tiny, tools, draw, effects):
    """The host's context windows evaluate some pictures of a batch at a time, here two or three of six."""
    encoder = tools.kv_encoder(tiny) if effects == "image prompt" else None
    reference = tools.kv_reference(tiny, tools.picture(4, n=6), encoder=encoder, several="one per picture")
    apply = tools.apply if effects == "image prompt" else tools.inject
    model = apply(
        tiny.model,
        reference,
        mask=torch.stack([torch.ones(16, 16), torch.tensor([[1.0, 0.0]]).repeat(16, 8), torch.ones(16, 16)]),
    )
    windows = model, 2, 0, "standard_static", 1, False, "pyramid", 0, False
    latent = (6, 4, 8, 8)
    assert close(
        draw(tools.host_node("nodes_context_windows", "ContextWindowsManualNode", *windows), latent=latent),
        draw(model, latent=latent),
        1e-4,
    )
