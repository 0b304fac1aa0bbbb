"""Weights of a reference by layer, over the steps, by picture and by reference; AdaIN on what is read together."""

import pytest
import torch
from tensors import close

LATENT = (1, 4, 8, 8)


@pytest.fixture
def reference(tiny, tools):
    """For image prompt and KV injection."""
    return tools.kv_reference(tiny, tools.picture(1), encoder=tools.kv_encoder(tiny))


@pytest.fixture
def weights(tools):
    return lambda *args, **options: tools.run("LookaheadWeights", *args, **options)


@pytest.fixture
def draw(tiny, tools):
    """draw(model) -> denoised predictions at a noise level, of the same noise."""
    x = torch.randn(LATENT, generator=torch.Generator().manual_seed(9))
    return lambda model, sigma=5.0: tools.denoised(model, tiny.text(1), tiny.text(2), x * sigma, sigma, cfg=3.0)


def sigma_at(tiny, share):
    return tiny.model.get_model_object("model_sampling").percent_to_sigma(share)


@pytest.mark.parametrize("node", ["apply", "inject"])
@pytest.mark.contract
def test_weights_of_1_everywhere_are_none_to_the_bit(tiny, tools, reference, weights, draw, node):
    put = getattr(tools, node)
    ones = weights("list", "1 " * 11, "1, 1, 1")
    assert torch.equal(draw(put(tiny.model, reference, weights=ones)), draw(put(tiny.model, reference)))


@pytest.mark.parametrize("node", ["apply", "inject"])
def test_weights_of_0_are_the_model_without_the_node_to_the_bit(tiny, tools, reference, weights, draw, node):
    put, plain = getattr(tools, node), draw(tiny.model)
    for zeros in (weights("list", "3:0"), weights(steps="0")):
        assert torch.equal(draw(put(tiny.model, reference, weights=zeros)), plain)


LAYERS = "1, 1, -0.5, 0.25, 1, 0, 1.5, 1, 1, 1, 1"


def test_every_cross_attention_has_the_weight_of_its_layer(tiny, tools, pack, reference, weights, draw, monkeypatch):
    patch, names = pack.module("nodes.conditioning.cross_attention"), pack.module("lookahead.files.block_names")
    made, seen = patch.cross_attention, {}

    def watched(key, inner, terms, once):
        replacement = made(key, inner, terms, once)

        def compare(q, k, v, extra):
            out = replacement(q, k, v, extra)
            attention = patch.host_attention(extra)
            offset, width = terms[0].prompt.layout[key]
            ip_k, ip_v = terms[0].keys_values(slice(offset, offset + 2 * width)).chunk(2, -1)
            added = attention(q, ip_k, ip_v, extra["n_heads"])
            change = out - attention(q, k, v, extra["n_heads"])
            seen[names.diffusers_path(key).rpartition(".transformer_blocks")[0]] = (change, added)
            return out

        return compare

    monkeypatch.setattr(patch, "cross_attention", watched)
    draw(tools.apply(tiny.model, reference, weight=0.8, weights=weights("list", LAYERS)))
    expected = {
        "down_blocks.1.attentions.0": 1, "down_blocks.1.attentions.1": 1, "down_blocks.2.attentions.0": -0.5,
        "down_blocks.2.attentions.1": 0.25, "mid_block.attentions.0": 1, "up_blocks.0.attentions.1": 1.5,
        "up_blocks.0.attentions.2": 1, "up_blocks.1.attentions.0": 1, "up_blocks.1.attentions.1": 1,
        "up_blocks.1.attentions.2": 1,
    }  # fmt: skip
    assert seen.keys() == expected.keys()  # up_blocks.0.attentions.0 is at 0
    for block, factor in expected.items():
        change, added = seen[block]
        assert torch.allclose(change, 0.8 * factor * added, atol=1e-5), block


def test_every_self_attention_has_the_weight_of_its_layer(tiny, tools, pack, reference, weights, draw, monkeypatch):
    patch = pack.module("nodes.conditioning.self_attention")
    made, seen = patch.self_attention, {}

    def watched(key, references, once):
        replacement = made(key, references, once)

        def compare(q, k, v, extra):
            out, attention = replacement(q, k, v, extra), patch.host_attention(extra)
            k_ext, v_ext = (torch.stack(t) for t in zip(*references[0].tokens(key, k), strict=True))
            plain = attention(q, k, v, extra["n_heads"])
            extended = attention(q, torch.cat([k, k_ext], 1), torch.cat([v, v_ext], 1), extra["n_heads"])
            seen[key[:2]] = (out - plain, extended - plain)
            return out

        return compare

    monkeypatch.setattr(patch, "self_attention", watched)
    draw(tools.inject(tiny.model, reference, weight=0.8, weights=weights("list", LAYERS)))
    keys = [("input", 4), ("input", 5), ("input", 7), ("input", 8), ("middle", 0), *(("output", n) for n in range(6))]
    expected = dict(zip(keys, map(float, LAYERS.split(", ")), strict=True))
    assert seen.keys() == {key for key, factor in expected.items() if factor}
    for key, (change, full) in seen.items():
        assert torch.allclose(change, 0.8 * expected[key] * full, atol=1e-5), key


