"""Lookahead Place Masks: equal parts that add up to 1, cross-faded where they meet."""

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
