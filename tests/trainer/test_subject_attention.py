"""Pictures that share attention: what is seen of the others, what is matched, and the UNet left as it was."""

import pytest
import torch
from diffusers.models.attention_processor import Attention
from lcm_lookahead.sdxl import configs
from lcm_lookahead.sdxl.subject_attention import (
    Sharing,
    SubjectAttention,
    _SharedSelfAttention,
    _WatchedCrossAttention,
    above_otsu,
    injected,
)
from lcm_lookahead.trainer.config import CONFIGS, ConfigError
from lcm_lookahead.trainer.data.generate.config import load
from lcm_lookahead.trainer.data.generate.generators import subject_tokens


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    tiny = configs.UNET | {
        "block_out_channels": [32, 32, 64],
        "attention_head_dim": [2, 2, 4],
        "cross_attention_dim": 16,
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "transformer_layers_per_block": [1, 1, 1],
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 64,
    }
    return configs.unet(tiny, "cpu").eval()


def predicted(unet, x, text):
    added = {"text_embeds": torch.ones(len(x), 16), "time_ids": torch.ones(len(x), 6)}
    with torch.no_grad():
        return unet(x, torch.tensor(500), text, added_cond_kwargs=added).sample


def test_the_first_step_looks_the_next_ones_share_and_the_unet_is_left_as_it_was(unet):
    x, text = torch.randn(6, 4, 16, 16), torch.randn(6, 7, 16)
    plain, before = predicted(unet, x, text), unet.attn_processors
    subject = SubjectAttention(unet, Sharing(dropout=0.0, injection=0.0))
    with subject.shared([[1, 2], [1], [3]], 10, seed=0):
        first = predicted(unet, x, text)
        torch.testing.assert_close(first, plain, atol=1e-5, rtol=1e-4)
        assert not subject.masks and set(subject.heat) == {4, 8}
        second = predicted(unet, x, text)
        assert all(0 < mask.sum() < mask.numel() for mask in subject.masks.values())
        assert (second - plain).abs().max() > 1e-4
    assert unet.attn_processors == before and not unet._forward_pre_hooks
    assert torch.equal(predicted(unet, x, text), plain)


def test_a_picture_sees_itself_and_the_others_subjects_alone():
    torch.manual_seed(0)
    attn = Attention(8, heads=2, dim_head=4).eval()
    subject = SubjectAttention(None, Sharing(dropout=0.0, injection=0.0))
    subject.tokens, mask = [[0]] * 3, torch.rand(3, 16) > 0.6
    subject.masks = {4: mask}
    x = torch.randn(6, 16, 8)  # without text, and with
    out = _SharedSelfAttention(subject)(attn, x)
    for row in range(6):
        group, own = row - row % 3, row % 3
        keys = torch.cat([x[row], *(x[group + n][mask[n]] for n in range(3) if n != own)])
        expected = attn(x[row : row + 1], encoder_hidden_states=keys[None])
        torch.testing.assert_close(out[row : row + 1], expected, atol=1e-5, rtol=1e-4)
    subject.seen, subject.settings = {}, Sharing(dropout=1.0, injection=0.0)  # nothing of the others is left
    torch.testing.assert_close(_SharedSelfAttention(subject)(attn, x), attn(x), atol=1e-5, rtol=1e-4)


def test_cross_attention_is_itself_and_notes_the_words_of_the_subject():
    torch.manual_seed(0)
    attn = Attention(8, cross_attention_dim=8, heads=2, dim_head=4).eval()
    subject = SubjectAttention(None, Sharing())
    subject.tokens = [[2], [0, 1]]
    x, text = torch.randn(4, 16, 8), torch.randn(4, 5, 8)
    out = _WatchedCrossAttention(subject)(attn, x, text)
    torch.testing.assert_close(out, attn(x, encoder_hidden_states=text), atol=1e-5, rtol=1e-4)
    weights = attn.get_attention_scores(*(attn.head_to_batch_dim(y) for y in (attn.to_q(x), attn.to_k(text))))
    weights = weights.unflatten(0, (4, 2)).mean(1)
    torch.testing.assert_close(subject.heat[4][0], weights[2, :, 2])
    torch.testing.assert_close(subject.heat[4][1], weights[3, :, :2].mean(1))


def test_subject_patches_take_over_a_share_of_their_match_in_the_other_pictures():
    features = torch.eye(8).repeat(2, 1, 1)  # patch n of one is like patch n of the other
    features[1] = features[1].roll(1, 0)  # ... moved by one
    features[:, 5:] = 0.01  # like nothing
    out = torch.arange(2 * 2 * 8, dtype=torch.float32).view(4, 8, 1)
    masks = torch.zeros(2, 8, dtype=torch.bool)
    masks[0, :3] = masks[1, 1:4] = True
    masks[0, 5] = True
    result = injected(features, out, masks, 0.5)
    for group in (0, 2):
        moved = (out[group, :3] + out[group + 1, 1:4]) / 2
        assert torch.equal(result[group, :3], moved)
        assert torch.equal(result[group, 3:], out[group, 3:])  # no subject, or no match that is good enough
        assert torch.equal(result[group + 1, 1:4], moved)


def test_the_threshold_separates_two_classes_of_each_row():
    values = torch.cat([torch.rand(2, 30) * 0.2, 0.7 + torch.rand(2, 10) * 0.1], 1)
    values[1] = values[1] * 5 + 3
    assert torch.equal(above_otsu(values), torch.arange(40).expand(2, 40) >= 30)


def test_the_words_of_the_subject_are_found_in_the_prompt():
    tokenizer = configs.tokenizers()[0]
    places = subject_tokens(
        tokenizer, "an oil painting of a pale face with a beard in a forest", "a pale face with a beard"
    )
    ids = tokenizer("an oil painting of a pale face with a beard in a forest").input_ids
    assert tokenizer.decode([ids[place] for place in places]).strip() == "a pale face with a beard"
    assert subject_tokens(tokenizer, "a dog", "a cat") == [1, 2]


def test_pictures_of_a_person_are_sampled_together_or_refused():
    config = load(CONFIGS / "generate/mini_consistent.yaml")
    assert config.generator.batch % config.prompts.per_person == 0
    with pytest.raises(ConfigError, match="generator.batch is 4, .* 6 a person: set it to a multiple, such as 6"):
        load(CONFIGS / "generate/mini_consistent.yaml", ["generator.batch=4"])
    with pytest.raises(ConfigError, match="shared is for kind 'consistent', and kind is 'sdxl'"):
        load(CONFIGS / "generate/mini.yaml", ["generator.shared={dropout: 0.2}"])
    assert "shared" not in load(CONFIGS / "generate/mini.yaml").content()["generator"]  # as in sets that were begun
