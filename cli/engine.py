"""From the configuration of a generated data set to its engine: generator, and what measures pictures."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from ..trainer.data.generate.checks import Inspector
    from ..trainer.data.generate.config import GenerateConfig
    from ..trainer.data.generate.engine import Engine
    from ..trainer.data.generate.generators import PictureGenerator


def read_engine(config: GenerateConfig) -> Engine:
    """The engine with its models. Raises one of `main.USER_ERRORS`."""
    from ..trainer.data.generate.engine import Engine

    where = device()
    return Engine(config, read_generator(config, where), read_inspector(config, where))


def device() -> torch.device:
    """A GPU of this process's own where there are some; nothing is exchanged with other processes."""
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    return torch.device("cpu")


def read_generator(config: GenerateConfig, where: torch.device) -> PictureGenerator:
    from ..trainer.data.generate.generators import read_few_step
    from .bases import known_base

    settings = config.generator
    if settings.kind == "drawn":
        from ..mini.generator import DrawnWorld

        return DrawnWorld(settings.size)
    if settings.base is not None and (base := known_base(settings.base)):
        return read_few_step(settings, where, base.folder, base.beside)
    return read_few_step(settings, where)


def read_inspector(config: GenerateConfig, where: torch.device) -> Inspector:
    """Opens what measures pictures. Files are looked for beside the detector's known base too."""
    from ..lookahead.vision.face_models import FaceModels
    from ..sdxl.load import found
    from ..trainer.data.generate.checks import Inspector
    from ..trainer.data.generate.config import digest
    from ..trainer.data.generate.generators import digest_files, weights_in
    from ..trainer.data.generate.styles import clip_scorer
    from .assemble import PackDetector, read_recogniser
    from .bases import known_base

    checks, about, hashes = config.checks, {}, []
    base = known_base(checks.detector) if checks.detector else None
    beside = (base.beside,) if base else ()
    detector = recogniser = scorer = None
    if checks.detector is not None:
        folder = base.own["detector"] if base else found("detector", checks.detector, section="checks")
        pack = FaceModels(folder, threads=1 if where.type == "cpu" else None)  # torch has the other cores
        detector = PackDetector(pack)
        about["detector"] = {"name": pack.name, "licence": pack.licence}
        hashes.append(digest_files(sorted(pack.folder.glob("*.onnx"))))
    if checks.recogniser is not None:
        path = found("recogniser", checks.recogniser, *beside, section="checks")
        inside = path.resolve() == (pack.recogniser and pack.recogniser.resolve())
        recogniser = read_recogniser(path, pack.preprocessing if inside else None).to(where)
        licence = pack.licence if inside else base.licence if base else "unknown: ask where the recogniser comes from"
        about["recogniser"] = {"name": path.name, "licence": licence}
        hashes.append(digest_files([path]))
    if checks.clip is not None:
        path = found("clip", checks.clip, *beside, section="checks")
        scorer = clip_scorer(path, config.prompts, where)
        hashes.append(digest_files(weights_in(path)))
    return Inspector(detector, recogniser, scorer, about, digest(hashes))
