"""The files of concepts: what is written is read back, what is wrong is said in one sentence."""

import pytest
import torch
from lcm_lookahead.lookahead.files import concept_file
from lcm_lookahead.lookahead.files.tensors import EncoderFileError, read_tensors, write_tensors
from lcm_lookahead.lookahead.method.concept import Concept, ConceptEncoder, ConceptSizes, Dictionary, near_words
from tensors import randn
from torch import nn

NEAR = '[[917, "mug"], [1000, "car"]]'
BLOCK = "mid_block.attentions.0.transformer_blocks.0"


@pytest.fixture
def concept() -> Concept:
    offsets = {f"{BLOCK}.attn1.to_q": (randn(2, 12, seed=1), randn(12, 2, seed=2))}
    return Concept(randn(6, seed=3), randn(8, seed=4), "mug", 917, offsets, 0.25, {"base_model": "mini", "near": NEAR})


@pytest.fixture
def encoder() -> ConceptEncoder:
    torch.manual_seed(5)
    sizes = ConceptSizes({f"{BLOCK}.attn2.to_k": (10, 12)}, 16, 5, 24, 6, 8, 2, 3)
    words = Dictionary(torch.tensor([1, 2]), randn(2, 6, seed=6), randn(2, 8, seed=7), ("mug", "car"))
    made = ConceptEncoder(sizes).reset(words)
    nn.init.normal_(made.coefficients_b.weight, std=0.1)
    return made


def test_a_concept_comes_back_as_it_was_written_in_16_bit(concept, tmp_path):
    path = tmp_path / "mine.safetensors"
    concept_file.write_concept(path, concept)
    again = concept_file.read_concept(path)
    assert torch.equal(again.word_l, concept.word_l.half().float())
    assert (again.word, again.word_id, again.blend, again.about) == ("mug", 917, 0.25, concept.about)
    assert near_words(again) == {917: "mug", 1000: "car"}
    for mine, written in zip(again.offsets[f"{BLOCK}.attn1.to_q"], concept.offsets[f"{BLOCK}.attn1.to_q"], strict=True):
        assert torch.equal(mine, written.half().float())


def test_the_stock_files_hold_the_same_product_under_the_public_names(concept, tmp_path):
    lora, embedding = concept_file.write_stock(tmp_path, "mine", concept)
    tensors, _ = read_tensors(lora)
    key = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    scale = tensors[f"{key}.alpha"] / len(tensors[f"{key}.lora_down.weight"])
    a, b = concept.offsets[f"{BLOCK}.attn1.to_q"]
    product = scale * tensors[f"{key}.lora_up.weight"].float() @ tensors[f"{key}.lora_down.weight"].float()
    assert torch.allclose(product, b @ a, atol=1e-2)
    words, _ = read_tensors(embedding)
    assert {k: tuple(v.shape) for k, v in words.items()} == {"clip_l": (1, 6), "clip_g": (1, 8)}


def test_a_concept_encoder_comes_back_with_its_sizes_and_predicts_the_same(encoder, tmp_path):
    path = tmp_path / "encoder.safetensors"
    concept_file.write_concept_encoder(path, encoder, {917: "mug", 1000: "car"}, {"base_model": "mini"})
    again, words, metadata = concept_file.read_concept_encoder(path)
    assert again.sizes == encoder.sizes and words == {917: "mug", 1000: "car"} and metadata["base_model"] == "mini"
    expected, found = encoder(randn(2, 16), randn(2, 5)), again(randn(2, 16), randn(2, 5))
    assert torch.allclose(found.word_l, expected.word_l, atol=1e-2)
    for name, pair in expected.offsets.items():
        for mine, theirs in zip(found.offsets[name], pair, strict=True):
            assert torch.allclose(mine, theirs, atol=1e-2)


def damaged_concepts(tmp_path, concept):
    path = tmp_path / "mine.safetensors"
    concept_file.write_concept(path, concept)
    tensors, metadata = read_tensors(path)
    first = f"{BLOCK}.attn1.to_q.lora_A.weight"
    yield "cut short", None, metadata
    yield "another kind", tensors, {}
    yield "format version", tensors, {**metadata, "format_version": "9"}
    yield "not finite", {**tensors, first: tensors[first] * float("nan")}, metadata
    yield "as large as", {**tensors, first: torch.full_like(tensors[first].float(), 1e38)}, metadata
    yield "holds no number", {**tensors, first: tensors[first][:0]}, metadata
    yield "not part of a concept", {**tensors, "extra": torch.ones(2)}, metadata
    yield "not part of a concept", {k: v for k, v in tensors.items() if k != first}, metadata
    yield "lacks its word", {k: v for k, v in tensors.items() if k != "token.G"}, metadata
    yield "lacks its word", tensors, {**metadata, "blend": "much"}
    yield "lacks its word", tensors, {**metadata, "word_id": "1000000"}
    for near in ("{}", "[7]", '[[7, ""]]', '[[-1, "mug"]]', '[[49408, "mug"]]', str([[1, "a"]] * 17), "[" * 9999):
        yield "states the near words", tensors, {**metadata, "near": near}


def test_what_is_no_concept_or_a_damaged_one_is_refused_in_one_sentence(concept, tmp_path):
    path = tmp_path / "bad.safetensors"
    for why, tensors, metadata in damaged_concepts(tmp_path, concept):
        if tensors is None:
            path.write_bytes((tmp_path / "mine.safetensors").read_bytes()[:300])
        else:
            write_tensors(path, tensors, metadata)
        with pytest.raises(EncoderFileError, match=why) as error:
            concept_file.read_concept(path)
        assert "bad.safetensors" in str(error.value) and "\n" not in str(error.value)


def test_a_concept_encoder_with_other_weights_than_its_sizes_ask_for_is_refused(encoder, tmp_path):
    path = tmp_path / "encoder.safetensors"
    concept_file.write_concept_encoder(path, encoder, {917: "mug"}, {})
    tensors, metadata = read_tensors(path)
    bad = (
        {k: v for k, v in tensors.items() if k != "trunk.2.weight"},
        {**tensors, "surplus": torch.ones(2)},
        {**tensors, "head_l.weight": torch.ones(3, 3)},
        {**tensors, "dictionary": torch.tensor([1, 2], dtype=torch.int32)},
        {k.replace("attn2", "attn9"): v for k, v in tensors.items()},
    )
    for weights in bad:
        write_tensors(path, weights, metadata)
        with pytest.raises(EncoderFileError, match="download it again") as error:
            concept_file.read_concept_encoder(path)
        assert "\n" not in str(error.value)
    concept_file.write_concept(path, Concept(randn(6), randn(8), "mug", 1, {}))
    with pytest.raises(EncoderFileError, match="is a concept, and a concept encoder is needed"):
        concept_file.read_concept_encoder(path)
