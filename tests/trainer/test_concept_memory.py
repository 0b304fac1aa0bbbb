"""The memory of a concept, counted on the meta device: by part, growing with the picture, and within a card."""

import os
import resource

import pytest
import torch
from lcm_lookahead.cli.concept_shapes import concept_shapes
from lcm_lookahead.lookahead.method.concept import Concept
from lcm_lookahead.lookahead.method.concept_tuning import Tuning, tune
from lcm_lookahead.lookahead.method.schedule import alphas_cumprod
from lcm_lookahead.sdxl import configs
from lcm_lookahead.sdxl.concept import projections, token_of
from lcm_lookahead.sdxl.concept_maker import ConceptTuner
from lcm_lookahead.sdxl.load import Frozen, PromptEncoder
from lcm_lookahead.trainer.concept.config import ConceptModels
from lcm_lookahead.trainer.concept.estimate import prediction_memory, tuning_memory
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection


@pytest.fixture(scope="module")
def mini():
    return concept_shapes(ConceptModels(base="mini"))


def test_memory_grows_with_the_picture_and_falls_where_blocks_are_computed_twice(mini):
    name = "activations of one sample"
    small, large, twice = (
        tuning_memory(size, precision="fp32", checkpointing=kind, shapes=mini)[name]
        for size, kind in ((128, "none"), (256, "none"), (256, "blocks"))
    )
    assert small < twice < large and large > 2.5 * small


def test_the_parts_are_those_of_the_models(mini):
    parts = tuning_memory(128, rank=4, precision="fp32", checkpointing="none", shapes=mini)
    numbers = 95_744 + 64  # offsets of 17 blocks at rank 4, and two words of 32
    assert parts["the concept, 32 bit"] == pytest.approx(4e-9 * numbers) and 2 * numbers * 4e-9 == pytest.approx(
        parts["AdamW's state"]
    )
    assert set(prediction_memory(basis=2, hidden=16, shapes=mini)) >= {"image encoder", "word tables", "activations"}


@pytest.mark.slow
def test_a_concept_of_sdxl_tunes_within_16_gb():
    assert 7 < sum(tuning_memory().values()) < 16 and sum(prediction_memory().values()) < 6


@pytest.mark.skipif("LOOKAHEAD_FULL_SIZE" not in os.environ, reason="takes 10 GB and some minutes: opt in")
def test_one_tuning_step_of_full_size_runs_in_16_bit_on_a_cpu_within_20_gb():
    """SDXL's own sizes with random weights, a picture of 256 pixels."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        unet = configs.unet(device="cpu")
        first = CLIPTextModel(CLIPTextConfig(**configs.TEXT))
        second = CLIPTextModelWithProjection(CLIPTextConfig(**configs.TEXT_2))
    finally:
        torch.set_default_dtype(torch.float32)
    nothing = torch.nn.Identity()
    frozen = Frozen(unet, PromptEncoder(configs.tokenizers(), first, second), nothing, nothing)
    g = torch.Generator().manual_seed(1)
    offsets = {
        name: (torch.randn(4, i, generator=g) * i**-0.5, torch.zeros(o, 4))
        for name, (i, o) in projections(unet).items()
    }
    words = torch.randn(768, generator=g) * 0.01, torch.randn(1280, generator=g) * 0.01
    concept = Concept(*words, "dog", token_of(frozen.text, "dog"), offsets, 0.25)
    tuner = ConceptTuner(frozen, "blocks")
    predict = tuner.predictor(("a photo of a S*",), 0.25, 256)
    views = torch.randn(1, 4, 32, 32, generator=g)
    made, losses = tune(concept, views, alphas_cumprod().float(), predict, Tuning(1, 1))
    assert len(losses) == 1 and any(bool((b != 0).any()) for _, b in made.offsets.values())
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 < 20e9