@pytest.mark.parametrize("node", ["apply", "inject"])
def test_the_steps_scale_the_weight_by_the_share_of_the_sampling(tiny, tools, reference, weights, draw, node):
    put = getattr(tools, node)
    for share in (0.2, 0.6):
        sigma = sigma_at(tiny, share)
        eased = draw(put(tiny.model, reference, weights=weights(steps="0, 1")), sigma)
        assert close(eased, draw(put(tiny.model, reference, weight=share), sigma), 1e-4)
    late, sigma = put(tiny.model, reference, weights=weights(steps="0 0 1")), sigma_at(tiny, 0.3)
    assert torch.equal(draw(late, sigma), draw(tiny.model, sigma))


def test_where_the_steps_are_0_no_reference_pass_is_made(tiny, tools, weights):
    texts = {"positive": tiny.text(1), "negative": tiny.text(2)}
    with tools.watch(tiny, **texts) as watch:
        model = tools.inject(tiny.model, tools.kv_reference(tiny, tools.picture(1)), weights=weights(steps="1, 0, 0"))
        tools.sample(watch.model(model), *texts.values(), torch.zeros(LATENT), steps=4)
    assert len(watch.passes) == 4 and len(watch.references) == 2  # at the shares 0, 1/4 of 0, 1/4, 1/2, 3/4


@pytest.mark.contract
def test_a_curve_of_the_host_is_read_as_its_points_are(pack, weights):
    points = [(0.0, 0.0), (0.5, 1.0), (1.0, 0.25)]
    expected = weights(curve=points).steps
    assert expected[0] == 0 and expected[128] == 1 and expected[-1] == 0.25 and len(expected) == 257
    try:
        from comfy_api.input import CurveInput
    except ImportError:
        return  # a host that hands on points
    curve = CurveInput.from_raw({"points": points, "interpolation": "linear"})
    assert torch.allclose(torch.tensor(weights(curve=curve).steps), torch.tensor(expected))
    assert weights(curve=curve, steps="0.5").steps == weights(curve=curve).steps


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"preset": "list"}, "layers is empty"),
        ({"preset": "list", "layers": "x"}, "numbers from -5 to 5"),
        ({"preset": "list", "layers": "3"}, "1 numbers, and this model has 11 layers"),
        ({"preset": "list", "layers": "40:1"}, "no layer 40"),
        ({"steps": "1, nan"}, "The steps are"),
        ({"curve": []}, "The curve has no points"),
        ({"curve": [(0.0, 9.0)]}, "The curve goes beyond"),
    ],
)
def test_weights_that_cannot_be_read_are_refused(tiny, tools, reference, weights, options, says):
    for node in (tools.apply, tools.inject):
        with pytest.raises(ValueError) as error:
            node(tiny.model, reference, weights=weights(**options))
        assert says in tools.one_sentence(error)


# -- by reference and by picture


@pytest.mark.parametrize("node", ["apply", "inject"])
def test_combined_references_act_like_nodes_in_a_row_and_a_negative_weight_subtracts(tiny, tools, draw, node):
    put, encoder = getattr(tools, node), tools.kv_encoder(tiny)
    first, second = (tools.kv_reference(tiny, tools.picture(n), encoder=encoder) for n in (1, 2))
    both = tools.run("LookaheadCombineReferences", first, second, 1.0, -0.5)
    in_a_row = put(put(tiny.model, first, weight=0.8), second, weight=-0.4)
    assert close(draw(put(tiny.model, both, weight=0.8)), draw(in_a_row), 1e-6)
    alone = tools.run("LookaheadCombineReferences", first, second, 1.0, 0.0)
    assert alone.subjects[0].cache is first.subjects[0].cache
    assert torch.equal(draw(put(tiny.model, alone)), draw(put(tiny.model, first)))
    assert tools.run("LookaheadCombineReferences", both, first, 2.0, 1.0).subjects[1].weight == -1.0
    with pytest.raises(ValueError) as error:
        tools.run("LookaheadCombineReferences", first, second, 0.0, 0.0)
    tools.one_sentence(error)


