"""From a picture to a drawing in diffusers: the pipeline with a concept, and the stock files in stock diffusers."""

from dataclasses import replace

import pytest
import torch
from concept_oracle import random_offsets
from lcm_lookahead.lookahead.files.concept_file import stock_lora, write_concept
from lcm_lookahead.lookahead.method.concept import Concept
from lcm_lookahead.lookahead.method.concept_input import ConceptError
from lcm_lookahead.mini.drawn_people import model_folder
from lcm_lookahead.mini.files.weights import IMAGE_PROMPT
from lcm_lookahead.mini.plan import WEIGHTS
from lcm_lookahead.mini.world.references import reference_faces
from lcm_lookahead.sdxl import concept as in_sdxl
from lcm_lookahead.sdxl import lora
from lcm_lookahead.sdxl.concept_pipeline import ConceptPipeline
from tensors import relative

RUN = {"num_inference_steps": 2, "height": 128, "width": 128, "output_type": "latent", "scales": (2.0, 1.0, 0.0)}
PROMPT = "a comic of a S* on a beach"


@pytest.fixture(scope="module")
def pipe():
    made = ConceptPipeline.from_pretrained(model_folder(), image_encoder=None)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def concept(pipe):
    """Random offsets, and a real word for a soft one: so that what is drawn can be said in words too."""
    text = pipe._prompt_encoder
    word_l, word_g = (table[in_sdxl.token_of(text, "face")].detach() for table in in_sdxl.word_tables(text))
    offsets = random_offsets(pipe.unet, scale=0.2)
    return Concept(word_l, word_g, "face", in_sdxl.token_of(text, "face"), offsets, 0.4)


def draw(pipe, prompt=PROMPT, **options):
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(2))
    return pipe(prompt, latents=latents, **{**RUN, **options}).images


def test_blend_0_is_the_pipeline_without_a_concept_under_the_hard_prompt(pipe, concept):
    expected = draw(pipe, "a comic of a face on a beach")
    assert torch.equal(draw(pipe, concept=concept, blend=0.0), expected)
    assert relative(draw(pipe, concept=concept, blend=0.4), expected) > 1e-2


def test_blend_1_is_the_stock_lora_with_the_soft_word(pipe, concept):
    found = draw(pipe, concept=concept, blend=1.0)
    attached = lora.load(stock_lora(concept.offsets), pipe.unet).attach(pipe.unet)
    expected = draw(pipe, "a comic of a face on a beach")
    attached.detach()
    assert relative(found, expected) < 1e-4


def test_rows_say_whether_the_negative_is_changed_too(pipe, concept):
    all_, positive = (draw(pipe, concept=concept, rows=rows) for rows in ("all", "conditional"))
    assert relative(positive, all_) > 1e-3


def test_a_concept_leaves_nothing_behind(pipe, concept):
    before, processors = draw(pipe, "a comic of a face"), pipe.unet.attn_processors
    draw(pipe, concept=concept)
    with pytest.raises(ConceptError, match=r"has no S\*|rows is 'some'"):
        draw(pipe, concept=concept, rows="some")
    assert pipe.unet.attn_processors == processors and torch.equal(draw(pipe, "a comic of a face"), before)


def test_several_prompts_and_pictures_each_have_their_hard_prompt(pipe, concept):
    latents = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(2))
    prompts = ["a comic of a S*", "a photo of a S* at night"]
    many = pipe(prompts, concept=concept, num_images_per_prompt=2, latents=latents, **RUN).images
    for n in range(4):
        one = pipe(prompts[n // 2], concept=concept, latents=latents[n : n + 1], **RUN).images
        assert relative(many[n : n + 1], one) < 1e-4


def test_a_prompt_without_the_placeholder_is_refused(pipe, concept):
    with pytest.raises(ConceptError, match="has no S"):
        draw(pipe, "a comic of a mug", concept=concept)


def test_a_concept_file_is_read_and_one_of_another_base_refused(pipe, concept, tmp_path):
    write_concept(tmp_path / "mine.safetensors", concept)
    assert pipe.load_concept(tmp_path / "mine.safetensors").word == "face"
    other = Concept(torch.zeros(768), torch.zeros(1280), "dog", 5, {}, 0.25)
    write_concept(tmp_path / "other.safetensors", other)
    with pytest.raises(ConceptError, match="768 and 1280 wide"):
        pipe.load_concept(tmp_path / "other.safetensors")


def test_without_an_encoder_it_says_what_to_call(pipe):
    with pytest.raises(ConceptError, match="call load_concept_encoder"):
        pipe.predict_concept(torch.zeros(1, 64, 64, 3))


def test_a_concept_acts_beside_the_image_prompt_and_kv_injection(pipe, concept):
    """One that changes nothing changes nothing there, and one that does does."""
    pipe.load_encoder(WEIGHTS / IMAGE_PROMPT, image_encoder=model_folder() / "image_encoder")
    try:
        reference = pipe.encode_reference(reference_faces(1).movedim(1, -1), size=128)
        options = {"reference": reference, "use_kv": True, "scales": (2.0, 1.0, 0.5)}
        expected = draw(pipe, "a comic of a face on a beach", **options)
        nothing = replace(concept, offsets={name: (a, b * 0) for name, (a, b) in concept.offsets.items()})
        assert relative(draw(pipe, concept=nothing, blend=0.5, **options), expected) < 1e-4
        assert relative(draw(pipe, concept=concept, blend=0.5, **options), expected) > 1e-2
    finally:
        pipe.unload_encoder()
