"""Many concepts at once: predicted, tuned and drawn with the mini world's base, and kept in the cache.

What is tuned or drawn depends on this module's code and on that of SOURCES, on the base, and on its own settings; all
that is part of its name in the cache, comments and docstrings left out. So a run that was stopped goes on, and a
longer one takes over what a shorter one has made.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ...lookahead.files.atomic import atomic
from ...lookahead.files.concept_file import read_concept_encoder
from ...lookahead.files.tensors import read_tensors, sha256, write_tensors
from ...lookahead.method.concept import Concept, Dictionary, Offsets
from ...lookahead.method.concept_input import TEMPLATES
from ...lookahead.method.concept_tuning import Tuning, noised_sample, word_pull, words_to_try
from ...lookahead.method.guidance import Scales, guided
from ...lookahead.method.sampling import ddim_timesteps, sample_ddim
from ...lookahead.method.schedule import alphas_cumprod
from ...sdxl.concept import (
    ConceptRows,
    PromptIds,
    dictionary_of,
    encode_hard,
    encode_soft,
    projections,
    prompt_ids,
    token_of,
    word_tables,
)
from ...sdxl.concept_maker import KEPT, predict_concept
from ...sdxl.configs import tokenizers
from ...sdxl.cpu_attention import cpu_attention
from ...sdxl.load import Frozen, PromptEncoder
from ...sdxl.shared_unet import Condition, SharedUNet
from ...tools.common import CACHE, ROOT
from ..files import models
from ..files.weights import CHECKPOINT, CLIP_VISION
from ..plan import IMAGE_SIZE
from .concept_set import PROMPTS, Asked, ConceptChunk
from .study import CFG, without_words

STEPS = 20  # of DDIM
TOGETHER = 4  # concepts drawn in one pass of the UNet, each under all prompts
SAVE_SECONDS = 120  # between two savings of a tuning that is under way
STORE = CACHE / "evaluated" / "concepts"
SOURCES = (
    *(
        f"lookahead/method/{n}.py"
        for n in ("attention", "concept", "concept_tuning", "guidance", "sampling", "schedule")
    ),
    *(f"sdxl/{n}.py" for n in ("concept", "concept_maker", "cpu_attention", "shared_unet")),
    *(f"mini/world/{n}.py" for n in ("faces", "references", "styles", "things")),
    *(f"mini/studies/{n}.py" for n in ("concept_making", "concept_set")),
)


class Concepts(NamedTuple):
    """n concepts, a row each (`method.concept.Concept`): word_l [n, w_L], word_g [n, w_G], word_ids int64 [n], A
    [n, rank, in] and B [n, out, rank] by projection; words: the hard ones, as text; tried: the real words that each
    one's tuning chooses among, nothing of those that were kept in a file."""

    word_l: Tensor
    word_g: Tensor
    word_ids: Tensor
    offsets: Offsets
    words: tuple[str, ...]
    tried: tuple[Mapping[int, str], ...] = ()

    @classmethod
    def stacked(cls, made: Sequence[Concept], tuning: Tuning | None = None) -> Concepts:
        """Concepts with the same projections as one; tuning: with the words that it tries."""
        offsets = {
            name: (
                torch.stack([c.offsets[name][0] for c in made]),
                torch.stack([c.offsets[name][1] for c in made]),
            )
            for name in made[0].offsets
        }
        ids = torch.tensor([c.word_id for c in made])
        words = tuple(c.word for c in made)
        tried = () if tuning is None else tuple(words_to_try(c, tuning) for c in made)
        word_l, word_g = torch.stack([c.word_l for c in made]), torch.stack([c.word_g for c in made])
        return cls(word_l, word_g, ids, offsets, words, tried)

    def rows(self, index: Tensor) -> Concepts:
        """Some of them, also repeatedly."""
        offsets = {name: (a[index], b[index]) for name, (a, b) in self.offsets.items()}
        words = tuple(self.words[n] for n in index.tolist())
        tried = tuple(self.tried[n] for n in index.tolist()) if self.tried else ()
        return Concepts(self.word_l[index], self.word_g[index], self.word_ids[index], offsets, words, tried)

    def write(self, path: Path) -> None:
        """Keep them in 16 bit, as a concept's file does."""
        tensors = {"word_l": self.word_l, "word_g": self.word_g}
        for name, (a, b) in self.offsets.items():
            tensors |= {f"A.{name}": a, f"B.{name}": b}
        half = {name: tensor.detach().half().contiguous() for name, tensor in tensors.items()}
        write_tensors(path, half | {"word_ids": self.word_ids}, {"words": "\n".join(self.words)})

    @classmethod
    def read(cls, path: Path) -> Concepts:
        """Reads what `write` has kept, in 32 bit."""
        tensors, metadata = read_tensors(path)
        ids = tensors.pop("word_ids")
        whole = {name: tensor.float() for name, tensor in tensors.items()}
        offsets = {n[2:]: (whole[n], whole[f"B.{n[2:]}"]) for n in whole if n.startswith("A.")}
        return cls(whole["word_l"], whole["word_g"], ids, offsets, tuple(metadata["words"].split("\n")))


