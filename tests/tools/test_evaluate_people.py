"""What `make evaluate ARGS=--people` compares, and how pairs are judged."""

import pytest
import torch
from lcm_lookahead.mini.studies import people
from picture_files import files_of

LEFT, RIGHT = ["a.png", "b.png"], ["c.png", "d.png"]


def test_arms_differ_in_whose_a_face_is_alone():
    nodes = people.graph(LEFT, RIGHT, 0, people.ARMS)
    losses = [nodes[f"{name} loss"]["inputs"] for name, arm in people.ARMS.items() if arm.matching]
    known = ("matching", "mask_1", "mask_2")
    assert files_of(nodes, losses[0]["person_1"]) == LEFT and files_of(nodes, losses[0]["person_2"]) == RIGHT
    presets = [nodes[f"{name} guidance"]["inputs"]["preset"] for name, arm in people.ARMS.items() if arm.matching]
    assert presets == ["balanced"] * 3
    assert len(losses) == 3 and all(
        {**one, **dict.fromkeys(known)} == {**losses[0], **dict.fromkeys(known)} for one in losses
    )
    drawn = [nodes[f"{name} samples"]["inputs"] for name in people.ARMS]
    assert all({**one, "sampler": None} == {**drawn[0], "sampler": None} for one in drawn)


def test_in_every_other_batch_the_loss_has_the_people_and_their_masks_in_the_other_order():
    """The image prompts keep them where they are."""
    one, other = (people.graph(LEFT, RIGHT, batch, people.ARMS) for batch in (0, 1))
    first, second = (nodes[f"{people.MASKS} loss"]["inputs"] for nodes in (one, other))
    for name in ("person", "mask"):
        assert (first[f"{name}_1"], first[f"{name}_2"]) == (second[f"{name}_2"], second[f"{name}_1"])
    assert all(one[f"prompt {n}"] == other[f"prompt {n}"] for n in range(2))


def test_a_pair_is_swapped_where_its_halves_are_more_like_the_other_person():
    right = torch.tensor([[0.8, 0.1], [0.2, 0.6]])
    found = people.scores(torch.stack([right, right.flip(1)]))
    assert found[people.OWN].tolist() == pytest.approx([0.7, 0.15])
    assert found[people.WEAKER].tolist() == pytest.approx([0.6, 0.1])
    assert found[people.OTHER].tolist() == pytest.approx([0.15, 0.7])
    assert found[people.SWAPPED].tolist() == [0, 1]


def test_gains_are_paired_and_orders_are_told_apart():
    numbers = torch.Generator().manual_seed(1)
    none = torch.rand(16, 2, 2, generator=numbers)
    swapped = none.clone()
    swapped[4:8], swapped[12:] = none[4:8].flip(2), none[12:].flip(2)  # the batches of the other order
    found = {
        people.NONE: none,
        people.MATCHED: none + torch.eye(2) / 2,
        people.ORDER: swapped,
        people.MASKS: none + 0.25,
    }
    rows = people.table(found)
    assert list(rows[people.MATCHED][f"{people.OWN}, gain"]) == pytest.approx([0.5] * 3)
    assert list(rows[people.MATCHED][f"{people.OTHER}, gain"]) == pytest.approx([0.0] * 3)
    assert f"{people.OWN}, gain" not in rows[people.NONE]
    straight, crossed = (f"{people.OWN}, {which}" for which in people.ORDERS)
    assert rows[people.ORDER][straight] == rows[people.NONE][straight]
    assert rows[people.ORDER][crossed] != rows[people.NONE][crossed]
    text = people.page(rows, 16)
    assert "16 pairs" in text and "| share of pairs that are swapped |" in text
