"""What `make evaluate ARGS="--concepts ..."` tunes and draws at once is what a user would tune and draw one by one."""

from dataclasses import replace

import pytest
import torch
from concept_oracle import random_offsets
from lcm_lookahead.lookahead.files.concept_file import write_concept_encoder
from lcm_lookahead.lookahead.method.concept import Concept, ConceptEncoder, ConceptSizes
from lcm_lookahead.lookahead.method.concept_tuning import Tuning
from lcm_lookahead.mini.drawn_people import model_folder
from lcm_lookahead.mini.plan import WEIGHTS
from lcm_lookahead.mini.studies.concept_making import Concepts, FromEncoder, Maker
from lcm_lookahead.mini.studies.concept_set import PROMPTS, SEEN, Chunk
from lcm_lookahead.sdxl.concept import dictionary_of, projections, token_of
from lcm_lookahead.sdxl.concept_maker import ConceptTuner
from lcm_lookahead.sdxl.concept_pipeline import ConceptPipeline
from lcm_lookahead.sdxl.cpu_attention import cpu_attention
from tensors import relative

TUNING = Tuning(2, 2, 3e-3, 0.05, 0.4)
PAIR = Chunk(SEEN, (0, 1))


@pytest.fixture(scope="module")
def maker():
    made = Maker(WEIGHTS)
    yield made
    made.close()


@pytest.fixture(scope="module")
def encoder(maker, tmp_path_factory):
    """A small concept encoder whose random offsets change something."""
    torch.manual_seed(5)
    words = {token_of(maker.frozen.text, word): word for word in ("mug", "car", "face")}
    dictionary = dictionary_of(maker.frozen.text, words)
    sizes = ConceptSizes(projections(maker.frozen.unet), 128, 0, 16, 32, 32, rank=2, basis=2)
    network = ConceptEncoder(sizes).reset(dictionary)
    for b in network.basis_b.values():
        b.data.normal_(std=0.1)
    network.coefficients_b.bias.data.fill_(0.5)
    path = tmp_path_factory.mktemp("encoder") / "small.safetensors"
    about = {"size": "128", "blend": "0.4", "tuning": '{"steps": 3, "batch": 2, "blend": 0.4, "word_rate": 0.05}'}
    write_concept_encoder(path, network, words, about)
    return path


def test_concepts_tuned_together_are_each_tuned_as_alone(maker, encoder):
    begun = FromEncoder(encoder).make(maker.frozen, PAIR)
    found = dict(maker.tune(Concepts.stacked(begun), PAIR.pictures, TUNING, (0, 1, 2)))
    assert torch.equal(found[0].word_l, torch.stack([c.word_l for c in begun])) and [*found] == [0, 1, 2]
    maker.close()
    alone = ConceptTuner(maker.frozen, attention=cpu_attention)
    try:
        for n, concept in enumerate(begun):
            for steps in (1, 2):
                expected, _ = alone.tune(concept, PAIR.pictures[n], replace(TUNING, steps=steps))
                assert relative(found[steps].word_l[n] - concept.word_l, expected.word_l - concept.word_l) < 1e-3
                assert relative(found[steps].word_g[n], expected.word_g) < 1e-4
                for name, (a, b) in expected.offsets.items():
                    both = found[steps].offsets[name]
                    assert relative(both[0][n], a) < 1e-4 and relative(both[1][n], b) < 1e-4
    finally:
        alone.close()
        maker.shared.inject()


@pytest.mark.parametrize("blend", [0.4, 1.0])
def test_concepts_drawn_together_are_each_drawn_as_the_pipeline_does(maker, blend):
    text = maker.frozen.text
    words = [token_of(text, word) for word in ("face", "comic")]
    tables = [model.get_input_embeddings().weight.detach() for model in (text.first, text.second)]
    made = [
        Concept(
            tables[0][token] + 0.1, tables[1][token], "face", words[0], random_offsets(maker.frozen.unet, seed=n), blend
        )
        for n, token in enumerate(words)
    ]
    noise = PAIR.noise()[:, :2]
    found = maker.draw(Concepts.stacked(made), noise, blend, PROMPTS[:2], steps=4)
    pipe = ConceptPipeline.from_pretrained(model_folder(), image_encoder=None)
    pipe.set_progress_bar_config(disable=True)
    run = {"num_inference_steps": 4, "height": 128, "width": 128, "output_type": "latent"}
    for n, concept in enumerate(made):
        prompts = [asked.text for asked in PROMPTS[:2]]
        expected = pipe(prompts, concept=concept, latents=noise[n], scales=(3.0, 0.0, 0.0), **run).images
        assert relative(found[n], expected) < 1e-4
    assert relative(found[0], found[1]) > 1e-2