# --- what a tuning begins with


class Start(Protocol):
    """A start says what concepts are before they are tuned."""

    @property
    def key(self) -> str:
        """All that it depends on beside the base."""

    @property
    def argument(self) -> str:
        """The word that `started` makes it of again."""

    def make(self, frozen: Frozen, chunk: ConceptChunk) -> list[Concept]:
        """The concepts of a chunk, untuned."""


@dataclass(frozen=True)
class FromEncoder:
    """A concept encoder's prediction."""

    file: Path

    @property
    def key(self) -> str:
        return f"encoder {sha256(self.file)}"

    @property
    def argument(self) -> str:
        return str(self.file)

    @property
    def tuning(self) -> Tuning:
        """The tuning that the file was made for."""
        about = read_concept_encoder(self.file)[2]
        nothing = torch.empty(0)
        return Tuning.of(Concept(nothing, nothing, "", 0, {}, float(about.get("blend", 0.25)), about))

    def make(self, frozen: Frozen, chunk: ConceptChunk) -> list[Concept]:
        network, words, about = read_concept_encoder(self.file)
        size, known = int(about.get("size", IMAGE_SIZE)), {k: about[k] for k in KEPT if k in about}
        return [predict_concept(network, words, frozen, p, size, self.tuning.blend, known) for p in chunk.pictures]


@dataclass(frozen=True)
class FromWord:
    """The class's name as the soft word, and LoRA matrices of a rank that change nothing yet; rank 0 for none."""

    rank: int = 0

    @property
    def key(self) -> str:
        return f"word, rank {self.rank}"

    @property
    def argument(self) -> str:
        return str(self.rank)

    def make(self, frozen: Frozen, chunk: ConceptChunk) -> list[Concept]:
        tables, made = word_tables(frozen.text), []
        for noun, seed in zip(chunk.nouns, chunk.seeds, strict=True):
            token, numbers = token_of(frozen.text, noun), torch.Generator().manual_seed(seed)
            offsets = {
                name: (torch.randn(self.rank, i, generator=numbers) * i**-0.5, torch.zeros(o, self.rank))
                for name, (i, o) in (projections(frozen.unet).items() if self.rank else ())
            }
            word_l, word_g = (table[token].detach().float().clone() for table in tables)
            made.append(Concept(word_l, word_g, noun, token, offsets, 1.0, {"size": str(IMAGE_SIZE)}))
        return made


def started(argument: str) -> Start:
    """A beginning by its `argument`: a rank, or the file of an encoder."""
    return FromWord(int(argument)) if argument.isdecimal() else FromEncoder(Path(argument))


# --- all of them at once


