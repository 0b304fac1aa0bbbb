"""At most a dozen steps that bring a predicted concept nearer to its one picture: the same in trainer, pipeline, node.

What is tuned are the concept's own numbers, its two soft words and its low-rank offsets; nothing else has gradients.
After arXiv 2307.06925 (at most 12 steps, token and offsets both tuned), whose rates were not to be had: ours.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from .concept import NEAR, Concept, Dictionary, Offsets, near_words, norm_penalty, word_contrast
from .concept_input import ConceptError, check_blend
from .schedule import TIMESTEPS, add_noise

MOST_STEPS = 100


@dataclass(frozen=True)
class Tuning:
    """A tuning has these settings. All values are this project's own.

    steps: 0 to MOST_STEPS; batch: noise levels a step; offset_rate: AdamW's rate of A and B; word_rate: of the soft
    words, as a share of a component's usual size; blend: of the two attention paths, in tuning as in drawing;
    word_weight: of the pull to the concept's real word, which is not chosen anew; norm_weight: of the pull of the
    word's norm to that word's; words: so many of the real words that are nearest are tried before the first step, and
    the one under which the picture is predicted best becomes the concept's (`choose_word`); 1 keeps the nearest.
    """

    steps: int = 12
    batch: int = 8
    offset_rate: float = 1e-3
    word_rate: float = 0.01
    blend: float = 0.25
    word_weight: float = 0.05
    norm_weight: float = 0.05
    temperature: float = 0.5
    seed: int = 0
    words: int = 1

    def __post_init__(self) -> None:
        """Raises ConceptError, one sentence, for a value out of its range."""
        check_blend(self.blend)
        if not 0 <= self.steps <= MOST_STEPS:
            raise ConceptError(f"The number of tuning steps is {self.steps}: give 0 to {MOST_STEPS}; 12 are usual.")
        if self.batch < 1:
            raise ConceptError(f"The batch of the tuning is {self.batch}: give at least 1.")
        if not 1 <= self.words <= NEAR or self.words % 1:
            raise ConceptError(f"The number of real words to try is {self.words}: give 1 (the nearest) to {NEAR}.")

    @classmethod
    def of(cls, concept: Concept, **given: Any) -> Tuning:
        """The tuning that a concept's encoder was made for, with what is given (and is not None) in its place."""
        names = {f.name for f in fields(cls)}
        stored = {k: v for k, v in json.loads(concept.about.get("tuning", "{}")).items() if k in names}
        values = {"blend": concept.blend, **stored, **{k: v for k, v in given.items() if v is not None}}
        return cls(**values)


#: (concept, noised latent [1, 4, h, w], time step int64 [1], number of the sample) -> predicted noise [1, 4, h, w]
PredictWith = Callable[[Concept, Tensor, Tensor, int], Tensor]


def tune(
    concept: Concept,
    views: Tensor,
    alpha_bar: Tensor,
    predict: PredictWith,
    tuning: Tuning,
    words: Dictionary | None = None,
    backward: Callable[[Tensor], None] = Tensor.backward,
    progress: Callable[[int, float], None] | None = None,
) -> tuple[Concept, list[float]]:
    """A tuned copy of a concept, and the diffusion loss of each step before it was taken.

    views: latents [n, 4, h, w] of the one picture (itself, mirrored); alpha_bar: of all time steps; predict: with
    gradients to the concept's tensors; words: the real words that may be the concept's (`words_to_try`), None for no
    choice and no pull to it; progress: told of every step, with its loss. One sample is computed at a time, so that
    memory does not depend on the batch. Random numbers are a function of the seed and the sample's number. The concept
    given is never changed: where predict or progress raises, nothing has happened.
    """
    if words is not None:
        concept, words = choose_word(concept, views, alpha_bar, predict, tuning, words)
    device = views.device
    word_l, word_g = (_leaf(word, device) for word in (concept.word_l, concept.word_g))
    offsets: Offsets = {name: (_leaf(a, device), _leaf(b, device)) for name, (a, b) in concept.offsets.items()}
    tuned = replace(concept, word_l=word_l, word_g=word_g, offsets=offsets, blend=tuning.blend)
    groups = [{"params": [m for pair in offsets.values() for m in pair], "lr": tuning.offset_rate}]
    for word in (word_l, word_g):
        groups.append({"params": [word], "lr": tuning.word_rate * float(word.detach().norm()) / len(word) ** 0.5})
    # (an empty group is an error)
    optimiser = torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)
    losses = []
    for step in range(tuning.steps):
        optimiser.zero_grad(set_to_none=True)
        total = 0.0
        for n in range(tuning.batch):
            number = step * tuning.batch + n
            t, x, noise = noised_sample(views, alpha_bar, tuning, number)
            loss = (predict(tuned, x, t, number).float() - noise).square().mean() / tuning.batch
            backward(loss)
            total += float(loss.detach())
        if words is not None:
            backward(word_pull(word_l, word_g, words, tuning))
        if not total < float("inf"):
            raise ConceptError(
                f"The loss of tuning step {step + 1} is not finite: lower the rates, or tune in a higher precision."
            )
        optimiser.step()
        losses.append(total)
        if progress is not None:
            progress(step + 1, total)
    done = {name: (a.detach().cpu(), b.detach().cpu()) for name, (a, b) in offsets.items()}
    before = int(concept.about.get("steps", 0))
    about = {**concept.about, "steps": str(before + tuning.steps)}
    word_l, word_g = word_l.detach().cpu(), word_g.detach().cpu()
    return replace(tuned, word_l=word_l, word_g=word_g, offsets=done, about=about), losses


