"""The KV encoder's algebra against products written out."""

import pytest
import torch
from lcm_lookahead.lookahead.method.kv_encoder import EXPORTED, TUNED, KVEncoder, layers

PATHS = (
    "down_blocks.1.attentions.0.transformer_blocks.0",
    "up_blocks.0.attentions.2.transformer_blocks.0",
    "up_blocks.1.attentions.10.transformer_blocks.0",
    "up_blocks.1.attentions.9.transformer_blocks.1",
    "mid_block.attentions.0.transformer_blocks.0",
)
LAST = PATHS[2]
IN, OUT, RANK = 6, 4, 2


def weights(*names):
    g = torch.Generator().manual_seed(1)
    return {n: (torch.randn(RANK, IN, generator=g), torch.randn(OUT, RANK, generator=g)) for n in names}


@pytest.fixture
def x():
    return torch.randn(3, 5, IN, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def projected():
    return torch.randn(3, 5, OUT, generator=torch.Generator().manual_seed(3))


def test_every_block_exports_and_all_but_the_one_that_runs_last_are_tuned():
    named = list(layers(PATHS))
    assert [(p, layer) for half, p, layer in named if half == "kv_export"] == [(p, e) for p in PATHS for e in EXPORTED]
    tuned = [p for half, p, _ in named if half == "kv_encoder"]
    assert LAST not in tuned and len(tuned) == len(TUNED) * (len(PATHS) - 1)


def test_each_half_adds_its_own_product_to_the_base_s_projection(x, projected):
    names = [f"{half}.{PATHS[0]}.attn1.to_k" for half in ("kv_encoder", "kv_export")]
    found = weights(*names)
    kv = KVEncoder.from_weights(found, scale=lambda rank: 3 / rank)
    for name, change in zip(names, (kv.tuned, kv.exported), strict=True):
        a, b = found[name]
        expected = projected + 1.5 * x @ (b @ a).T
        assert torch.allclose(change(PATHS[0], "attn1.to_k", projected, x), expected, atol=1e-5)


def test_a_layer_without_a_change_is_the_base_s(x, projected):
    kv = KVEncoder.from_weights(weights(f"kv_encoder.{PATHS[0]}.attn1.to_k"))
    assert kv.exported(PATHS[0], "attn1.to_k", projected, x) is projected
    assert kv.tuned(PATHS[1], "attn1.to_k", projected, x) is projected
    assert KVEncoder().tuned(PATHS[0], "attn1.to_k", projected, x) is projected


def test_a_new_one_changes_nothing_and_can_learn(x, projected):
    kv = KVEncoder.fresh(PATHS, lambda layer: (IN, OUT), kv_rank=2, export_rank=3)
    assert len(kv) == len(list(layers(PATHS)))
    assert torch.equal(kv.tuned(PATHS[0], "attn2.to_q", projected, x), projected)
    assert torch.equal(kv.exported(PATHS[0], "attn1.to_v", projected, x), projected)
    kv.tuned(PATHS[0], "attn2.to_q", projected, x).sum().backward()
    assert kv.change("kv_encoder", PATHS[0], "attn2.to_q").lora_B.weight.grad.abs().sum() > 0


def test_weights_of_a_file_are_taken_as_they_are_and_given_back_under_its_names():
    name = f"kv_export.{PATHS[0]}.attn1.to_v"
    found = weights(name)
    kv = KVEncoder.from_weights(found)
    assert kv.widths == {name: (IN, OUT)} and not any(p.requires_grad for p in kv.parameters())
    for half, given in zip("AB", found[name], strict=True):
        assert kv.tensors()[f"{name}.lora_{half}.weight"].data_ptr() == given.data_ptr()


def test_names_of_checkpoints_stay():
    kv = KVEncoder.fresh(PATHS[:2], lambda layer: (IN, OUT), 1, 1)
    assert "kv_encoder/down_blocks/1/attentions/0/transformer_blocks/0/attn2/to_out/0.lora_B.weight" in kv.state_dict()


def test_weights_of_other_ranks_are_refused():
    kv = KVEncoder.fresh(PATHS, lambda layer: (IN, OUT), 2, 2)
    kv.copy_from({k: torch.ones_like(v) for k, v in kv.tensors().items()})
    assert all(v.eq(1).all() for v in kv.tensors().values())
    other = KVEncoder.fresh(PATHS, lambda layer: (IN, OUT), 2, 3)
    with pytest.raises(ValueError, match="kv_export.*set kv_rank and export_rank"):
        kv.copy_from(other.tensors())