class Maker:
    """Predicts, tunes and draws with the base in a folder."""

    def __init__(self, base: Path):
        mini = models.load(base)
        text = PromptEncoder(tokenizers(), mini.text.l, mini.text.g)
        self.frozen = Frozen(mini.unet, text, mini.vae, models.load_image_encoder(base))
        self.shared = SharedUNet(self.frozen.unet, attention=cpu_attention).inject()
        self.alpha_bar = alphas_cumprod().float()

    def close(self) -> None:
        """The UNet computes as before."""
        self.shared.eject()

    def tune(
        self,
        concepts: Concepts,
        pictures: Tensor,
        tuning: Tuning,
        keep: Sequence[int],
        state: Path | None = None,
        templates: Sequence[str] = TEMPLATES,
    ) -> Iterator[tuple[int, Concepts]]:
        """The concepts after each number of steps in `keep`, each tuned as `concept_tuning.tune` does it alone.

        A pass of the UNet has a row a concept at one noise level. AdamW is elementwise and the concepts' losses are
        summed, so none knows of the others. pictures: [n, 3, H, W]; tuning.steps says nothing here, and may be
        exceeded; state: a file from which a tuning that was stopped goes on.
        """
        frozen, n = self.frozen, len(concepts.words)
        both = frozen.latents(torch.cat([pictures, pictures.flip(-1)]))
        views = torch.stack(both.split(n), 1)  # [n, 2, 4, h, w]
        ids = prompt_ids(frozen.text, list(templates))
        untuned = _Leaves(concepts, tuning).concepts(concepts)
        if max(keep):
            concepts = self.chosen(concepts, views, ids, tuning)
        leaves = _Leaves(concepts, tuning)
        done = leaves.resume(state, min(keep))
        saved_at = time.monotonic()
        texts = dict(zip(concepts.word_ids.tolist(), concepts.words, strict=True))
        real = {token: dictionary_of(frozen.text, {token: word}) for token, word in texts.items()}
        words = [real[token] for token in concepts.word_ids.tolist()]
        if done in keep:
            yield done, leaves.concepts(concepts) if done else untuned
        for step in range(done, max(keep)):
            self._step(leaves, concepts, views, ids, words, tuning, step)
            if step + 1 in keep:
                yield step + 1, leaves.concepts(concepts)
            if state is not None and time.monotonic() - saved_at > SAVE_SECONDS:
                leaves.save(state, step + 1)
                saved_at = time.monotonic()
        if state is not None:
            state.unlink(missing_ok=True)

    @torch.no_grad()
    def chosen(self, concepts: Concepts, views: Tensor, ids: PromptIds, tuning: Tuning) -> Concepts:
        """The concepts with the real word that each one's tuning chooses (`concept_tuning.choose_word`)."""
        most = max((len(tried) for tried in concepts.tried), default=1)
        if most == 1:
            return concepts
        losses = torch.full((len(concepts.words), most), float("inf"))
        tokens = [list(tried) for tried in concepts.tried]
        for place in range(most):
            rows = torch.tensor([n for n, own in enumerate(tokens) if place < len(own)])
            tried = self._real(concepts.rows(rows), [tokens[n][place] for n in rows.tolist()])._replace(offsets={})
            losses[rows, place] = sum(
                self._losses(tried, views[rows], ids, tuning, number) for number in range(tuning.batch)
            )
        places = losses.argmin(1)
        best = [own[place] for own, place in zip(tokens, places.tolist(), strict=True)]
        texts = tuple(tried[token] for tried, token in zip(concepts.tried, best, strict=True))
        real, other = self._real(concepts, best), (places > 0)[:, None]
        word_l = torch.where(other, real.word_l, concepts.word_l)
        word_g = torch.where(other, real.word_g, concepts.word_g)
        return concepts._replace(word_l=word_l, word_g=word_g, word_ids=real.word_ids, words=texts)

    def _real(self, concepts: Concepts, tokens: Sequence[int]) -> Concepts:
        """The concepts with real words as soft and hard ones."""
        ids = torch.tensor(tokens)
        word_l, word_g = (table.detach()[ids].float() for table in word_tables(self.frozen.text))
        return concepts._replace(word_l=word_l, word_g=word_g, word_ids=ids)

    def _losses(self, now: Concepts, views: Tensor, ids: PromptIds, tuning: Tuning, number: int) -> Tensor:
        """The loss of each concept at one sample of the tuning, [n]."""
        samples = [noised_sample(of_one, self.alpha_bar, tuning, number) for of_one in views]
        t, x, noise = (torch.cat(part) for part in zip(*samples, strict=True))
        chosen = ids.rows(torch.tensor([number % len(ids.at)]).expand(len(views)))
        soft, hard, pooled = self.texts(chosen, now, tuning.blend)
        rows, condition = ConceptRows(now.offsets, hard, tuning.blend), Condition(soft, pooled, self._side(len(x)))
        e = self.shared.predict(x, t, condition, concept=rows)
        return (e.float() - noise).square().mean((1, 2, 3))

    def _step(
        self,
        leaves: _Leaves,
        concepts: Concepts,
        views: Tensor,
        ids: PromptIds,
        words: Sequence[Dictionary],
        tuning: Tuning,
        step: int,
    ) -> None:
        leaves.optimiser.zero_grad(set_to_none=True)
        for number in range(step * tuning.batch, (step + 1) * tuning.batch):
            now = leaves.concepts(concepts, detached=False)
            with torch.enable_grad():
                values = self._losses(now, views, ids, tuning, number) / tuning.batch
                if not bool(values.detach().isfinite().all()):
                    raise RuntimeError(f"the loss of step {step + 1} is not finite: lower the rates ({tuning})")
                values.sum().backward()
        with torch.enable_grad():
            pulls = [word_pull(*three, tuning) for three in zip(leaves.l, leaves.g, words, strict=True)]
            torch.stack(pulls).sum().backward()
        leaves.optimiser.step()

    def texts(self, ids: PromptIds, concepts: Concepts, blend: float) -> tuple[Tensor, Tensor | None, Tensor]:
        """Soft context, hard context and pooled text of prompts with a concept each, as `encode_concept_prompts` has
        them for one; no hard context where blend is 1, and nothing reads it."""
        text = self.frozen.text
        soft, pooled = encode_soft(text, ids, concepts.word_l, concepts.word_g)
        if blend == 1:
            return soft, None, pooled
        with torch.no_grad():
            hard, hard_pooled = encode_hard(text, ids, concepts.word_ids)
        return soft, hard, blend * pooled + (1 - blend) * hard_pooled if blend else hard_pooled

    @torch.no_grad()
    def draw(
        self, concepts: Concepts, noise: Tensor, blend: float, asked: Sequence[Asked] = PROMPTS, steps: int = STEPS
    ) -> Tensor:
        """Latents [n, prompts, 4, h, w] of each concept under each prompt, as `ConceptPipeline` draws one alone: DDIM,
        guidance at CFG against zeros, the concept in the rows of both. noise: [n, prompts, 4, h, w]."""
        n, p = noise.shape[:2]
        each = concepts.rows(torch.arange(n).repeat_interleave(p))
        soft, hard, pooled = self.texts(prompt_ids(self.frozen.text, [a.text for a in asked] * n), each, blend)
        twice = {name: (torch.cat([a, a]), torch.cat([b, b])) for name, (a, b) in each.offsets.items()}
        both_hard = None if hard is None else torch.cat([torch.zeros_like(hard), hard])
        rows = ConceptRows(twice, both_hard, blend)
        context, added = (torch.cat([torch.zeros_like(text), text]) for text in (soft, pooled))
        condition = Condition(context, added, self._side(2 * n * p))

        def predict(x: Tensor, t: Tensor) -> Tensor:
            def each_of(names: Sequence[str]) -> Sequence[Tensor]:  # uncond and text
                assert len(names) == 2
                return self.shared.predict(torch.cat([x, x]), torch.cat([t, t]), condition, concept=rows).chunk(2)

            return guided(each_of, Scales(CFG, 0.0, 0.0))

        return sample_ddim(predict, noise.flatten(0, 1), ddim_timesteps(steps), self.alpha_bar).unflatten(0, (n, p))

    @torch.no_grad()
    def pictures(self, latents: Tensor) -> Tensor:
        """Latents [..., 4, h, w] as pictures [..., 3, H, W] in [0, 1]."""
        vae, shape = self.frozen.vae, latents.shape[:-3]
        decoded = vae.decode(latents.flatten(0, -4) / vae.config.scaling_factor).sample
        return (decoded / 2 + 0.5).clamp(0, 1).unflatten(0, shape)

    @staticmethod
    def _side(n: int) -> Tensor:
        return torch.tensor([[IMAGE_SIZE, IMAGE_SIZE, 0, 0, IMAGE_SIZE, IMAGE_SIZE]], dtype=torch.float32).expand(n, 6)


