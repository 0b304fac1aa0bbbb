"""A concept (`lookahead.method.concept`) in diffusers' SDXL: soft words in its text encoders, what one pass reads of
it, and what its encoder reads of a picture.

After arXiv 2307.06925, whose equations were not to be had: formulas and constants are this project's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from ..lookahead.method.attention import Attention
from ..lookahead.method.concept import PROJECTIONS, Concept, Dictionary, Offsets, dual_attention, low_rank
from ..lookahead.method.concept_input import STAND_IN, ConceptError, with_stand_in
from .encoder import block_paths

if TYPE_CHECKING:
    from .load import Frozen, PromptEncoder


@dataclass(frozen=True, eq=False)
class ConceptRows:
    """One UNet pass reads this of concepts.

    offsets: A [rows, rank, in], B [rows, out, rank] by projection; hard: the context [rows, tokens, C] that the plain
    path reads, None where it is the soft one; blend: 1 is the concept alone, 0 the base, a number or [rows, 1, 1].
    """

    offsets: Offsets
    hard: Tensor | None = None
    blend: float | Tensor = 1.0

    def attend(
        self,
        path: str,
        qkv: tuple[Tensor, Tensor, Tensor],
        read: tuple[Tensor, Tensor, Tensor],
        plain: tuple[Tensor, Tensor],
        heads: int,
        attention: Attention,
    ) -> Tensor:
        """Both paths of an attention (`path` ends with attn1 or attn2). qkv: the base's projections; read: what each of
        them was projected from; plain: keys and values of the plain path."""
        layers = ("to_q", "to_k", "to_v")
        changes = tuple(self._change(f"{path}.{layer}", x) for layer, x in zip(layers, read, strict=True))
        return dual_attention(*qkv, changes, plain, heads, self.blend, attention)  # type: ignore[arg-type]

    def _change(self, name: str, x: Tensor) -> Tensor:
        if name not in self.offsets:
            return x.new_zeros(())
        a, b = self.offsets[name]
        return low_rank(x, a.to(x), b.to(x))


def projections(unet: UNet2DConditionModel) -> dict[str, tuple[int, int]]:
    """The projections that a concept changes, with their widths (in, out): queries, keys and values of every attention,
    420 of SDXL."""
    layers = {
        f"{path}.{name}": unet.get_submodule(f"{path}.{name}") for path in block_paths(unet) for name in PROJECTIONS
    }
    return {name: (layer.in_features, layer.out_features) for name, layer in layers.items()}


def check_concept(concept: Concept, unet: UNet2DConditionModel, text: PromptEncoder) -> None:
    """Raise ConceptError, one sentence, where a concept was not made for this base."""
    own = projections(unet)
    for name, (a, b) in concept.offsets.items():
        if own.get(name) != (a.shape[1], b.shape[0]):
            there = "no such layer" if name not in own else f"{own[name][0]} -> {own[name][1]}"
            raise ConceptError(
                f"The concept was made for another base model: it changes {name} ({a.shape[1]} -> {b.shape[0]}), and "
                f"this one has {there}: use the base that it was made with."
            )
    widths = tuple(table.shape[1] for table in word_tables(text))
    if widths != (len(concept.word_l), len(concept.word_g)):
        raise ConceptError(
            f"The concept's word is {len(concept.word_l)} and {len(concept.word_g)} wide, and the text encoders of "
            f"this base read {widths[0]} and {widths[1]}: use the base that it was made with."
        )


# --- words


def word_tables(text: PromptEncoder) -> tuple[Tensor, Tensor]:
    """The word tables of both text encoders, [vocabulary, 768] and [vocabulary, 1280]."""
    first, second = (model.get_input_embeddings().weight for model in (text.first, text.second))
    return first, second


def token_of(text: PromptEncoder, word: str) -> int:
    """The id of a word that is one token in both tokenizers. Raises ConceptError where it is several, or another."""
    ids = [tokenizer(word, add_special_tokens=False).input_ids for tokenizer in text.tokenizers]
    if any(len(each) != 1 for each in ids) or ids[0] != ids[1]:
        raise ConceptError(
            f"{word!r} is {len(ids[0])} tokens of CLIP, and a word of the dictionary must be one: take it out of the "
            "dictionary, or write a shorter word."
        )
    return int(ids[0][0])


def dictionary_of(text: PromptEncoder, words: Mapping[int, str]) -> Dictionary:
    """A dictionary (token id -> text) with this base's own rows, float32."""
    ids = torch.tensor(list(words), dtype=torch.long)
    rows_l, rows_g = (table.detach()[ids.to(table.device)].float().cpu() for table in word_tables(text))
    return Dictionary(ids, rows_l, rows_g, tuple(words.values()))


def read_dictionary(text: PromptEncoder, words: Sequence[str]) -> dict[int, str]:
    """Words, one token each, by their ids. Raises ConceptError for a word of several tokens, and for none at all."""
    found = {token_of(text, word): word for word in words}
    if not found:
        raise ConceptError("The dictionary holds no words: write one a line.")
    return found


def all_words(text: PromptEncoder) -> dict[int, str]:
    """All words of the vocabulary that are whole and of three letters or more, by their ids: 30,000 of CLIP's.

    A list of nouns is a better dictionary, since a word of style or colour says little as a hard prompt.
    """
    pieces = text.tokenizers[0].get_vocab()
    whole = {i: piece.removesuffix("</w>") for piece, i in pieces.items() if piece.endswith("</w>")}
    letters = {i: word for i, word in whole.items() if len(word) > 2 and word.isascii() and word.isalpha()}
    return {i: word for i, word in sorted(letters.items()) if word != STAND_IN}


