"""DATE's pure functions: words, low-rank offsets of each row, two attention paths, the encoder's prediction."""

import copy
import math

import pytest
import torch
from lcm_lookahead.lookahead.method import concept
from lcm_lookahead.lookahead.method.concept import ConceptEncoder, ConceptSizes, Dictionary
from tensors import randn
from torch import nn
from torch.nn import functional as F


@pytest.fixture
def dictionary() -> Dictionary:
    return Dictionary(torch.arange(100, 107), 0.4 * randn(7, 6, seed=1), 0.6 * randn(7, 8, seed=2), tuple("abcdefg"))


def test_the_product_of_two_word_directions_is_the_mean_of_their_two_cosines(dictionary):
    v_l, v_g = randn(3, 6, seed=3), randn(3, 8, seed=4)
    expected = (
        F.cosine_similarity(v_l[:, None], dictionary.rows_l, dim=-1)
        + F.cosine_similarity(v_g[:, None], dictionary.rows_g, dim=-1)
    ) / 2
    assert torch.allclose(concept.word_direction(v_l, v_g) @ dictionary.directions().T, expected, atol=1e-6)


def test_the_nearest_word_is_the_same_for_both_encoders_and_is_itself_for_a_real_word(dictionary):
    places, cosines = concept.nearest_words(3 * dictionary.rows_l, dictionary.rows_g, dictionary, k=3)
    assert places[:, 0].tolist() == list(range(7))
    assert torch.allclose(cosines[:, 0], torch.ones(7), atol=1e-6)
    assert (cosines.diff(dim=1) <= 0).all()


def test_word_contrast_is_its_formula_and_spares_concepts_of_one_word(dictionary):
    v_l, v_g, tau = randn(4, 6, seed=5), randn(4, 8, seed=6), 0.5
    v_l[3], v_g[3] = v_l[2] * 1.5, v_g[2]  # the same direction, so the same nearest word
    values = concept.word_contrast(v_l, v_g, dictionary, k=2, temperature=tau)
    v, words = concept.word_direction(v_l, v_g), dictionary.directions()
    cosines = v @ words.T
    nearest = cosines.argmax(1)
    for i in range(4):
        pull = cosines[i].topk(2).values.div(tau).exp().sum()
        push = sum((v[i] @ v[j] / tau).exp() for j in range(4) if nearest[j] != nearest[i])
        assert torch.allclose(values[i], -(pull / (pull + push)).log(), atol=1e-5)
    assert nearest[2] == nearest[3]


def test_word_contrast_does_not_depend_on_the_norm_and_pulls_to_the_nearest_word(dictionary):
    v_l, v_g = randn(3, 6, seed=7).requires_grad_(), randn(3, 8, seed=8).requires_grad_()
    value = concept.word_contrast(v_l, v_g, dictionary, negatives=False).sum()
    assert torch.allclose(value, concept.word_contrast(5 * v_l, 5 * v_g, dictionary, negatives=False).sum(), atol=1e-5)
    g_l, g_g = torch.autograd.grad(value, (v_l, v_g))
    _, before = concept.nearest_words(v_l, v_g, dictionary)
    _, after = concept.nearest_words(v_l - 0.1 * g_l, v_g - 0.1 * g_g, dictionary)
    assert (after > before).all()


def test_the_norm_penalty_is_zero_at_the_dictionary_s_mean_norms_alone(dictionary):
    v_l = F.normalize(randn(2, 6, seed=9), dim=-1) * dictionary.rows_l.norm(dim=-1).mean()
    v_g = F.normalize(randn(2, 8, seed=10), dim=-1) * dictionary.rows_g.norm(dim=-1).mean()
    assert torch.allclose(concept.norm_penalty(v_l, v_g, dictionary), torch.zeros(2), atol=1e-6)
    assert torch.allclose(concept.norm_penalty(2 * v_l, v_g, dictionary), torch.ones(2), atol=1e-5)


def test_the_contrast_waits_then_rises_and_its_neighbours_become_one():
    weights = [concept.contrast_weight(step, 100) for step in range(100)]
    assert weights[:21] == [0.0] * 21 and weights[40:] == [1.0] * 60 and weights[30] == pytest.approx(0.5)
    neighbours = [concept.contrast_neighbours(step, 100) for step in range(100)]
    assert neighbours[:21] == [50] * 21 and neighbours[60:] == [1] * 40
    assert neighbours == sorted(neighbours, reverse=True)


def test_a_real_word_stands_out_of_the_logits_whatever_the_dictionary_s_length(dictionary):
    """A word of cosine 1 has at least half of the belief, beside words of cosine 0."""
    logits = concept.word_logits(dictionary.rows_l, dictionary.rows_g, dictionary)
    cosines = dictionary.directions() @ dictionary.directions().T
    assert torch.allclose(logits, cosines * 2 * math.log(7), atol=1e-5)
    for n in (2, 7, 30_000):
        assert math.exp(2 * math.log(n)) / (math.exp(2 * math.log(n)) + n - 1) >= 0.5