class _Leaves:
    """The numbers of some concepts that a tuning changes, and their optimiser."""

    def __init__(self, concepts: Concepts, tuning: Tuning):
        def leaf(tensor: Tensor) -> Tensor:
            return tensor.detach().float().clone().requires_grad_()

        # A word has a rate of its own, by its size, and so is a tensor of its own.
        self.l, self.g = ([leaf(word) for word in words] for words in (concepts.word_l, concepts.word_g))
        self.offsets = {name: (leaf(a), leaf(b)) for name, (a, b) in concepts.offsets.items()}
        groups = [{"params": [m for pair in self.offsets.values() for m in pair], "lr": tuning.offset_rate}]
        for word in (*self.l, *self.g):
            groups.append({"params": [word], "lr": tuning.word_rate * float(word.detach().norm()) / len(word) ** 0.5})
        self.optimiser = torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)

    def concepts(self, like: Concepts, detached: bool = True) -> Concepts:
        """What they are now."""
        word_l, word_g, offsets = torch.stack(self.l), torch.stack(self.g), self.offsets
        if detached:
            word_l, word_g = word_l.detach(), word_g.detach()
            offsets = {name: (a.detach().clone(), b.detach().clone()) for name, (a, b) in offsets.items()}
        return like._replace(word_l=word_l, word_g=word_g, offsets=offsets)

    def save(self, path: Path, step: int) -> None:
        """Keep all that going on needs."""
        path.parent.mkdir(parents=True, exist_ok=True)
        values = [m.detach() for group in self.optimiser.param_groups for m in group["params"]]
        with atomic(path) as part:
            torch.save({"step": step, "values": values, "optimiser": self.optimiser.state_dict()}, part)

    def resume(self, path: Path | None, wanted: int) -> int:
        """Go on from what was saved, unless it is already beyond `wanted`; returns the number of steps done."""
        if path is None or not path.exists():
            return 0
        saved = torch.load(path, weights_only=True)
        if saved["step"] > wanted:
            return 0
        parameters = [m for group in self.optimiser.param_groups for m in group["params"]]
        for parameter, value in zip(parameters, saved["values"], strict=True):
            parameter.data.copy_(value)
        self.optimiser.load_state_dict(saved["optimiser"])
        return int(saved["step"])


