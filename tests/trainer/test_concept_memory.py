"""The memory of a concept, counted on the meta device: by part, growing with the picture, and within a card for SDXL."""

import pytest
from lcm_lookahead.cli.concept_shapes import concept_shapes
from lcm_lookahead.trainer.concept.config import ConceptModels
from lcm_lookahead.trainer.concept.estimate import prediction_memory, tuning_memory


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