def test_the_verdict_is_least_where_a_word_believes_what_the_base_does_and_steep_where_it_is_sure_of_another():
    """Its gradient is the difference of both beliefs, however sure the word is."""
    errors, n = torch.tensor([[0.040, 0.046], [0.046, 0.040]]), 1024
    believed = (-n / 2 * errors).softmax(1)
    assert float(believed[0, 0]) == pytest.approx(1 / (1 + math.exp(-n / 2 * 0.006)), abs=1e-5)
    for logits in (believed.log(), torch.tensor([[6.0, 0.0], [6.0, 0.0]]), torch.zeros(2, 2)):
        logits = logits.clone().requires_grad_()
        value = concept.word_verdict(logits, errors, n)
        expected = -(believed * logits.log_softmax(1)).sum(1)
        assert torch.allclose(value, expected)
        value.sum().backward()
        assert torch.allclose(logits.grad, logits.detach().softmax(1) - believed, atol=1e-6)


def merged(layer: nn.Linear, a, b) -> nn.Linear:
    """A plain copy of a layer with W + B A."""
    out = copy.deepcopy(layer)
    out.weight.data += b @ a
    return out


def plain(q, k, v, heads):
    """Attention written out head by head."""
    parts = []
    for q_h, k_h, v_h in zip(*(t.chunk(heads, dim=-1) for t in (q, k, v)), strict=True):
        parts.append((q_h @ k_h.transpose(1, 2) * q_h.shape[-1] ** -0.5).softmax(-1) @ v_h)
    return torch.cat(parts, dim=-1)


@pytest.mark.parametrize("cross", [False, True], ids=["self-attention", "cross-attention"])
@pytest.mark.parametrize("blend", [0.0, 0.25, 1.0])
def test_two_paths_are_two_attentions_with_merged_and_plain_weights(cross, blend):
    torch.manual_seed(11)
    width, context = 12, (10 if cross else 12)
    layers = [nn.Linear(width, width), nn.Linear(context, width), nn.Linear(context, width)]
    x = randn(3, 9, width, seed=12)
    soft, hard = (randn(3, 5, context, seed=s) for s in (13, 14)) if cross else (x, x)
    offsets = [
        (0.3 * randn(2, layer.in_features, seed=s), 0.3 * randn(width, 2, seed=s + 9)) for s, layer in enumerate(layers)
    ]
    tuned = [merged(layer, *ab) for layer, ab in zip(layers, offsets, strict=True)]
    expected = blend * plain(tuned[0](x), tuned[1](soft), tuned[2](soft), 3)
    expected = expected + (1 - blend) * plain(layers[0](x), layers[1](hard), layers[2](hard), 3)

    rows = [(a.expand(3, *a.shape), b.expand(3, *b.shape)) for a, b in offsets]
    q, k, v = (layer(y) for layer, y in zip(layers, (x, soft, soft), strict=True))
    change = tuple(concept.low_rank(y, *ab) for y, ab in zip((x, soft, soft), rows, strict=True))
    out = concept.dual_attention(q, k, v, change, (layers[1](hard), layers[2](hard)), 3, blend)
    assert torch.allclose(out, expected, atol=1e-6)


def test_blend_zero_is_the_plain_attention_to_the_bit_and_a_blend_of_each_row_is_its_rows():
    q, k, v, k_hard, v_hard = (randn(2, 4, 6, seed=s) for s in range(5))
    change = tuple(randn(2, 4, 6, seed=s) for s in (5, 6, 7))
    from lcm_lookahead.lookahead.method.attention import softmax_attention

    assert torch.equal(
        concept.dual_attention(q, k, v, change, (k_hard, v_hard), 2, 0.0), softmax_attention(q, k_hard, v_hard, 2)
    )
    rows = concept.dual_attention(q, k, v, change, (k_hard, v_hard), 2, torch.tensor([0.3, 1.0]).view(2, 1, 1))
    for row, blend in enumerate((0.3, 1.0)):
        at = slice(row, row + 1)
        one = concept.dual_attention(
            q[at], k[at], v[at], tuple(c[at] for c in change), (k_hard[at], v_hard[at]), 2, blend
        )
        assert torch.allclose(rows[at], one, atol=1e-6)


def test_each_row_has_low_rank_matrices_of_its_own():
    x, a, b = randn(3, 5, 7, seed=1), randn(3, 2, 7, seed=2), randn(3, 4, 2, seed=3)
    expected = torch.stack([row @ (b_ @ a_).T for row, a_, b_ in zip(x, a, b, strict=True)])
    assert torch.allclose(concept.low_rank(x, a, b), expected, atol=1e-5)