@dataclass(frozen=True, eq=False)
class PromptIds:
    """Prompts with one placeholder each, as ids of both encoders, [n, 77] each; at: bool [n, 77], the placeholder."""

    first: Tensor
    second: Tensor
    at: Tensor

    def rows(self, index: Tensor) -> PromptIds:
        """The prompts of these places."""
        return PromptIds(self.first[index], self.second[index], self.at[index])


def prompt_ids(text: PromptEncoder, prompts: Sequence[str]) -> PromptIds:
    """Tokenise prompts that hold the placeholder once. Raises ConceptError, one sentence, where one does not, or where
    it stands beyond the 77 tokens that CLIP reads."""
    stand_in = token_of(text, STAND_IN)
    texts = [with_stand_in(prompt) for prompt in prompts]
    ids = []
    for tokenizer, model in zip(text.tokenizers, (text.first, text.second), strict=True):
        length = model.config.max_position_embeddings
        options = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "pt"}
        ids.append(tokenizer(texts, **options).input_ids)
    at = ids[0] == stand_in
    for prompt, row in zip(prompts, at, strict=True):
        if not row.any():
            raise ConceptError(
                f"The placeholder of {prompt!r} is beyond the 77 tokens that CLIP reads: shorten the text."
            )
    return PromptIds(ids[0], ids[1], at)


def encode_soft(text: PromptEncoder, ids: PromptIds, word_l: Tensor, word_g: Tensor) -> tuple[Tensor, Tensor]:
    """Context [n, 77, width] and pooled text [n, width] with soft words [n, w_L] and [n, w_G] (or one for all) in the
    placeholder's place; gradients go to the words."""
    return _encode(text, (ids.first, ids.second), ((ids.at, word_l), (ids.at, word_g)))


def encode_hard(text: PromptEncoder, ids: PromptIds, word_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Context and pooled text with real words, int64 [n] or [1], in the placeholder's place."""
    words = word_ids.to(ids.first.device).view(-1, 1)
    first, second = (torch.where(ids.at, words, each) for each in (ids.first, ids.second))
    return _encode(text, (first, second), (None, None))


def _encode(
    text: PromptEncoder, ids: tuple[Tensor, Tensor], soft: tuple[tuple[Tensor, Tensor] | None, ...]
) -> tuple[Tensor, Tensor]:
    hidden = []
    for model, row, word in zip((text.first, text.second), ids, soft, strict=True):
        with _soft_word(model, word):
            output = model(row.to(model.device), output_hidden_states=True)
        hidden.append(output.hidden_states[-2])
    return torch.cat(hidden, -1), output.text_embeds


@contextmanager
def _soft_word(model: nn.Module, word: tuple[Tensor, Tensor] | None) -> Iterator[None]:
    """Within it, the encoder's word table gives the soft word in the marked places."""
    if word is None:
        yield
        return
    at, rows = word

    def put(_: nn.Module, __: object, out: Tensor) -> Tensor:
        there = at.to(out.device)[..., None]
        return torch.where(there, rows.to(out).reshape(-1, 1, out.shape[-1]), out)

    hook = model.get_input_embeddings().register_forward_hook(put)  # type: ignore[operator]  # of transformers' models
    try:
        yield
    finally:
        hook.remove()


# --- what the encoder reads


class _Seen(Exception):
    """The UNet has come to its middle, and need not go on."""


@torch.no_grad()
def unet_features(
    unet: UNet2DConditionModel, x: Tensor, t: Tensor, context: Tensor, added: Mapping[str, Tensor]
) -> Tensor:
    """The means over space of what the UNet's down half hands on and of its middle, [n, `unet_width`] (7,040 of SDXL),
    for noised latents [n, 4, h, w] at t [n]; the UNet stops there (the backbone of arXiv 2302.12228).

    context, added: of a `shared_unet.Condition`.
    """
    seen: list[Tensor] = []

    def note(_: nn.Module, __: object, out: Tensor | tuple[Tensor, tuple[Tensor, ...]]) -> None:
        seen.extend(each.float().mean((2, 3)) for each in (out[1] if isinstance(out, tuple) else (out,)))

    def stop(*arguments: Any) -> None:
        note(*arguments)
        raise _Seen

    hooks = [module.register_forward_hook(note) for module in (unet.conv_in, *unet.down_blocks)]
    hooks.append(unet.mid_block.register_forward_hook(stop))
    try:
        unet(x.to(unet.dtype), t, context.to(unet.dtype), added_cond_kwargs=dict(added))
    except _Seen:
        return torch.cat(seen, 1)
    finally:
        for hook in hooks:
            hook.remove()
    raise RuntimeError("the UNet has no middle block")


def unet_width(unet: UNet2DConditionModel) -> int:
    """The number of values that `unet_features` gives."""
    channels, layers = unet.config.block_out_channels, unet.config.layers_per_block
    return int(channels[0] + layers * sum(channels) + sum(channels[:-1]) + channels[-1])


def image_features(frozen: Frozen, pictures: Tensor) -> Tensor:
    """Pictures [n, 3, H, W] in [0, 1] -> what a concept encoder reads of them [n, width]: the image encoder's
    penultimate hidden states, mean over the tokens."""
    return frozen.features(pictures).float().mean(1)
