"""Gradients through the host's networks, whose weights are frozen, may be cast, offloaded or quantised, and were loaded
in inference mode.

The host runs nodes in `torch.inference_mode()`. Outside of it (`torch.inference_mode(False)`) autograd works, but the
weights stay inference tensors, which cannot be saved for backward; and those that are cast or offloaded lie in buffers
that the host uses again before backward. So no weight is ever saved here: a Linear or convolution is one autograd
Function that keeps the module and fetches and casts the weight anew in backward, by the host's own functions. Only the
weights of norms are copied. As a frozen linear layer needs no input in backward either, most of a network's activations
are not kept at all; what is left is kept or computed twice, block by block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import comfy.ops
import torch
from comfy.ldm.modules import attention
from comfy.ldm.modules.diffusionmodules import model as autoencoder
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock
from comfy.taesd.taesd import Block as TAESDBlock
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

if TYPE_CHECKING:
    from .lora_bypass import Bypasses

_BLOCKS = (ResBlock, attention.BasicTransformerBlock, autoencoder.ResnetBlock, autoencoder.AttnBlock, TAESDBlock)
_CONVOLUTIONS = {
    nn.Conv1d: torch.nn.grad.conv1d_input,
    nn.Conv2d: torch.nn.grad.conv2d_input,
    nn.Conv3d: torch.nn.grad.conv3d_input,
}


@dataclass
class Checkpointing:
    """Which blocks are computed twice instead of kept. Lives as long as one run.

    kept: blocks whose activations are kept; saved: for each block that was computed twice, how many bytes keeping it
    takes, found while it was computed again.
    """

    enabled: bool = True
    kept: set[nn.Module] = field(default_factory=set)
    saved: dict[nn.Module, int] = field(default_factory=dict)

    def keep_what_fits(self, free: float) -> None:
        """Keep as many blocks as fit into `free` bytes, the smallest first; what is not measured is computed twice."""
        self.kept.clear()
        for block, size in sorted(self.saved.items(), key=lambda item: item[1]):
            free -= size
            if free < 0:
                break
            self.kept.add(block)

    @property
    def total(self) -> int:
        """Bytes that keeping every block takes, as far as it is known."""
        return sum(self.saved.values())


@contextmanager
def differentiable(
    networks: Iterable[nn.Module], checkpointing: Checkpointing | None = None, bypasses: Bypasses | None = None
) -> Iterator[None]:
    """Inside, autograd works through networks of the host (in `inference_mode(False)`); afterwards they are as before.

    bypasses: low-rank changes that some layers of the networks get while they are switched on. Raises ValueError, one
    sentence, when a layer is of a kind whose weights cannot be had.
    """
    undo: list[Callable[[], None]] = []
    try:
        for network in networks:
            for module in network.modules():
                _install(module, checkpointing, bypasses, undo)
        yield
    finally:
        for restore in reversed(undo):
            restore()


def pytorch_attention(_: Callable, *args: Any, **kwargs: Any) -> Tensor:
    """For the host's `optimized_attention_override`: PyTorch's own attention, which can be differentiated.

    It takes the place of what another node has put there, which mostly is a kernel without a backward pass.
    """
    return attention.attention_pytorch(*args, **kwargs)


def on_copies(patches: Any) -> Any:
    """Patches of other nodes, in dicts and lists, that may write into what they are given (as FreeU does).

    Autograd needs what a patch gets, and what it has computed with, as it was: they work on copies, and what they save
    for backward is copied as well. A type beside a patch, of the layers that it is for, stays what it is.
    """
    if isinstance(patches, type):
        return patches
    if isinstance(patches, dict):
        return {name: on_copies(value) for name, value in patches.items()}
    if isinstance(patches, list | tuple):
        return [on_copies(value) for value in patches]

    def patch(*args: Any, **kwargs: Any) -> Any:
        with _saving(lambda tensor: tensor.detach().clone()):
            return patches(*(a.clone() if isinstance(a, Tensor) else a for a in args), **kwargs)

    return patch


def on_a_copy(around: Callable) -> Callable:
    """Wraps another node's wrapper around the whole UNet likewise; the UNet itself computes as ever."""

    def wrapper(apply: Callable, given: dict[str, Any]) -> Any:
        def inside(*args: Any, **kwargs: Any) -> Any:
            with _saving(Tensor.detach):
                return apply(*args, **kwargs)

        with _saving(lambda tensor: tensor.detach().clone()):
            return around(inside, {**given, "input": given["input"].clone()})

    return wrapper


def _saving(pack: Callable[[Tensor], Tensor]) -> saved_tensors_hooks:
    return saved_tensors_hooks(pack, lambda tensor: tensor)


