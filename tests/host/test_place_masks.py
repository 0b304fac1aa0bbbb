"""Lookahead Place Masks: equal parts that add up to 1, cross-faded where they meet."""

import functools

import pytest
import torch


@pytest.mark.parametrize("people", [2, 3])
@pytest.mark.parametrize("overlap", [0.0, 0.1, 0.3])
def test_the_places_are_equal_and_add_up_to_1(pack, people, overlap):
    masks = torch.cat(pack.nodes["LookaheadPlaceMasks"].execute(people, "side by side", overlap).result)
    assert masks.shape == (3, 256, 256) and torch.allclose(masks.sum(0), torch.ones(256, 256), atol=1e-6)
    assert masks.min() >= 0 and torch.allclose(masks[:people].mean((1, 2)), torch.tensor(1 / people), atol=0.01)
    assert masks[people:].sum() == 0
    centres = [int(256 * (n + 0.5) / people) for n in range(people)]
    assert all(masks[n, 7, x] == 1 for n, x in enumerate(centres))
    fading = ((masks[0, 0] > 0) & (masks[0, 0] < 1)).sum()
    assert abs(int(fading) - 256 * overlap) <= 2


def test_one_above_the_other_is_the_same_turned(pack):
    node = pack.nodes["LookaheadPlaceMasks"]
    for beside, below in zip(node.execute(3).result, node.execute(3, "one above the other").result, strict=True):
        assert beside.shape == (1, 256, 256) and torch.equal(beside, below.transpose(1, 2))


def with_prompts(pack, masks, texts):
    """Each text in its place, as the shared workflows join them: by the host's own nodes."""
    nodes = pack.host_nodes.NODE_CLASS_MAPPINGS
    place, combine = nodes["ConditioningSetMask"]().append, nodes["ConditioningCombine"]().combine
    placed = [place(text, mask, "default", 1.0)[0] for text, mask in zip(texts, masks, strict=True)]
    return functools.reduce(lambda joined, other: combine(joined, other)[0], placed)


@pytest.mark.parametrize("people", [2, 3])
def test_each_prompt_acts_in_its_place(pack, mini, tools, people):
    """With another prompt for one person the prediction changes where the mask of that person is, and nowhere else."""
    masks = pack.nodes["LookaheadPlaceMasks"].execute(people, overlap=0.1).result[:people]
    model = mini.model
    for number, mask in enumerate(masks):  # which also say where the references act
        model = tools.apply(model, tools.reference(mini, tools.picture(number)), mask=mask)
    x, texts = (
        torch.randn(1, 4, 8, 24, generator=torch.Generator().manual_seed(3)),
        [mini.text(n) for n in range(people)],
    )

    def predicted(texts):
        return tools.denoised(model, with_prompts(pack, masks, texts), mini.text(9), x, 5.0)

    before = predicted(texts)
    for number, mask in enumerate(masks):
        moved = (predicted([*texts[:number], mini.text(7), *texts[number + 1 :]]) - before).abs().amax((0, 1))
        weight = torch.nn.functional.interpolate(mask[None], (8, 24), mode="bilinear")[0, 0]
        assert 0 < (weight > 0).sum() < weight.numel()
        assert moved[weight == 0].max() == 0 and moved[weight == 1].min() > 0


def test_the_place_of_a_person_is_drawn_as_its_prompt_alone_would_draw_it(pack, mini, tools):
    masks = pack.nodes["LookaheadPlaceMasks"].execute(2, overlap=0.0).result[:2]
    x, texts = torch.randn(1, 4, 8, 16, generator=torch.Generator().manual_seed(4)), [mini.text(n) for n in (1, 2)]
    both = tools.denoised(mini.model, with_prompts(pack, masks, texts), mini.text(9), x, 5.0)
    for text, part in zip(texts, (slice(0, 8), slice(8, 16)), strict=True):
        alone = tools.denoised(mini.model, text, mini.text(9), x, 5.0)
        assert torch.allclose(both[..., part], alone[..., part], atol=1e-4)
        assert not torch.allclose(both, alone, atol=1e-2)


def test_each_reference_acts_in_its_place(pack, mini, tools):
    """At the left edge the picture is that of the left person alone, in the layer that reads the image prompt."""
    one, two, _ = pack.nodes["LookaheadPlaceMasks"].execute(2, overlap=0.0).result
    left, right = (tools.reference(mini, tools.picture(n)) for n in (1, 2))
    both = tools.apply(tools.apply(mini.model, left, mask=one), right, mask=two)
    patch = pack.module("nodes.conditioning.cross_attention")
    attend, seen = patch.PromptRows.attend, []

    def watched(self, q, key, extra, attention):
        added = attend(self, q, key, extra, attention)
        height, width = extra["activations_shape"][-2:]
        columns = added.unflatten(1, (height, width)).abs().sum((0, 1, 3))
        seen.append([bool(part.max() > 0) for part in columns.chunk(2)])
        return added

    patch.PromptRows.attend = watched
    try:
        tools.denoised(both, mini.text(1), mini.text(2), torch.randn(1, 4, 8, 8), 5.0)
    finally:
        patch.PromptRows.attend = attend
    assert seen == [[True, False], [False, True]] * 17
