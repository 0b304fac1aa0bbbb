"""From a concept encoder's configuration to what the training loop takes, and the models that make concepts."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from ..lookahead.files.atomic import first_line
from ..lookahead.method.attention import softmax_attention
from ..lookahead.method.concept import ConceptEncoder, ConceptSizes
from ..sdxl import concept  # before diffusers: `sdxl` cures what diffusers' own imports need
from ..sdxl.cpu_attention import cpu_attention
from ..sdxl.load import Frozen, PromptEncoder
from ..trainer.concept.config import ConceptConfig, ConceptModels
from ..trainer.concept.recipe import ConceptRecipe
from ..trainer.concept.source import ConceptDataError, ConceptPictures, folder_source
from ..trainer.concept.step import ConceptStep
from ..trainer.data.pairs import ENDINGS, passed_over
from .assemble import base_hash, device, read_models
from .bases import DRAWN, known_base, resolve


def assemble_concept(config: ConceptConfig) -> tuple[ConceptRecipe, ConceptPictures]:
    """The recipe, with all its models, and the source of its pictures. Raises one of `main.USER_ERRORS` for a file that
    is missing or is none of its kind."""
    base = known_base(config.model.base)
    frozen = frozen_models(config.model, config.precision)
    words = concept_words(frozen.text, config.token.dictionary, base.nouns if base else ())
    dictionary = concept.dictionary_of(frozen.text, words)
    sizes = ConceptSizes(
        concept.projections(frozen.unet) if config.model.offsets else {},
        image_width=frozen.vision.config.hidden_size,
        unet_width=concept.unet_width(frozen.unet) if config.model.features == "clip+unet" else 0,
        hidden=config.model.hidden,
        word_l=dictionary.rows_l.shape[1],
        word_g=dictionary.rows_g.shape[1],
        rank=config.model.rank,
        basis=config.model.basis,
    )
    torch.manual_seed(config.seed)  # of the encoder's first weights
    encoder = ConceptEncoder(sizes).reset(dictionary)
    source = open_pictures(config, frozen)
    about = {
        "base_model_hash": base_hash(base.checkpoint if base else Path(config.model.base)),
        "image_encoder": Path(config.model.image_encoder or config.model.base).name,
        "size": str(config.data.size),
        "data_hash": source.digest(),
    }
    step = ConceptStep(config, frozen.unet, frozen.text, encoder, dictionary, attention())
    return ConceptRecipe(config, step, words, about), source


def frozen_models(model: ConceptModels, precision: str) -> Frozen:
    """The frozen models that a section `model` names."""
    return read_models(resolve(model, known_base(model.base)), precision)


def on_device(frozen: Frozen) -> Frozen:
    """The models where this process computes."""
    frozen.readers(device())
    frozen.unet.to(device())
    return frozen


def attention():  # type: ignore[no-untyped-def]  # `lookahead.method.attention.Attention`
    """The attention function of this process's device."""
    return cpu_attention if device().type == "cpu" else softmax_attention


def open_pictures(config: ConceptConfig, frozen: Frozen) -> ConceptPictures:
    """A folder of pictures, or what is drawn. Raises ConceptDataError."""
    if config.data.source != DRAWN:
        if others := passed_over(Path(config.data.source)):
            print(others, file=sys.stderr)
        return folder_source(config, frozen, ENDINGS)
    from ..mini.drawn_things import drawn_source

    return drawn_source(config, frozen)


def concept_words(text: PromptEncoder, dictionary: str | None, nouns: Sequence[str] = ()) -> dict[int, str]:
    """The words that a concept may be near to, by id: those of a file, else the base's own nouns, else all of CLIP's.

    Raises ConceptError for a word of several tokens, and ConceptDataError for a file that cannot be read.
    """
    if dictionary is None:
        return concept.read_dictionary(text, nouns) if nouns else concept.all_words(text)
    try:
        lines = Path(dictionary).expanduser().read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConceptDataError(
            f"The dictionary {dictionary} cannot be read ({first_line(error)}): name a text file with a noun a line."
        ) from None
    return concept.read_dictionary(text, [line.strip() for line in lines if line.strip()])