@pytest.fixture
def encoder(dictionary) -> ConceptEncoder:
    torch.manual_seed(21)
    projections = {"mid.attn1.to_q": (12, 12), "mid.attn2.to_k": (10, 12)}
    sizes = ConceptSizes(projections, image_width=16, unet_width=5, hidden=24, word_l=6, word_g=8, rank=2, basis=3)
    return ConceptEncoder(sizes).reset(dictionary)


def test_training_begins_at_the_base_model_and_at_the_mean_word(encoder, dictionary):
    word_l, word_g, offsets = encoder(randn(4, 16), randn(4, 5))
    assert all((b @ a).abs().max() == 0 for a, b in offsets.values())
    assert {name: (a.shape, b.shape) for name, (a, b) in offsets.items()} == {
        "mid.attn1.to_q": ((4, 2, 12), (4, 12, 2)),
        "mid.attn2.to_k": ((4, 2, 10), (4, 12, 2)),
    }
    assert (word_l - dictionary.rows_l.mean(0)).abs().max() < 0.2
    assert (word_g - dictionary.rows_g.mean(0)).abs().max() < 0.2


def test_gradients_reach_every_part_of_the_encoder_once_b_has_left_zero(encoder):
    nn.init.normal_(encoder.coefficients_b.weight, std=0.1)
    word_l, word_g, offsets = encoder(randn(4, 16), randn(4, 5))
    (word_l.square().sum() + word_g.square().sum() + concept.offset_penalty(offsets).sum()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in encoder.parameters())


def test_the_penalty_is_the_squared_norm_of_the_product():
    offsets = {
        "x": (randn(3, 2, 7, seed=1), randn(3, 4, 2, seed=2)),
        "y": (randn(3, 2, 5, seed=3), randn(3, 6, 2, seed=4)),
    }
    expected = sum((b @ a).square().sum((1, 2)) for a, b in offsets.values()) / 2
    assert torch.allclose(concept.offset_penalty(offsets), expected, rtol=1e-4)


def test_an_encoder_says_what_features_it_was_trained_with(encoder):
    with pytest.raises(ValueError, match="5 features of the UNet.*none"):
        encoder(randn(1, 16))


def test_the_mean_of_predictions_is_of_words_and_of_both_matrices(encoder):
    nn.init.normal_(encoder.coefficients_b.weight, std=0.1)
    many = encoder(randn(4, 16), randn(4, 5))
    one = concept.average(many)
    assert one.word_l.shape == (1, 6) and torch.allclose(one.word_l[0], many.word_l.mean(0))
    a, b = one.offsets["mid.attn1.to_q"]
    assert torch.allclose(a[0], many.offsets["mid.attn1.to_q"][0].mean(0))
    assert torch.allclose(b[0], many.offsets["mid.attn1.to_q"][1].mean(0))


def test_sdxl_s_sizes_are_those_of_the_fact_sheet():
    from lcm_lookahead.lookahead.files.block_names import block_names, level_of

    width = {1: 640, 2: 1280}
    projections = {}
    for block in block_names():
        w = width[level_of(block.host)]
        for name in concept.PROJECTIONS:
            reads_text = name in ("attn2.to_k", "attn2.to_v")
            projections[f"{block.diffusers}.{name}"] = (2048 if reads_text else w, w)
    with torch.device("meta"):
        encoder = ConceptEncoder(ConceptSizes(projections))
    assert len(projections) == 420
    numbers = sum(sum(sizes) for sizes in projections.values())
    assert numbers == pytest.approx(1.119e6, rel=1e-3)  # a rank
    basis = [p for part in (encoder.basis_a, encoder.basis_b) for p in part.values()]
    assert sum(p.numel() for p in basis) == 16 * 4 * numbers  # 71.6 M


def test_features_of_the_unet_are_standardised_by_their_noise_level(dictionary):
    sizes = ConceptSizes({"a.attn1.to_q": (4, 4)}, 5, 3, 8, 6, 8, 1, 2)
    encoder = ConceptEncoder(sizes).reset(dictionary)
    t = torch.arange(0, 1000, 10)
    level = (t * concept.NOISE_BINS // 1000).float()
    features = 100 * level[:, None] + (1 + level[:, None]) * randn(100, 3, seed=9)
    encoder.measure(features, t)
    found = encoder.standardised(features, t).unflatten(0, (concept.NOISE_BINS, 10))
    assert found.mean(1).abs().max() < 1e-3 and (found.std(1) - 1).abs().max() < 1e-2
    again = ConceptEncoder(sizes)
    again.load_state_dict(encoder.state_dict())
    assert torch.equal(again.standardised(features, t), encoder.standardised(features, t))
