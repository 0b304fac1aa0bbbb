"""What is compared: a class a kind of method, each of which says how a back end draws it.

A new kind is a subclass of `Method` in a module of its own and its name in METHODS. It puts itself into the host's
graph (`on_host`) or into the diffusers pipeline (`in_diffusers`); a back end that it leaves out does not draw it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from PIL import Image
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from ...lookahead.files import encoder_file, noise_guide_file
from ...lookahead.files.tensors import EncoderFileError
from ...lookahead.method.guidance_presets import ITERATION, OFF, PRESETS, GuidanceSettings, best_of_as_many
from ...lookahead.method.latent_optimisation import Optimisation
from ...trainer.config import Count, Section
from .library import EvaluationError, Library, digest_of
from .scenes import DIFFUSERS, HOST, Desk, DiffusersScene, Drawn, HostScene, PictureJob

TUNING_BATCH = 8  # noise levels of a tuning step, of the node
MethodWeight = Annotated[float, Field(ge=-1, le=5)]


NUMBERS = frozenset({"start", "iterations", "step_size"})  # of guidance, which a preset stands in the place of
YOUNGER = ("preset", "best_of", "noise_guide")  # fields of guidance that pictures drawn long ago do not know


class PictureWork(NamedTuple):
    """The work of a picture: forward passes of the UNet, a row each, and of the decoder; backward counts as two."""

    unet: float
    decoder: float


class GuidanceOption(Section):
    """Lookahead guidance (or by plain x0) towards the person of the reference, on top of a method."""

    kind: Literal["lookahead", "x0"] = "lookahead"
    start: Annotated[float, Field(ge=0, le=1)] = 0.12
    iterations: Count | None = Field(None, description="by default the node's")
    step_size: Annotated[float, Field(gt=0)] | None = Field(None, description="by default the node's")
    preset: str | None = Field(None, description="of the node, in the place of all these numbers")
    best_of: Count | str | None = Field(
        None,
        description="look at so many noises, or as many as take the evaluations of this preset, and draw the best of "
        "them, in the place of all these numbers",
    )
    noise_guide: str | None = Field(
        None,
        description="file of a noise guide (`lookahead guide train`), which moves the noise before the iterations of a "
        "preset or of these numbers, or alone",
    )

    @model_validator(mode="after")
    def _one_way(self) -> GuidanceOption:
        names = [self.preset, self.best_of if isinstance(self.best_of, str) else None]
        for name in names:
            if name is not None and name not in PRESETS:
                raise ValueError(f"there is no preset {name!r}: use one of {', '.join(PRESETS)}")
        numbers = self.model_fields_set & NUMBERS
        if (self.preset is not None) + (self.best_of is not None) + bool(numbers) > 1:
            raise ValueError("a preset, best_of and numbers exclude each other: give one of them")
        if self.noise_guide is not None and self.best_of is not None:
            raise ValueError(
                "best_of is what guidance is compared with, and a noise guide is guidance: give one of them"
            )
        return self

    @model_serializer(mode="wrap")
    def _as_before(self, values: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leaves out what is younger than the others and not given, so that pictures drawn before are found."""
        return {k: v for k, v in values(self).items() if v is not None or k not in YOUNGER}

    @property
    def guide_alone(self) -> bool:
        """Says whether nothing but a noise guide acts."""
        numbers = self.model_fields_set & NUMBERS
        return self.noise_guide is not None and self.preset in (None, OFF) and not numbers

    def inputs(self, steps: int) -> dict[str, Any]:
        """The values of the sampler node that are not its defaults, in a run of so many steps."""
        if self.guide_alone:  # it acts where it was trained to
            return {"preset": OFF}
        if self.preset is not None:
            return {"preset": self.preset}
        if self.best_of is not None:
            return {"start": 0.0, "iterations": 0, "best_of": self.settings(steps).best_of}
        chosen = {"start": self.start, "iterations": self.iterations, "step_size": self.step_size}
        return {name: value for name, value in chosen.items() if value is not None}

    def settings(self, steps: int) -> GuidanceSettings:
        """Says what these inputs mean, with a guide in the place of `lean`, which takes as much."""
        without = self._settings(steps)
        without = without.without_chance() if self.kind == "x0" else without
        return without if self.noise_guide is None else replace(without, lean=1.0)

    def _settings(self, steps: int) -> GuidanceSettings:
        if self.guide_alone:
            return PRESETS[OFF]
        if self.preset is not None:
            return PRESETS[self.preset]
        if isinstance(self.best_of, str):
            preset = PRESETS[self.best_of]
            preset = preset.without_chance() if self.kind == "x0" else preset
            return best_of_as_many(preset, ITERATION[self.kind], steps)
        if self.best_of is not None:
            return GuidanceSettings(Optimisation(0), start=0.0, best_of=self.best_of)
        own = Optimisation()
        optimisation = Optimisation(self.iterations or own.iterations, self.step_size or own.step_size)
        return GuidanceSettings(optimisation, self.start)

    def work(self, steps: int) -> PictureWork:
        """Counts the work of the guidance of a picture; backward counts as two."""
        settings = self.settings(steps)
        through = replace(settings, optimisation=replace(settings.optimisation, backward=True))
        return PictureWork(*(each.evaluations(3.0, steps) for each in (settings, through)))