def test_pictures_act_in_the_shares_of_their_weights(tiny, tools, draw):
    encoder, pictures = tools.kv_encoder(tiny), tools.picture(4, n=2)
    one, two = (tools.kv_reference(tiny, pictures[n : n + 1], encoder=encoder) for n in range(2))

    def weighed(text, several="together"):
        return tools.kv_reference(tiny, pictures, encoder=encoder, picture_weights=text, several=several)

    for put in (tools.apply, tools.inject):
        assert close(draw(put(tiny.model, weighed("2, 0"))), draw(put(tiny.model, one)), 1e-4)
        shares = tools.run("LookaheadCombineReferences", one, two, 0.75, 0.25)
        assert close(draw(put(tiny.model, weighed("3, 1", "average"))), draw(put(tiny.model, shares)), 1e-4)
    assert [subject.weight for subject in weighed("1, -0.5").subjects] == [1.0, -0.5]
    assert len(weighed("").subjects) == 1
    for text, several in (
        ("1", "together"),
        ("1, 1, 1", "average"),
        ("0, -1", "together"),
        ("1, 1", "one per picture"),
    ):
        with pytest.raises(ValueError) as error:
            weighed(text, several)
        assert "picture_weights" in tools.one_sentence(error)


# -- AdaIN


@pytest.mark.parametrize("adain", ["picture to the reference", "reference to the picture"])
@pytest.mark.parametrize("masked", [False, True])
def test_adain_gives_one_the_statistics_of_the_other(tiny, tools, pack, draw, monkeypatch, adain, masked):
    patch = pack.module("nodes.conditioning.self_attention")
    made, seen = patch.self_attention, []

    def like(x, other):
        (s, m), (s2, m2) = (torch.std_mean(t, dim=0, correction=0) for t in (x, other))
        return (x - m) / (s + 1e-5) * s2 + m2

    def watched(key, references, once):
        replacement = made(key, references, once)

        def compare(q, k, v, extra):
            out = replacement(q, k, v, extra)
            for row, (k_ext, v_ext) in enumerate(references[0].tokens(key, k)):
                asked, own = q[row], k[row]
                if adain == "reference to the picture":
                    k_ext, v_ext = like(k_ext, k[row]), like(v_ext, v[row])
                else:
                    mean, deviation = references[0].query_statistics(key, k)[row]
                    asked = (asked - asked.mean(0)) / (asked.std(0, correction=0) + 1e-5) * deviation + mean
                    own = like(own, k_ext)
                keys, values = torch.cat([own, k_ext])[None], torch.cat([v[row], v_ext])[None]
                assert close(out[row], patch.host_attention(extra)(asked[None], keys, values, extra["n_heads"])[0])
            seen.append(key)
            return out

        return compare

    mask = torch.zeros(1, 96, 96)
    mask[..., :48] = 1
    reference = tools.kv_reference(tiny, tools.picture(1), **({"mask": mask} if masked else {}))
    monkeypatch.setattr(patch, "self_attention", watched)
    model = tools.inject(tiny.model, reference, adain=adain)
    found = draw(model)
    monkeypatch.setattr(patch, "self_attention", made)
    assert len(seen) == 17 and not close(found, draw(tools.inject(tiny.model, reference)), 1e-3)
    assert torch.equal(draw(tools.inject(tiny.model, reference, weight=0.0, adain=adain)), draw(tiny.model))


def test_the_statistics_are_those_of_the_queries_of_the_reference_pass(tiny, tools, pack, draw, monkeypatch):
    """Of all pictures of the reference together, by role; and those of two references are pooled."""
    patch = pack.module("nodes.conditioning.self_attention")
    to_q, asked, found = tiny.model.model.diffusion_model.middle_block[1].transformer_blocks[0].attn1.to_q, [], []
    made = patch.self_attention

    def watched(key, references, once):
        replacement = made(key, references, once)

        def note(q, k, v, extra):
            if key == ("middle", 0, 0):
                found.append([reference.query_statistics(key, k) for reference in references])
            return replacement(q, k, v, extra)

        return note

    hook = to_q.register_forward_hook(lambda module, args, out: asked.append(out))
    monkeypatch.setattr(patch, "self_attention", watched)
    try:
        reference = tools.kv_reference(tiny, tools.picture(1, n=2))
        draw(tools.inject(tiny.model, reference, adain="picture to the reference"))
    finally:
        hook.remove()
    (of_rows,) = found[0]
    by_role = asked[0].chunk(2)  # two roles of two pictures
    stats = [torch.stack([part.flatten(0, 1).mean(0), part.flatten(0, 1).std(0, correction=0)]) for part in by_role]
    assert asked[0].shape[0] == 4 and len(of_rows) == 2 and not close(*stats, 1e-2)
    for row in of_rows:
        assert any(close(row, expected) for expected in stats)
    assert not close(*of_rows, 1e-2)
