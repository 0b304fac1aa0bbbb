"""What a method is drawn into: the host's graph of one picture, and the pipeline of diffusers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

from PIL import Image

from ...host import workflow
from ...host.graph import Graph, Link
from ...lookahead.method.concept_input import PLACEHOLDER
from ...tools.common import Problem
from .library import EvaluationError, Library
from .people import ReferencePerson
from .sections import DrawingOptions, Prompt

HOST, DIFFUSERS = "host", "diffusers"
THROUGHOUT = {"start": 0.0, "end": 1.0}  # in all of the sampling, as in the pipeline, whatever the nodes begin with


@dataclass(frozen=True)
class PictureJob:
    """One picture of a method: who, under which prompt, with which noise. attempt: of several with other noise."""

    person: ReferencePerson
    prompt: Prompt
    seed: int
    attempt: int = 0

    @property
    def noise_seed(self) -> int:
        """The seed that a back end draws noise with."""
        return (self.person.noise_seed(self.seed) + 7919 * self.attempt) % 2**31

    def again(self, attempt: int) -> PictureJob:
        """Gives the same with other noise."""
        return replace(self, attempt=attempt)


class Drawn(NamedTuple):
    """A drawn picture, the seconds that it took, and the peak of memory meanwhile in bytes, where that is known."""

    image: Image.Image
    seconds: float
    memory: int | None = None


class KeptPicture(NamedTuple):
    """A picture that is kept: its content key, its file, and what `Drawn` says of it."""

    key: str
    path: Path
    seconds: float
    memory: int | None = None


class Drawable(Protocol):
    """Draws itself into a scene: a method, as a back end sees it."""

    kind: ClassVar[str]

    def on_host(self, scene: HostScene, weight: float) -> str:
        """Put nodes into the host's graph; returns the id of the node whose picture counts."""
        ...

    def in_diffusers(self, scene: DiffusersScene, weight: float) -> Image.Image:
        """Draw a picture with the diffusers pipeline."""
        ...


class Desk(Protocol):
    """Gives methods that need others their pictures, times and scores."""

    def drawn(self, method: Drawable, job: PictureJob, weight: float) -> Drawn:
        """Draw a picture by the back end."""
        ...

    def picture(self, method: str, job: PictureJob, weight: float) -> KeptPicture:
        """A picture of another method, drawn once."""
        ...

    def score(self, by: Mapping[str, Any], picture: KeptPicture, job: PictureJob) -> float:
        """Score by a measure that is described as in `measures`; what it cannot judge comes last."""
        ...

    def count_in_the_time_of(self, method: str, other: str, weight: float) -> int:
        """Counts how many pictures of one method fit into the time of one of another."""
        ...


class DiffusersScene(Protocol):
    """The pipeline of diffusers for one picture."""

    library: Library
    drawing: DrawingOptions

    def load(self, encoder: Path) -> None:
        """Have this encoder file in the UNet."""
        ...

    def draw(
        self,
        scales: tuple[float, float, float] | None,
        weight: float = 1.0,
        use_kv: bool = False,
        reference: bool = False,
    ) -> Image.Image:
        """Draw with three scales, or plainly guided (None); reference: whether the person's picture is read."""
        ...


@dataclass(frozen=True)
class HostNames:
    """Names under which the host knows the models."""

    checkpoint: str
    image_encoder: str | None
    few_step: str | None
    pack: str | None
    files: Mapping[Path, str]


