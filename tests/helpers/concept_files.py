"""Files of concepts with random weights."""

import torch
from lcm_lookahead.lookahead.files.concept_file import write_concept_encoder
from lcm_lookahead.lookahead.method.concept import ConceptEncoder, ConceptSizes
from lcm_lookahead.sdxl import concept as in_sdxl


def random_concept_encoder(frozen, folder, blend=0.4):
    """Writes a concept encoder of the mini world, which also reads the UNet; returns its path.

    frozen: of `assemble_concept.frozen_models`.
    """
    with torch.inference_mode(False):
        words = in_sdxl.read_dictionary(frozen.text, ["face", "mug", "car", "boat"])
        dictionary = in_sdxl.dictionary_of(frozen.text, words)
        width = in_sdxl.unet_width(frozen.unet)
        widths = {"image_width": frozen.vision.config.hidden_size, "unet_width": width, "word_l": 32, "word_g": 32}
        widths |= {"hidden": 16, "rank": 2, "basis": 2}
        torch.manual_seed(3)
        encoder = ConceptEncoder(ConceptSizes(in_sdxl.projections(frozen.unet), **widths)).reset(dictionary)
        encoder.coefficients_b.bias.data.fill_(0.3)
        encoder.head_l.weight.data.normal_(std=0.1)
        encoder.measure(torch.randn(40, width), torch.arange(40) * 25)
        path = folder / "random_concept_encoder.safetensors"
        write_concept_encoder(path, encoder, words, {"size": "128", "blend": str(blend), "base_model": "mini"})
    return path