def words_to_try(concept: Concept, tuning: Tuning) -> dict[int, str]:
    """The real words that a tuning chooses among (token id -> text), the concept's own first; that one alone where it
    was tuned before."""
    before = int(concept.about.get("steps", 0))
    own = {concept.word_id: concept.word}
    if before or not tuning.steps:
        return own
    return dict(list((own | near_words(concept)).items())[: tuning.words])


@torch.no_grad()
def choose_word(
    concept: Concept,
    views: Tensor,
    alpha_bar: Tensor,
    predict: PredictWith,
    tuning: Tuning,
    words: Dictionary,
) -> tuple[Concept, Dictionary]:
    """The concept with the real word under which its picture is predicted best, and a dictionary of that word alone.

    What a picture shows, the base itself knows best (a diffusion classifier, arXiv 2303.16203): the encoder proposes
    words, and the loss of the base under each of them alone, at the noise and the noise levels of the first tuning
    step, decides. Where it decides against the encoder, the soft word was at another noun, and begins anew at the real
    one. The number of passes is words x batch, without gradients.
    """
    losses = torch.zeros(len(words.texts))
    for place in range(len(losses)):
        tried = replace(real_word(concept, words, place), offsets={})
        for number in range(tuning.batch if len(losses) > 1 else 0):
            t, x, noise = noised_sample(views, alpha_bar, tuning, number)
            losses[place] += (predict(tried, x, t, number).float() - noise).square().mean().cpu()
    best = int(losses.argmin())
    it = slice(best, best + 1)
    alone = Dictionary(words.ids[it], words.rows_l[it], words.rows_g[it], words.texts[it])
    return (real_word(concept, words, best) if best else concept), alone


def real_word(concept: Concept, words: Dictionary, place: int) -> Concept:
    """A concept with a real word as its soft and its hard one."""
    return replace(
        concept,
        word_l=words.rows_l[place],
        word_g=words.rows_g[place],
        word=words.texts[place],
        word_id=int(words.ids[place]),
    )


def _leaf(tensor: Tensor, device: torch.device) -> Tensor:
    # cloned: a tensor that was made in inference mode cannot become a leaf
    return tensor.detach().to(device, torch.float32, copy=True).clone().requires_grad_()


def noised_sample(views: Tensor, alpha_bar: Tensor, tuning: Tuning, number: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gives time step, noised view and noise of one sample. The time steps of a batch are spread over the schedule."""
    numbers = torch.Generator().manual_seed((tuning.seed * 1_000_003 + number) % 2**63)
    place = (number % tuning.batch + float(torch.rand((), generator=numbers))) / tuning.batch
    view = int(torch.randint(len(views), (), generator=numbers))
    noise = torch.randn(views[:1].shape, generator=numbers).to(views.device)
    t = torch.tensor([min(TIMESTEPS - 1, int(place * TIMESTEPS))], device=views.device)
    return t, add_noise(views[view : view + 1].float(), noise, alpha_bar[t]), noise


def word_pull(word_l: Tensor, word_g: Tensor, known: Dictionary, tuning: Tuning) -> Tensor:
    """Weighs the pull of a soft word [w_L], [w_G] to its real word (a dictionary of one), and of its norm to that of
    the real one."""
    real = known._replace(rows_l=known.rows_l.to(word_l), rows_g=known.rows_g.to(word_g))
    words = word_l[None], word_g[None]
    contrast = word_contrast(*words, real, temperature=tuning.temperature, negatives=False)
    return (tuning.word_weight * contrast + tuning.norm_weight * norm_penalty(*words, real)).sum()