def _install(module: nn.Module, checkpointing: Checkpointing | None, bypasses: Bypasses | None, undo: list) -> None:
    castable = isinstance(module, comfy.ops.CastWeightBiasOp)
    if castable and _is_linear(module):
        _through_cast(module, lambda x, *args, **kwargs: _layer(module, bypasses, x, *args, **kwargs), undo)
    elif castable and isinstance(module, nn.GroupNorm | nn.LayerNorm):
        _through_cast(module, lambda x: _norm(module, x), undo)
    else:
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.is_inference():
                module._parameters[name] = nn.Parameter(parameter.clone(), requires_grad=False)
                undo.append(lambda name=name, parameter=parameter: module._parameters.update({name: parameter}))
    if isinstance(module, autoencoder.AttnBlock):
        _set(module, "optimized_attention", autoencoder.pytorch_attention, undo)
    if isinstance(module, _BLOCKS) and checkpointing is not None and checkpointing.enabled:
        _set(module, "forward", _block(module, checkpointing, bypasses), undo)


def _is_linear(module: nn.Module) -> bool:
    # Quantised layers of the host are no nn.Linear, but have its sizes.
    return isinstance(module, (nn.Linear, *_CONVOLUTIONS)) or hasattr(module, "in_features")


def _through_cast(module: nn.Module, forward: Callable, undo: list) -> None:
    """`forward` in the place of what the host calls where weights are cast, so that what others put before it holds."""
    before = hasattr(module, "prev_comfy_cast_weights")
    _set(module, "forward_comfy_cast_weights", forward, undo)
    if hasattr(module, "quant_format"):
        _set(module, "comfy_force_cast_weights", True, undo)
    # The host may move the module meanwhile, and has then set this anew itself.
    _set(module, "comfy_cast_weights", True, undo, lambda: hasattr(module, "prev_comfy_cast_weights") == before)


def _set(module: nn.Module, name: str, value: Any, undo: list, still: Callable[[], bool] = lambda: True) -> None:
    before = {name: module.__dict__[name]} if name in module.__dict__ else {}

    def restore():
        if still():
            module.__dict__.pop(name, None)
            module.__dict__.update(before)

    undo.append(restore)
    module.__dict__[name] = value