class HostScene:
    """The graph of one picture, while a method puts itself into it. `model`, `guider` and `sampler` are what will draw.

    info: the host's answer to GET /object_info; reference: the uploaded picture's name.
    """

    def __init__(
        self,
        job: PictureJob,
        drawing: DrawingOptions,
        library: Library,
        names: HostNames,
        info: Mapping[str, Any],
        reference: str,
    ):
        self.job, self.drawing, self.library, self.names, self.info = job, drawing, library, names, info
        self.picture = reference
        self.nodes = Graph()
        self.reference: Link | None = None
        self.guider: Link | None = None
        self._positive: Link | None = None
        self._base: Link | None = None
        self._sampler: Link | None = None

    def add(self, name: str, class_type: str, **inputs: Any) -> Link:
        """A node more; the link of its first output. Inputs that are left out have their defaults in the end."""
        return self.nodes.add(name, class_type, **inputs)

    @property
    def base(self) -> Link:
        """The base model, before anything was put on it."""
        if self._base is None:
            self._base = self.add("base", "CheckpointLoaderSimple", ckpt_name=self.names.checkpoint)
            self.model = self._base
        return self._base

    @property
    def clip(self) -> Link:
        """The text encoders."""
        return [self.base[0], 1]

    @property
    def vae(self) -> Link:
        """The autoencoder."""
        return [self.base[0], 2]

    @property
    def image(self) -> Link:
        """The reference picture."""
        return self.add("reference picture", "LoadImage", image=self.picture)

    def text(self, name: str, text: str) -> Link:
        """An encoded prompt."""
        return self.add(name, "CLIPTextEncode", clip=self.clip, text=text)

    def read_reference(self, encoder: Path, kv: bool) -> None:
        """Encode the reference with an encoder file; kv: for KV injection too."""
        if self.names.image_encoder is None:
            raise EvaluationError("An encoder file reads the reference with CLIP ViT-H/14: set models.image_encoder.")
        loaded = self.add("encoder", "LookaheadLoadEncoder", encoder_name=self.names.files[encoder])
        vision = self.add("vision", "CLIPVisionLoader", clip_name=self.names.image_encoder)
        more: dict[str, Any] = {"vae": self.vae, "clip": self.clip} if kv else {}
        more["size"] = self.drawing.size if kv else 0
        self.reference = self.add(
            "reference", "LookaheadEncodeReference", encoder=loaded, clip_vision=vision, image=self.image, **more
        )

    def image_prompt(self, weight: float) -> None:
        """Apply the reference's image prompt."""
        link = {"model": self._model(), "reference": self.reference, "weight": weight, **THROUGHOUT}
        self.model = self.add("image prompt", "LookaheadApplyImagePrompt", **link)

    def concept(self, encoder: Path, noun: str, steps: int, strength: float, blend: float | None) -> None:
        """Make a concept of the reference, which takes the place of `noun` in the prompt, and apply it."""
        if self.names.image_encoder is None:
            raise EvaluationError("A concept encoder reads the picture with CLIP ViT-H/14: set models.image_encoder.")
        text, places = re.subn(rf"\b{re.escape(noun)}\b", PLACEHOLDER, self.job.prompt.text)
        if places != 1:
            raise EvaluationError(
                f"The prompt {self.job.prompt.text!r} has {noun!r} {places} times, and a concept takes the place of "
                "one: name in `noun` a word that each prompt has once."
            )
        models = {"model": self.base, "clip": self.clip, "vae": self.vae, "image": self.image}
        loaded = self.add("concept encoder", "LookaheadLoadConceptEncoder", encoder_name=self.names.files[encoder])
        vision = self.add("vision", "CLIPVisionLoader", clip_name=self.names.image_encoder)
        made = self.add("concept", "LookaheadPredictConcept", concept_encoder=loaded, clip_vision=vision, **models)
        if steps:
            made = self.add("tuned concept", "LookaheadTuneConcept", concept=made, steps=steps, seed=0, **models)
        self._positive = self.add(
            "concept prompt", "LookaheadEncodeConceptPrompt", clip=self.clip, concept=made, text=text
        )
        share = {} if blend is None else {"blend": blend}
        link = {"model": self._model(), "concept": made, "strength": strength, **share}
        self.model = self.add("apply concept", "LookaheadApplyConcept", **link)

    def inject(self, weight: float, end: float, scales: tuple[float, float, float]) -> None:
        """Inject the reference's keys and values up to a share of the sampling, guided with three scales."""
        link = {"model": self._model(), "reference": self.reference, "weight": weight, **THROUGHOUT, "end": end}
        self.model = self.add("KV", "LookaheadApplyKVInjection", **link)
        text, full, kv = scales
        self.guider = self.add(
            "guider",
            "LookaheadGuider",
            model=self.model,
            positive=self.text("positive", self.job.prompt.text),
            negative=self.text("negative", self.drawing.negative),
            text=text,
            full=full,
            kv=kv,
        )

    def guide(self, x0: bool, settings: Mapping[str, Any], noise_guide: Path | None = None) -> None:
        """Steer the sampling towards the person of the reference; x0: by the base's own prediction."""
        if self.names.pack is None:
            raise EvaluationError("Guidance finds and recognises faces: set models.pack to an insightface pack.")
        model = self.base
        if not x0:
            if self.names.few_step is None:
                raise EvaluationError("Guidance by lookahead previews with a few-step LoRA: set models.few_step.")
            model = self.add(
                "few steps",
                "LoraLoaderModelOnly",
                model=self.base,
                lora_name=self.names.few_step,
                strength_model=1.0,
            )
        kind = "plain x0" if x0 else "one-step"
        shortcut = self.add("shortcut", "LookaheadShortcut", model=model, vae=self.vae, kind=kind)
        faces = self.add("faces", "LookaheadLoadFaceAnalysis", pack_name=self.names.pack, device="cpu")
        loss = self.add("loss", "LookaheadIdentityLoss", face_analysis=faces, image=self.image)
        more: dict[str, Any] = dict(settings)
        if noise_guide is not None:
            name = self.names.files[noise_guide]
            more["noise_guide"] = self.add("noise guide", "LookaheadLoadNoiseGuide", guide_name=name)
        self._sampler = self.add(
            "guidance", "LookaheadGuidanceSampler", sampler=self.sampler, shortcut=shortcut, loss=loss, **more
        )

    @property
    def sampler(self) -> Link:
        """The sampler, as it is up to here."""
        return self._sampler or self.add("sampler", "KSamplerSelect", sampler_name=self.drawing.sampler)

    def _model(self) -> Link:
        return self.model if self._base is not None else self.base

    def finish(self) -> str:
        """Put in what draws, under the same noise for all methods; returns the id of the node with the picture."""
        drawing = self.drawing
        guider = self.guider or self.add(
            "guider",
            "CFGGuider",
            model=self._model(),
            positive=self._positive or self.text("positive", self.job.prompt.text),
            negative=self.text("negative", drawing.negative),
            cfg=drawing.guidance,
        )
        side = {"width": drawing.size, "height": drawing.size}
        steps = {"scheduler": drawing.scheduler, "steps": drawing.steps}
        samples = self.add(
            "samples",
            "SamplerCustomAdvanced",
            noise=self.add("noise", "RandomNoise", noise_seed=self.job.noise_seed),
            guider=guider,
            sampler=self.sampler,
            sigmas=self.add("sigmas", "BasicScheduler", model=self.base, denoise=1.0, **steps),
            latent_image=self.add("latent", "EmptyLatentImage", batch_size=1, **side),
        )
        pixels = self.add("decode", "VAEDecode", samples=samples, vae=self.vae)
        self.add("picture", "PreviewImage", images=pixels)
        return "picture"

    # --- any workflow

    def workflow(
        self,
        path: Path,
        reference: str,
        prompt: str | None,
        seed: str | None,
        picture: str | None,
        values: Mapping[str, Any],
    ) -> str:
        """Take a whole workflow file, with this picture, prompt and seed in the nodes that are named.

        Raises EvaluationError, one sentence, for a node that is missing or not the only one.
        """
        try:
            api = workflow.convert(path, dict(self.info))
        except Problem as problem:
            raise EvaluationError(f"{path}: {problem}") from None
        self.nodes = Graph(api)
        self._set(path, reference, "image", self.picture)
        text = prompt or next((t for t in ("Prompt", "Positive", "positive") if workflow.find(api, t)), None)
        if text is None:
            texts = [n for n in workflow.find(api, "CLIPTextEncode") if isinstance(api[n]["inputs"].get("text"), str)]
            if len(texts) != 1:
                raise EvaluationError(
                    f"{path} has {len(texts)} nodes with a text, and none is titled Prompt: name one in `prompt`."
                )
            text = texts[0]
        self._set(path, text, "text", self.job.prompt.text)
        self._set(path, seed or self._only_seed(path), None, self.job.noise_seed)
        for where, value in values.items():
            self._set(path, where, None, value)
        if picture:
            return self._node(path, picture)
        saved = workflow.find(api, "SaveImage") or workflow.find(api, "PreviewImage")
        if len(saved) != 1:
            raise EvaluationError(f"{path} has {len(saved)} nodes that save a picture: name one in `picture`.")
        return saved[0]

    def _node(self, path: Path, where: str) -> str:
        found = [where] if where in self.nodes else workflow.find(dict(self.nodes), where)
        if len(found) != 1:
            names = sorted({f"{(n.get('_meta') or {}).get('title') or n['class_type']}" for n in self.nodes.values()})
            raise EvaluationError(
                f"{path} has {len(found)} nodes with the title, class or id {where!r}, and one is needed; it has "
                f"{', '.join(names)}."
            )
        return found[0]

    def _set(self, path: Path, where: str, name: str | None, value: Any) -> None:
        """Write a value into "node" (its input `name`, or the seed) or "node.input"."""
        node, dot, chosen = where.rpartition(".") if "." in where and where not in self.nodes else (where, "", "")
        number = self._node(path, node)
        place = self.nodes[number]["inputs"]
        name = chosen if dot else name or next((n for n in ("seed", "noise_seed") if n in place), "seed")
        if name not in place or isinstance(place[name], list):
            state = "comes from another node" if name in place else "is not there"
            raise EvaluationError(
                f"In {path}, the input {name!r} of {node!r} {state}: name a node and an input that is written in it, "
                f"as node.input; it has {', '.join(k for k, v in place.items() if not isinstance(v, list)) or 'none'}."
            )
        place[name] = value
        # What is set counts, as in the page: a preset that would act in its place is left.
        known = self.info.get(self.nodes[number]["class_type"], {}).get("input", {}).get("optional", {})
        about = (known.get("preset") or [None, {}])[1]
        if name in about.get("lookahead_presets", {}).get(place.get("preset"), {}):
            place["preset"] = about["default"]

    def _only_seed(self, path: Path) -> str:
        found = [
            f"{id_}.{name}"
            for id_, node in self.nodes.items()
            for name in ("seed", "noise_seed")
            if isinstance(node["inputs"].get(name), int)
        ]
        if len(found) != 1:
            raise EvaluationError(f"{path} has {len(found)} nodes with a seed: name one in `seed`.")
        return found[0]
