"""The mini world's files in a ComfyUI's models folder, under the names of the public files that they stand in for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.numpy import save_file

from ...host.server import EXTENSIONS, Host, link
from ...tools.common import Problem
from ..plan import HERE, WEIGHTS
from .shipped import manifest

#: The public file that a shared workflow names -> the mini file that stands in for it in the demo and the tests
MINI_MODELS: dict[str, str] = {entry["model"]: entry["file"] for entry in manifest() if "model" in entry}
#: What `lookahead train trainer/configs/mini.yaml` has made of the mini encoder, under its own name
TRAINED = "lookahead/mini_encoder.safetensors"
NOISE_GUIDE = "noise_guide.safetensors"
#: What the mini world's creators have trained and saved, under the names that the workflows know -> the shipped file:
#: by `lookahead concept train trainer/configs/concept/mini.yaml`, a thing that it was shown, and by `lookahead guide
#: train trainer/configs/guide/mini.yaml`
OF_CREATORS = {
    "lookahead/concept_encoder.safetensors": "mini_concept_encoder.safetensors",
    "lookahead_concepts/my_concept.safetensors": "mini_concept.safetensors",
    f"lookahead/{NOISE_GUIDE}": "mini_noise_guide.safetensors",
}
THINGS = "checkpoints/mini_things.safetensors"  # the base that it knows, under a name of its own
THINGS_VISION = "clip_vision/mini_things.safetensors"  # and its image encoder
CHECKPOINT = "checkpoints/sd_xl_base_1.0.safetensors"
#: The halves of TAESD, which the mini checkpoint's VAE is cut into -> how the names of its weights begin
TAESD = {
    f"vae_approx/taesdxl_{half}.safetensors": f"first_stage_model.taesd_{half}." for half in ("encoder", "decoder")
}
#: Custom nodes by which the stock loaders read the mini files
MINI_EXTENSIONS = (*EXTENSIONS, HERE / "host_extension")


def link_models(base: Path, weights: Path = WEIGHTS) -> None:
    """Link the mini weights and the trained mini encoders into a host's base directory, under the public names."""
    sources = {name: weights / file for name, file in MINI_MODELS.items()}
    sources |= {name: HERE / "trained" / file for name, file in {TRAINED: Path(TRAINED).name, **OF_CREATORS}.items()}
    for name, source in sources.items():
        if not source.is_file():
            raise Problem(
                f"{source} is missing: it is part of the repository; restore it with `git checkout -- mini`, "
                f"or make it anew with `lookahead mini build` or `lookahead train`."
            )
        link(source, base / "models" / name)


def write_taesd(base: Path) -> None:
    """Cut the VAE of the mini checkpoint, which has TAESD's layout, into the two files of `taesdxl` in VAELoader."""
    for name, begins in TAESD.items():
        with safe_open(base / "models" / CHECKPOINT, "np") as file:
            half = {key.removeprefix(begins): file.get_tensor(key) for key in file.keys() if key.startswith(begins)}
        (base / "models" / name).parent.mkdir(parents=True, exist_ok=True)
        save_file(half, base / "models" / name)


def link_things(base: Path) -> None:
    """Link the base that draws things, which is made of the mini SDXL and the shipped LoRA when it is first needed."""
    from .derived import shipped_things_base  # it takes torch, which the files' names do not

    link(shipped_things_base(), base / "models" / THINGS)


def touch_models(base: Path) -> None:
    """Make empty files of all these names, for what reads the names alone."""
    for name in (*MINI_MODELS, *TAESD, *OF_CREATORS):
        (base / "models" / name).parent.mkdir(parents=True, exist_ok=True)
        (base / "models" / name).touch()


def mini_host(
    *,
    weights: Path | None = WEIGHTS,
    prepare: Callable[[Path], None] | None = None,
    extensions: Iterable[Path] = MINI_EXTENSIONS,
    **options: Any,
) -> Host:
    """A `Host` whose stock loaders read the mini world's files.

    Args:
        weights: folder of the mini weights to put under the public names; None for no models.
        prepare, extensions: as for `Host`, which takes the further options.
    """

    def put_models(base: Path) -> None:
        if weights is not None:
            link_models(base, weights)
            write_taesd(base)
            link_things(base)
        if prepare is not None:
            prepare(base)

    return Host(prepare=put_models, extensions=extensions, **options)
