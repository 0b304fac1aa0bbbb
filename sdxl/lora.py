"""LoRA: low-rank branches beside the layers of diffusers' UNet, read and written in the layout of the public files.

The names are those of latent-consistency/lcm-lora-sdxl: for every layer `lora_unet_<diffusers path with _ for .>`
followed by `.lora_down.weight`, `.lora_up.weight` and `.alpha`; the branch is multiplied by alpha / rank.

Hooks add the branches, so the model itself is never edited: several LoRAs share one UNet, each with a scale of its
own, a number or one for every sample of the batch, and a scale of 0 leaves the UNet's result untouched, bit for bit.
peft would serve as well for one LoRA at one strength; but its strength is a number in each of up to 788 layers, and
training needs one for every sample and several sets of weights (trained, averaged, none) in one step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..lookahead.files import lora_file
from ..lookahead.method.module_list import ModuleListOf

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2")
OUTER = ("proj_in", "proj_out")
RESNET = ("conv1", "conv2", "conv_shortcut", "time_emb_proj")
SAMPLERS = ("downsamplers.0.conv", "upsamplers.0.conv")
EVERYTHING = ATTENTION + FEED_FORWARD + OUTER + RESNET + SAMPLERS  # what lcm-lora-sdxl covers: 788 layers of SDXL's
TRANSFORMER = ATTENTION + FEED_FORWARD + OUTER
PREFIX = "lora_unet_"


class Branch(nn.Module):
    """up(down(x)) beside one layer; `up` starts at zero. A 3x3 convolution is followed by one of 1x1."""

    lora_down: nn.Linear | nn.Conv2d
    lora_up: nn.Linear | nn.Conv2d

    def __init__(self, layer: nn.Module, rank: int, alpha: float):
        super().__init__()
        if isinstance(layer, nn.Conv2d):
            kernel, stride, padding = layer.kernel_size, layer.stride, layer.padding
            # (to torch's types, a convolution's sizes have any length)
            self.lora_down = nn.Conv2d(layer.in_channels, rank, kernel, stride, padding, bias=False)  # type: ignore[arg-type]
            self.lora_up = nn.Conv2d(rank, layer.out_channels, 1, bias=False)
        elif isinstance(layer, nn.Linear):
            self.lora_down = nn.Linear(layer.in_features, rank, bias=False)
            self.lora_up = nn.Linear(rank, layer.out_features, bias=False)
        else:
            raise TypeError(f"a LoRA goes beside linear and convolution layers, not beside {type(layer).__name__}")
        nn.init.zeros_(self.lora_up.weight)
        self.register_buffer("alpha", torch.tensor(float(alpha)))
        self.strength = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        return self.lora_up(self.lora_down(x)) * self.strength


class LoRA(nn.Module):
    """Branches for some layers of a UNet. `scale` multiplies all of them: a number, or a tensor [n] for n samples."""

    def __init__(self, unet: nn.Module, ranks: Mapping[str, int], alphas: Mapping[str, float] | None = None):
        """`ranks` maps paths of layers, as diffusers names them, to ranks; alpha is the rank unless given."""
        super().__init__()
        self.paths = tuple(ranks)
        self.branches = ModuleListOf(
            Branch(unet.get_submodule(p), rank, (alphas or ranks)[p]) for p, rank in ranks.items()
        )
        self.scale: float | Tensor = 1.0
        self._hooks: list[RemovableHandle] = []

    def attach(self, unet: nn.Module) -> LoRA:
        """Makes `unet` compute with the branches, as `scale` says."""
        for path, branch in zip(self.paths, self.branches, strict=True):
            self._hooks.append(unet.get_submodule(path).register_forward_hook(self._hook(branch)))
        return self

    def detach(self) -> None:
        """Undo `attach`: the UNet is as it was."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _hook(self, branch: Branch) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def add(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            scale = self.scale
            if isinstance(scale, Tensor):
                return output + branch(inputs[0]) * scale.to(output).view(-1, *[1] * (output.ndim - 1))
            if scale == 0:
                return output
            return output + (branch(inputs[0]) if scale == 1 else branch(inputs[0]) * scale)

        return add

    @contextmanager
    def at(self, scale: float | Tensor) -> Iterator[None]:
        """Gives the branches another scale for a while."""
        before, self.scale = self.scale, scale
        try:
            yield
        finally:
            self.scale = before


def merged(lora: LoRA, unet: nn.Module) -> dict[str, Tensor]:
    """The weights of the UNet's layers with the branches at scale 1 added in, by "<path>.weight"; gradients go through.

    As weights (`torch.func.functional_call`), branches of a small model cost less in training than beside its layers.
    """
    out = {}
    for path, branch in zip(lora.paths, lora.branches, strict=True):
        weight, down, up = unet.get_parameter(f"{path}.weight"), branch.lora_down.weight, branch.lora_up.weight
        change = up.flatten(1) @ down.flatten(1)
        out[f"{path}.weight"] = weight + branch.strength * change.view(weight.shape).to(weight)
    return out


def layers(unet: nn.Module, kinds: tuple[str, ...] = EVERYTHING) -> list[str]:
    """Paths of the UNet's layers of these kinds, in the model's order."""
    endings = tuple("." + k for k in kinds)
    return [p for p, m in unet.named_modules() if p.endswith(endings) and isinstance(m, nn.Linear | nn.Conv2d)]


def build(unet: nn.Module, rank: int, kinds: tuple[str, ...] = EVERYTHING, conv_rank: int | None = None) -> LoRA:
    """A LoRA that changes nothing yet, not attached. 3x3 convolutions may have a rank of their own: they are large."""
    ranks = {}
    for path in layers(unet, kinds):
        weight = unet.get_parameter(f"{path}.weight")
        ranks[path] = conv_rank if conv_rank and weight.ndim == 4 and weight.shape[-1] > 1 else rank
    return LoRA(unet, ranks)


def public_tensors(lora: LoRA) -> dict[str, Tensor]:
    """The LoRA under the names of the public files."""
    out = {}
    for path, branch in zip(lora.paths, lora.branches, strict=True):
        for name, tensor in branch.state_dict().items():
            out[f"{PREFIX}{path.replace('.', '_')}.{name}"] = tensor
    return out


def load(tensors: Mapping[str, Tensor], unet: nn.Module, name: str = "The file") -> LoRA:
    """A LoRA from the tensors of a public file (any ranks, layers and names), not yet attached, not trainable.

    Raises EncoderFileError, one sentence that begins with `name`: see `lora_file.low_rank`.
    """
    kinds = (p for p, m in unet.named_modules() if isinstance(m, nn.Linear | nn.Conv2d))
    parts = lora_file.low_rank(tensors, {p: unet.get_parameter(f"{p}.weight").shape for p in kinds}, name)
    lora = LoRA(unet, {p: len(low.down) for p, low in parts.items()}, {p: low.alpha for p, low in parts.items()})
    for low, branch in zip(parts.values(), lora.branches, strict=True):
        branch.lora_down.weight.data.copy_(low.down)
        branch.lora_up.weight.data.copy_(low.up.reshape(branch.lora_up.weight.shape))
    return lora.eval().requires_grad_(False)