def _layer(module: nn.Module, bypasses: Bypasses | None, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    fold = bypass = None
    if bypasses is not None:
        fold = None if args or kwargs else bypasses.fold(module, x)
        bypass = bypasses.of(module) if fold is None else None
    if torch.is_grad_enabled() and x.requires_grad:
        out = _Frozen.apply(x, module, args, kwargs, fold, None if bypasses is None else bypasses.kept)
    else:
        out, _ = _forward(module, x, args, kwargs, fold)
    return out if bypass is None else out + bypass(x)


def _forward(
    module: nn.Module, x: Tensor, args: tuple, kwargs: dict[str, Any], fold: Callable[[Tensor], Tensor] | None
) -> tuple[Tensor, Tensor | None]:
    """What a layer computes, and the weight that was made for it, if one was."""
    if fold is not None:
        with _weight(module, x) as (weight, bias):
            weight = fold(weight)
            return _with_weight(module, x, weight, bias), weight
    with _as_the_host(module):
        out = type(module).forward_comfy_cast_weights(module, x, *args, **kwargs)
    return out.clone() if out.is_inference() else out, None


class _Frozen(torch.autograd.Function):
    """One linear layer or convolution of the host with frozen weights; it saves none of these.

    fold: makes the weight that is used of the layer's own, in forward and again in backward, unless `kept` gives it
    back then; None for the layer's own.
    """

    @staticmethod
    def forward(ctx, x, module, args, kwargs, fold, kept):
        ctx.module, ctx.shape, ctx.dtype, ctx.fold = module, x.shape, x.dtype, fold
        out, folded = _forward(module, x, args, kwargs, fold)
        ctx.folded = None if folded is None else kept(folded)
        return out

    @staticmethod
    def backward(ctx, grad):
        folded, ctx.folded = ctx.folded, None
        if folded is not None and folded.dtype == grad.dtype:
            out = _through(ctx.module, ctx.shape, folded, grad)
        else:
            with _weight(ctx.module, grad) as (weight, _):
                out = _through(ctx.module, ctx.shape, weight if ctx.fold is None else ctx.fold(weight), grad)
        return out.to(ctx.dtype), None, None, None, None, None


def _through(module: nn.Module, shape: torch.Size, weight: Tensor, grad: Tensor) -> Tensor:
    """The gradient of a layer's input."""
    if isinstance(module, tuple(_CONVOLUTIONS)):
        return _through_convolution(module, shape, weight, grad)
    return grad @ weight


def _with_weight(module: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What a layer computes with another weight; nodes for seamless pictures replace a convolution's own forward."""
    bias = None if bias is None else bias.to(x)
    if isinstance(module, tuple(_CONVOLUTIONS)):
        return module._conv_forward(x, weight, bias)
    return nn.functional.linear(x, weight, bias)


def _through_convolution(m: nn.Module, shape: torch.Size, weight: Tensor, grad: Tensor) -> Tensor:
    if m.padding_mode == "zeros" and "_conv_forward" not in m.__dict__:
        kind = next(kind for kind in _CONVOLUTIONS if isinstance(m, kind))
        return _CONVOLUTIONS[kind](shape, weight, grad, m.stride, m.padding, m.dilation, m.groups)
    # Nodes for seamless pictures pad in another way: by the module's own forward, for an input that does not matter.
    leaf = grad.new_zeros(shape).requires_grad_()
    with torch.enable_grad():
        out = m._conv_forward(leaf, weight.clone(), None)
    return torch.autograd.grad(out, leaf, grad)[0]


def _as_the_host(module: nn.Module):
    """With dynamic memory the host writes into its inference tensors, which it may in inference mode alone."""
    return torch.inference_mode() if hasattr(module, "_v") else torch.no_grad()


@contextmanager
def _weight(module: nn.Module, like: Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
    """A layer's weight and bias in the precision and on the device of `like`, as the host would use them now."""
    with _as_the_host(module):
        weight, bias, stream = comfy.ops.cast_bias_weight(
            module, dtype=like.dtype, device=like.device, bias_dtype=like.dtype, offloadable=True
        )
        if hasattr(weight, "dequantize") and type(weight) is not Tensor and type(weight) is not nn.Parameter:
            weight = weight.dequantize()
    out = getattr(module, "out_features", getattr(module, "out_channels", None))
    if weight.shape[0] != out or not weight.is_floating_point():
        raise ValueError(
            f"A layer of this model ({type(module).__name__}) stores its weights in a way that gradients cannot use: "
            "load the model from an ordinary or fp8 checkpoint."
        )
    try:
        yield weight.to(like.dtype), bias
    finally:
        comfy.ops.uncast_bias_weight(module, weight, bias, stream)


def _norm(module: nn.GroupNorm | nn.LayerNorm, x: Tensor) -> Tensor:
    weight = bias = None
    if module.weight is not None:
        with _as_the_host(module):
            weight, bias, stream = comfy.ops.cast_bias_weight(module, x, offloadable=True)
        copies = weight.clone(), None if bias is None else bias.clone()
        comfy.ops.uncast_bias_weight(module, weight, bias, stream)
        weight, bias = copies
    if isinstance(module, nn.GroupNorm):
        return nn.functional.group_norm(x, module.num_groups, weight, bias, module.eps)
    return nn.functional.layer_norm(x, module.normalized_shape, weight, bias, module.eps)


def _block(module: nn.Module, checkpointing: Checkpointing, bypasses: Bypasses | None) -> Callable:
    """The forward of a block that keeps nothing but its input, unless it is one of the kept."""
    forward = module.forward

    def checkpointed(x, *args, **kwargs):
        if module in checkpointing.kept or not (torch.is_grad_enabled() and x.requires_grad):
            return forward(x, *args, **kwargs)
        # The UNet writes into its options while it runs: the block must see the same when it is computed again.
        args = [dict(a) if isinstance(a, dict) else a for a in args]
        kwargs = {name: dict(a) if isinstance(a, dict) else a for name, a in kwargs.items()}
        strengths = None if bypasses is None else bypasses.now

        def run(x: Tensor) -> Tensor:
            if bypasses is None:
                return forward(x, *args, **kwargs)
            with bypasses.switched(strengths):
                return forward(x, *args, **kwargs)

        return _Checkpointed.apply(x, run, module, checkpointing)

    return checkpointed


class _Checkpointed(torch.autograd.Function):
    """A block of which only the input is kept; it is computed again in backward."""

    @staticmethod
    def forward(ctx, x, run, module, checkpointing):
        ctx.save_for_backward(x)
        ctx.run, ctx.module, ctx.checkpointing = run, module, checkpointing
        return run(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        storages: dict[int, int] = {}

        def count(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata != x.untyped_storage()._cdata:
                storages[storage._cdata] = storage.nbytes()
            return tensor.detach()

        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            with saved_tensors_hooks(count, lambda tensor: tensor):
                out = ctx.run(leaf)
        ctx.checkpointing.saved[ctx.module] = sum(storages.values())
        (out,) = torch.autograd.grad(out, leaf, grad)
        return out, None, None, None