class Method(Section):
    """One entry of `methods`; each of its weights is an arm."""

    kind: ClassVar[str]
    LATE: ClassVar[bool] = False  # drawn after the others, whose pictures or times it needs
    PERSONAL: ClassVar[bool] = True  # whether it sees the reference without guidance
    GUIDED: ClassVar[bool] = True  # whether guidance can act on top of it
    title: str | None = Field(None, description="its name in tables, by default its key")
    weights: tuple[MethodWeight, ...] = Field((1.0,), min_length=1, description="each is an arm, all are one curve")
    guidance: GuidanceOption | None = None

    def files(self, library: Library) -> dict[str, Path]:
        """The files of its own, by the host's folder of models that each belongs into."""
        return {}

    def noise_guide(self, library: Library) -> Path | None:
        """The noise guide of its guidance, where it has one."""
        name = self.guidance.noise_guide if self.guidance else None
        return None if name is None else library.find("guidance.noise_guide", name)

    def in_host(self, library: Library) -> list[tuple[str, Path]]:
        """All files that a host needs for it, each with the folder of models that it belongs into."""
        guide = self.noise_guide(library)
        return [*self.files(library).items(), *([("lookahead", guide)] if guide else [])]

    def check_files(self, library: Library) -> None:
        """Raise EvaluationError, one sentence, where a file is not there, or its noise guide is none or would act where
        it was not trained to."""
        self.files(library)
        path = self.noise_guide(library)
        if path is None or self.guidance is None:
            return
        try:
            file = noise_guide_file.read(path)
        except EncoderFileError as error:
            raise EvaluationError(f"guidance.noise_guide: {error}") from None
        start = self.guidance.settings(1).start
        if not (self.guidance.guide_alone or file.start <= start <= file.end):
            raise EvaluationError(
                f"guidance begins at {start:g} of the sampling, and the noise guide {path.name} was trained to act "
                f"from {file.start:g} to {file.end:g}: set guidance.start to {file.start:g}, or leave preset and "
                "numbers out, where the guide alone is meant."
            )

    def check_others(self, others: Mapping[str, Method]) -> None:
        """Raise EvaluationError, one sentence, where it does not fit to the other methods, or takes no guidance.

        others: all methods, by name; the related ones are among them.
        """
        if self.guidance and not self.GUIDED:
            raise EvaluationError(
                f"guidance cannot be put on top of a method of kind {self.kind!r}: put it into the workflow, or onto "
                "the method whose pictures are chosen from."
            )

    def digest(self, library: Library, steps: int) -> str:
        """Tells what its pictures depend on, in a run of so many steps: its settings and the contents of its files, not
        their names."""
        without: dict[str, Any] = {"title": True, "weights": True, "file": True, "guidance": {"noise_guide": True}}
        settings = self.model_dump(mode="json", exclude=without)
        preset = PRESETS.get(str(self.guidance.preset or self.guidance.best_of)) if self.guidance else None
        # How many noises a preset's evaluations look at changes with how these are reckoned.
        named = self.guidance is not None and isinstance(self.guidance.best_of, str)
        reckoned = self.guidance.settings(steps).best_of if self.guidance and named else None
        guide = self.noise_guide(library)
        return repr(
            (
                self.kind,
                settings,
                {k: digest_of(p) for k, p in sorted(self.files(library).items())},
                *([] if preset is None else [preset]),
                *([] if reckoned is None else [reckoned]),
                *([] if guide is None or self.guidance is None else [digest_of(guide), self.guidance.guide_alone]),
            )
        )

    def sees_reference(self) -> bool:
        """Says whether its pictures depend on the reference."""
        return self.PERSONAL or self.guidance is not None

    def same_noise(self, steps: int) -> bool:
        """Says whether its picture begins from the noise that all others begin from, and from none that was chosen."""
        return self.guidance is None or self.guidance.settings(steps).best_of < 2

    def related(self) -> tuple[str, ...]:
        """Names the other methods that it needs."""
        return ()

    def drawn_by(self) -> tuple[str, ...]:
        """The back ends that draw it."""
        return (HOST,) if self.guidance else (HOST, DIFFUSERS)

    def check_backends(self, backends: Sequence[str]) -> None:
        """Raise EvaluationError, one sentence, where it asks for what none of these back ends does."""
        if self.guidance and self.guidance.noise_guide is not None and HOST not in backends:
            raise EvaluationError(
                f"guidance has a noise guide, and {' and '.join(backends)} does not guide: name {HOST} in backends, or "
                "leave guidance out."
            )

    def loss_recognisers(self, library: Library, pack: Path | None) -> list[str]:
        """Names and hashes of recognisers that it was trained or is steered by, which cannot judge it."""
        steering = [digest_of(p) for p in sorted(pack.glob("*.onnx"))] if pack and self.guidance else []
        guide = self.noise_guide(library)
        trained = None if guide is None else noise_guide_file.read(guide).metadata.get("recogniser")
        return [*steering, *([trained] if trained else [])]

    def make(self, desk: Desk, job: PictureJob, weight: float) -> Drawn:
        """Draws a picture, by the desk's back end."""
        return desk.drawn(self, job, weight)

    def on_host(self, scene: HostScene, weight: float) -> str:
        """Put nodes into the host's graph; returns the id of the node whose picture counts."""
        self.condition(scene, weight)
        if self.guidance:
            guide = self.noise_guide(scene.library)
            scene.guide(self.guidance.kind == "x0", self.guidance.inputs(scene.drawing.steps), guide)
        return scene.finish()

    def condition(self, scene: HostScene, weight: float) -> None:
        """Put in what conditions the picture on the reference."""

    def in_diffusers(self, scene: DiffusersScene, weight: float) -> Image.Image:
        """Draws a picture with the diffusers pipeline."""
        return scene.draw(None)

    def work(self, steps: int, others: Mapping[str, PictureWork]) -> PictureWork:
        """Counts the work of a picture; where files are not there, at most. others: that of related methods."""
        guided = self.guidance.work(steps) if self.guidance else PictureWork(0.0, 0.0)
        return PictureWork(2.0 * steps + guided.unet, 1 + guided.decoder)


