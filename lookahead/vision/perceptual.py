"""Perceptual distances by their own packages, `lpips` and `dreamsim`; weights come from the user's folder alone."""

from __future__ import annotations

import importlib.util
import math
import os
import re
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from ..files.tensors import check_numbers, read_tensors

# How the file of each backbone begins, and its full public name (torchvision's, from download.pytorch.org/models).
BACKBONES = {
    "vgg": ("vgg16-", "vgg16-397923af.pth"),
    "alex": ("alexnet", "alexnet-owt-7be5be79.pth"),
    "squeeze": ("squeezenet1_1", "squeezenet1_1-b8a52dc0.pth"),
}


def lpips_network(backbone: str, path: str | os.PathLike[str] | None = None, seed: int = 0) -> nn.Module:
    """The network of the `lpips` package: a, b [n, 3, h, w] in [-1, 1] -> distances [n, 1, 1, 1]; float32, frozen.

    backbone: one of BACKBONES. path: torchvision's weights for it. None: random weights from `seed`, for tests and the
    mini world: a distance of random features, which is not the published measure. The package brings the weights of its
    linear layers with it. Raises ImportError where the package is missing, ValueError where the file does not fit; one
    sentence each.
    """
    if importlib.util.find_spec("lpips") is None:
        raise ImportError("LPIPS needs the package lpips: run `pip install lpips` in ComfyUI's Python and restart it.")
    import lpips

    with torch.device("meta"), warnings.catch_warnings():  # all weights come below: nothing is initialised for nothing
        warnings.simplefilter("ignore", UserWarning)  # lpips calls torchvision in its old way
        network = lpips.LPIPS(net=backbone, pretrained=False, pnet_rand=True, verbose=False)
    network.scaling_layer = lpips.ScalingLayer()
    linear = Path(lpips.__file__).parent / "weights" / "v0.1" / f"{backbone}.pth"
    weights = {**network.scaling_layer.state_dict(prefix="scaling_layer."), **read_tensors(linear)[0]}
    # The package cuts torchvision's layers into slices and keeps their numbers: slice2.3.weight is features.3.weight.
    places = {name: name.split(".", 2)[2] for name in network.state_dict() if name.startswith("net.")}
    if path is None:
        weights |= random_weights({name: network.state_dict()[name].shape for name in places}, seed)
    else:
        file, _ = read_tensors(path)
        check_numbers(file, Path(path).name)
        for name, layer in places.items():
            found = file.get(f"features.{layer}")
            if found is None or found.shape != network.state_dict()[name].shape:
                raise ValueError(
                    f"{Path(path).name} does not hold torchvision's {backbone} (features.{layer} is missing or of "
                    f"another shape): use {BACKBONES[backbone][1]} from download.pytorch.org/models."
                )
            weights[name] = found.float()
    # The linear layers stand in the network twice, under a name each and in a list.
    weights |= {re.sub(r"^lin(\d)\.", r"lins.\1.", name): value for name, value in weights.items()}
    network.load_state_dict(weights, assign=True)
    return network.requires_grad_(False).eval()


def random_weights(shapes: dict[str, torch.Size], seed: int) -> dict[str, Tensor]:
    """Random convolutions that keep the size of what passes a ReLU (He et al. 2015), the same for a seed everywhere."""
    g = torch.Generator().manual_seed(seed)
    scaled = {name: math.sqrt(2 / s[1:].numel()) if len(s) > 1 else 0.0 for name, s in shapes.items()}
    return {name: torch.randn(s, generator=g) * scaled[name] for name, s in shapes.items()}


# What each kind of DreamSim reads from its folder; with all of it there, the package has nothing to download.
DREAMSIM = {
    "ensemble": (
        "dino_vitb16_pretrain.pth",
        "clip_vitb16_pretrain.pth.tar",
        "open_clip_vitb16_pretrain.pth.tar",
        "ensemble_lora",
        "facebookresearch_dino_main",
        "checkpoints/dino_vitbase16_pretrain.pth",
    ),
    "clip_vitb32": ("clip_vitb32_pretrain.pth.tar", "clip_vitb32_single_lora"),
    "open_clip_vitb32": ("open_clip_vitb32_pretrain.pth.tar", "open_clip_vitb32_single_lora"),
}


class DreamSimPictures(nn.Module):
    """DreamSim (Fu et al. 2023, arXiv 2306.09344) for `losses.EmbeddingLoss`: pictures -> what its distance compares.

    folder: what the package unpacked there when it was once called with `cache_dir` (for "ensemble" with torch.hub's
    files of DINO, which that call fetches too). Raises ImportError or FileNotFoundError, one sentence, where the
    package or a file is missing; nothing is downloaded.
    """

    size = 224

    def __init__(self, folder: str | os.PathLike[str], kind: str = "ensemble"):
        super().__init__()
        if importlib.util.find_spec("dreamsim") is None:
            raise ImportError("DreamSim needs the package dreamsim: run `pip install dreamsim` in this Python.")
        missing = [name for name in DREAMSIM[kind] if not (Path(folder) / name).exists()]
        if missing:
            raise FileNotFoundError(
                f"{folder} lacks {missing[0]}, which DreamSim ({kind}) reads: call dreamsim.dreamsim(dreamsim_type="
                f"{kind!r}, cache_dir=...) once where there is a network, and put here what it leaves in that folder."
            )
        from dreamsim import dreamsim

        self.model, _ = dreamsim(pretrained=True, device="cpu", cache_dir=str(folder), dreamsim_type=kind)

    def forward(self, pictures: Tensor) -> Tensor:
        return self.model.embed(pictures)
