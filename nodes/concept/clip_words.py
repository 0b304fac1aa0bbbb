"""Soft and hard words in the host's two text encoders of SDXL.

The host's token lists may hold a vector in the place of an id, which is how its textual inversions work. So the
placeholder is tokenised as a word that nobody writes, and then changed for the soft word, or for the id of the hard
one: weights, BREAK and long prompts keep working, and both prompts stand in the same places.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import comfy.model_management
import torch
from torch import Tensor

from ...lookahead.method.concept import Concept, Dictionary
from ...lookahead.method.concept_input import STAND_IN, ConceptError, with_stand_in

TokenLists = dict[str, list[list[tuple[Any, ...]]]]
_HALVES = ("l", "g")  # the keys of both encoders in the host's token lists


def word_tables(clip: Any) -> tuple[Tensor, Tensor]:
    """The word tables of both text encoders, [vocabulary, 768] and [vocabulary, 1280].

    Raises ValueError, one sentence, for a CLIP that is not SDXL's.
    """
    model = clip.cond_stage_model
    if not all(hasattr(model, name) for name in ("clip_l", "clip_g")):
        raise ValueError(
            f"This CLIP ({type(model).__name__}) is not SDXL's, which has two text encoders: use that of an SDXL "
            f"checkpoint."
        )
    first, second = (getattr(model, name).transformer.get_input_embeddings().weight for name in ("clip_l", "clip_g"))
    return first, second


def dictionary_of(clip: Any, words: Mapping[int, str]) -> Dictionary:
    """A dictionary (token id -> text) with the rows of this CLIP."""
    ids = torch.tensor(list(words), dtype=torch.long)
    rows_l, rows_g = (table[ids.to(table.device)].float().cpu().clone() for table in word_tables(clip))
    return Dictionary(ids, rows_l, rows_g, tuple(words.values()))


def check_words(clip: Any, concept: Concept) -> None:
    """Raise ConceptError, one sentence, where a concept's word does not fit this CLIP."""
    widths = tuple(table.shape[1] for table in word_tables(clip))
    if widths != (len(concept.word_l), len(concept.word_g)):
        raise ConceptError(
            f"The concept's word is {len(concept.word_l)} and {len(concept.word_g)} wide, and this CLIP reads "
            f"{widths[0]} and {widths[1]}: use the checkpoint that it was made with."
        )


def prompt_tokens(clip: Any, text: str) -> tuple[TokenLists, int]:
    """The host's token lists of a prompt with one placeholder, and the id that holds its place.

    Raises ConceptError, one sentence, where the placeholder is not there once.
    """
    tokens = clip.tokenize(with_stand_in(text))
    alone = clip.tokenize(STAND_IN)["l"][0]
    return tokens, int(alone[1][0])  # after the token of the beginning


def with_words(tokens: TokenLists, place: int, words: Mapping[str, Any]) -> TokenLists:
    """Token lists with a vector or an id, by encoder, where the id `place` stands."""

    def put(half: str, token: tuple[Any, ...]) -> tuple[Any, ...]:
        return (words[half], *token[1:]) if isinstance(token[0], int) and token[0] == place else token

    return {half: [[put(half, t) for t in chunk] for chunk in chunks] for half, chunks in tokens.items()}


def soft_words(concept: Concept) -> dict[str, Tensor]:
    """The soft word of a concept by encoder."""
    return dict(zip(_HALVES, (concept.word_l, concept.word_g), strict=True))


def hard_words(concept: Concept) -> dict[str, int]:
    """The hard word of a concept by encoder."""
    return dict.fromkeys(_HALVES, concept.word_id)


def encode(clip: Any, tokens: TokenLists) -> tuple[Tensor, Tensor]:
    """Context [1, tokens, C] and pooled text [1, p] of token lists, as the host encodes them."""
    cond, pooled = clip.encode_from_tokens(tokens, return_pooled=True)
    return cond, pooled


def pooled_of(kind: str, blend: float, soft: Tensor, hard: Tensor) -> Tensor:
    """The pooled text: that of the soft prompt, of the hard one, or both by the blend."""
    share = {"soft": 1.0, "hard": 0.0, "blended": blend}[kind]
    if share in (0.0, 1.0):
        return soft if share else hard
    return share * soft + (1 - share) * hard


def encode_differentiably(clip: Any, tokens: TokenLists, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token lists are encoded as above, where the encoders were made differentiable, without the host's bookkeeping:
    gradients go to vectors among the tokens."""
    model = clip.cond_stage_model
    model.reset_clip_options()
    if clip.layer_idx is not None:
        model.set_clip_options({"layer": clip.layer_idx})
    model.set_clip_options({"execution_device": device})
    context, pooled = model.encode_token_weights(tokens)[:2]
    return context, pooled


def load(clip: Any) -> torch.device:
    """Have the host bring the text encoders to their device, and return it."""
    comfy.model_management.load_model_gpu(clip.patcher)
    return clip.patcher.load_device


Encode = Callable[[TokenLists], tuple[Tensor, Tensor]]