class Nothing(Method):
    """The base model under the prompt alone."""

    kind = "none"
    PERSONAL = False


class KVScales(Section):
    """The scales of the guidance with KV injection, which share the protocol's: by default 3, 2, 2 of 5."""

    text: float = 0.6
    full: float = 0.4
    kv: float = 0.4

    def of(self, guidance: float) -> tuple[float, float, float]:
        """The scales where the plain guidance is this."""
        text, full, kv = (round(share * guidance, 6) for share in (self.text, self.full, self.kv))
        return text, full, kv


class EncoderMethod(Method):
    """An encoder file, or a stock IP-Adapter Plus; the weights are those of its image prompt."""

    kind = "encoder"
    file: str
    kv: bool | None = Field(None, description="KV injection; by default where the file has a KV encoder")
    kv_weight: Annotated[float, Field(ge=0, le=1)] = 1.0
    kv_end: Annotated[float, Field(ge=0, le=1)] = Field(
        1.0, description="share of the sampling after which KV injection ends; the node's own is 0.4"
    )
    scales: KVScales = Field(KVScales(), description="text, full and kv as shares of drawing.guidance, with KV alone")

    @model_serializer(mode="wrap")
    def _as_before(self, values: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leaves out what is younger than the others and not given, so that pictures drawn before are found."""
        return {k: v for k, v in values(self).items() if k != "kv_end" or v != 1}

    def files(self, library: Library) -> dict[str, Path]:
        return {"lookahead": library.find("file", self.file)}

    def loss_recognisers(self, library: Library, pack: Path | None) -> list[str]:
        names = encoder_file.read(self.files(library)["lookahead"]).metadata.get("recogniser")
        return super().loss_recognisers(library, pack) + ([names] if names else [])

    def with_kv(self, library: Library) -> bool:
        """Says whether KV injection acts."""
        return _has_kv(self.files(library)["lookahead"]) if self.kv is None else self.kv

    def condition(self, scene: HostScene, weight: float) -> None:
        kv = self.with_kv(scene.library)
        scene.read_reference(self.files(scene.library)["lookahead"], kv)
        scene.image_prompt(weight)
        if kv:
            scene.inject(self.kv_weight, self.kv_end, self.scales.of(scene.drawing.guidance))

    def in_diffusers(self, scene: DiffusersScene, weight: float) -> Image.Image:
        scene.load(self.files(scene.library)["lookahead"])
        if self.with_kv(scene.library):
            return scene.draw(self.scales.of(scene.drawing.guidance), weight, use_kv=True)
        return scene.draw(None, weight, reference=True)

    def drawn_by(self) -> tuple[str, ...]:
        # The pipeline has neither weight nor end of KV.
        return super().drawn_by() if self.kv_weight == self.kv_end == 1 else (HOST,)

    def check_backends(self, backends: Sequence[str]) -> None:
        super().check_backends(backends)
        if self.kv_end != 1 and HOST not in backends:
            raise EvaluationError(
                f"kv_end is {self.kv_end:g}, and {' and '.join(backends)} injects KV up to the last step: name "
                f"{HOST} in backends, or leave kv_end out."
            )

    def work(self, steps: int, others: Mapping[str, PictureWork]) -> PictureWork:
        rows, decodes = super().work(steps, others)
        injected = 0 if self.kv is False else math.ceil(self.kv_end * steps)
        return PictureWork(rows + 4.0 * injected, decodes)


@functools.lru_cache(maxsize=64)
def _has_kv(path: Path) -> bool:
    return bool(encoder_file.read(path).kv)


class ConceptMethod(Method):
    """A concept (arXiv 2307.06925): one pass of a concept encoder over the reference, and some tuning steps.

    The weights are the strengths of its offsets. Predicted and tuned once for a person, in the time of the first of its
    pictures.
    """

    kind = "concept"
    weights: tuple[Annotated[float, Field(ge=0, le=3)], ...] = Field((1.0,), min_length=1, description="strengths")
    file: str = Field(description="concept encoder")
    steps: Annotated[int, Field(ge=0, le=100)] = Field(12, description="tuning steps")
    noun: str = Field("face", description="word of the prompts that the concept takes the place of")
    blend: Annotated[float, Field(ge=0, le=1)] | None = Field(None, description="by default the concept's own")

    def files(self, library: Library) -> dict[str, Path]:
        return {"lookahead": library.find("file", self.file)}

    def drawn_by(self) -> tuple[str, ...]:
        return (HOST,)

    def condition(self, scene: HostScene, weight: float) -> None:
        scene.concept(self.files(scene.library)["lookahead"], self.noun, self.steps, weight, self.blend)

    def work(self, steps: int, others: Mapping[str, PictureWork]) -> PictureWork:
        rows, decodes = super().work(steps, others)
        tuned = 3.0 * TUNING_BATCH * self.steps  # of each picture, as if it were the only one of its person
        return PictureWork(rows + tuned, decodes)


class WorkflowMethod(Method):
    """Any workflow file, in which one LoadImage, one prompt and one seed are named, or are the only ones.

    Each is named by a node's title, class or id, with ".input" after it where the input has another name than usual.
    """

    kind = "workflow"
    GUIDED = False
    file: str
    reference: str = Field("LoadImage", description="node that loads the reference")
    prompt: str | None = Field(None, description="node with the text; by default that of the title Prompt or Positive")
    seed: str | None = Field(None, description="node with the seed; by default the only one that has one")
    weight: str | None = Field(None, description="node.input that the weights are written to")
    picture: str | None = Field(None, description="node that saves the picture; by default the only SaveImage")
    set: dict[str, Any] = Field({}, description="further values, by node.input")

    def files(self, library: Library) -> dict[str, Path]:
        return {"": library.find("file", self.file)}

    def drawn_by(self) -> tuple[str, ...]:
        return (HOST,)

    def on_host(self, scene: HostScene, weight: float) -> str:
        if self.weight is None and len(self.weights) > 1:
            raise EvaluationError(
                f"The workflow {self.file} has several weights, and nothing says where they go: set `weight` to "
                "node.input."
            )
        values = dict(self.set) | ({self.weight: weight} if self.weight else {})
        return scene.workflow(
            self.files(scene.library)[""], self.reference, self.prompt, self.seed, self.picture, values
        )


class BestOf(Method):
    """The best of several pictures of another method, chosen by a recogniser that is not the judge.

    As many as fit into the time of one picture of `same_time_as`, or as many as `pictures` says.
    """

    kind = "best of"
    LATE = True
    GUIDED = False
    of: str
    pictures: Count | None = None
    same_time_as: str | None = None
    by: dict[str, Any] = Field(description="a measure, as in `measures`")

    def loss_recognisers(self, library: Library, pack: Path | None) -> list[str]:
        name = self.by.get("recogniser")
        if name is None or name in library.embedders:
            return [] if name is None else [library.embedder(name, None).digest]
        return [digest_of(library.find("by.recogniser", name))]

    def same_noise(self, steps: int) -> bool:
        return False

    def related(self) -> tuple[str, ...]:
        return (self.of, *([self.same_time_as] if self.same_time_as else []))

    def check_others(self, others: Mapping[str, Method]) -> None:
        super().check_others(others)
        if (self.pictures is None) == (self.same_time_as is None):
            raise EvaluationError("A method of kind `best of` takes one of pictures and same_time_as: give one.")
        if missing := [weight for weight in self.weights if weight not in others[self.of].weights]:
            drawn = ", ".join(f"{weight:g}" for weight in others[self.of].weights)
            raise EvaluationError(
                f"weights has {missing[0]:g}, at which {self.of} is not drawn: give some of its own, {drawn}."
            )

    def make(self, desk: Desk, job: PictureJob, weight: float) -> Drawn:
        count = self.pictures or desk.count_in_the_time_of(self.of, self.same_time_as or "", weight)
        drawn = [desk.picture(self.of, job.again(n), weight) for n in range(count)]
        scores = [desk.score(self.by, one, job) for one in drawn]
        best = max(range(count), key=lambda n: scores[n])
        with Image.open(drawn[best].path) as image:
            memory = max((one.memory for one in drawn if one.memory is not None), default=None)
            return Drawn(image.convert("RGB"), sum(one.seconds for one in drawn), memory)

    def work(self, steps: int, others: Mapping[str, PictureWork]) -> PictureWork:
        if self.same_time_as:
            return others[self.same_time_as]
        rows, decodes = others[self.of]
        return PictureWork(rows * (self.pictures or 1), decodes * (self.pictures or 1))


METHODS: Mapping[str, type[Method]] = {
    k.kind: k for k in (Nothing, EncoderMethod, ConceptMethod, WorkflowMethod, BestOf)
}