# --- the cache


@cache
def code() -> str:
    """A hash of the code that tunes and draws, without its comments and docstrings."""
    digest = hashlib.sha256()
    for name in SOURCES:
        digest.update(without_words((ROOT / name).read_text(encoding="utf-8")).encode())
    return digest.hexdigest()


@cache
def base_key(base: Path) -> str:
    """A hash of the base's weights and of the image encoder beside them."""
    return f"{sha256(base / CHECKPOINT)} {sha256(base / CLIP_VISION)}"


def _place(*parts: object) -> Path:
    name = hashlib.sha256(repr((code(), *parts)).encode()).hexdigest()[:32]
    return STORE / name[:2] / name


@dataclass(frozen=True)
class TunedConcepts:
    """Concepts of one beginning, tuned in one way, for some number of steps. tuning.steps is not read."""

    start: Start
    tuning: Tuning
    step: int

    def place(self, base: Path, chunk: ConceptChunk) -> Path:
        """The file of a chunk's concepts."""
        return _place(*self._key(base, chunk), self.step).with_suffix(".concepts.safetensors")

    def state(self, base: Path, chunk: ConceptChunk) -> Path:
        """The file of a tuning that is under way."""
        return _place(*self._key(base, chunk)).with_suffix(".state")

    def _key(self, base: Path, chunk: ConceptChunk) -> tuple[object, ...]:
        # What nothing is tuned by does not count
        settings = sorted(asdict(replace(self.tuning, steps=0)).items()) if self.step else ()
        return "tuned", base_key(base), self.start.key, settings, chunk


@dataclass(frozen=True)
class DrawnConcepts:
    """Pictures of tuned concepts at a blend."""

    tuned: TunedConcepts
    blend: float

    def place(self, base: Path, chunk: ConceptChunk) -> Path:
        """The file of a chunk's pictures."""
        name = self.tuned.place(base, chunk).name
        return _place("drawn", name, self.blend, STEPS, CFG, PROMPTS).with_suffix(".pictures.safetensors")

    def pictures(self, base: Path, chunk: ConceptChunk) -> Tensor:
        """The pictures that were drawn of a chunk, [n, prompts, 3, H, W] in [0, 1]."""
        return read_tensors(self.place(base, chunk))[0]["pictures"].float() / 255


def make_tuned(maker: Maker, base: Path, tuned: Sequence[TunedConcepts], chunk: ConceptChunk) -> None:
    """Tune a chunk as far as each of `tuned` says, which differ in their steps alone; what is there stays."""
    missing = {one.step: one for one in tuned if not one.place(base, chunk).exists()}
    if not missing:
        return
    longest = missing[max(missing)]
    begun = longest.start.make(maker.frozen, chunk)
    templates = begun[0].about.get("templates", "\n".join(TEMPLATES)).split("\n")
    steps, state = sorted(missing), longest.state(base, chunk)
    made = maker.tune(Concepts.stacked(begun, longest.tuning), chunk.pictures, longest.tuning, steps, state, templates)
    for step, concepts in made:
        place = missing[step].place(base, chunk)
        place.parent.mkdir(parents=True, exist_ok=True)
        concepts.write(place)


def make_drawn(maker: Maker, base: Path, drawn: DrawnConcepts, chunk: ConceptChunk) -> None:
    """Draw a chunk of concepts that were tuned before, unless it is there."""
    place = drawn.place(base, chunk)
    if place.exists():
        return
    concepts, noise, pictures = Concepts.read(drawn.tuned.place(base, chunk)), chunk.noise(), []
    for index in torch.arange(len(chunk)).split(TOGETHER):
        latents = maker.draw(concepts.rows(index), noise[index], drawn.blend, steps=STEPS)
        pictures.append((maker.pictures(latents) * 255).round().byte())
    place.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(place, {"pictures": torch.cat(pictures)}, {})
