"""Bytes of what runs, counted as it goes; on torch's meta device also FLOP, with the casts and kernels of a GPU."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Set
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


class ByteCounter(TorchDispatchMode):
    """Counts the bytes of the tensors that are made within, on any device: `live` now, `peak` at most.

    before: tensors that are there already, whose views are nothing new; so are the views of an operation's own inputs.
    """

    def __init__(self, before: Iterable[Tensor] = ()):
        super().__init__()
        self.live = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in before}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {value.untyped_storage()._cdata for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)}
        out = func(*args, **(kwargs or {}))
        self._count(out, given)
        return out

    def _count(self, out: object, given: Set[int] = frozenset()) -> None:
        """Add what an operation gave that was not there before."""
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._known and storage._cdata not in given:
                    self._add(storage)

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


class Ledger(ByteCounter):
    """Counts what happens within on the meta device: bytes as `ByteCounter` does, and `work` in FLOP.

    An operation that was seen with inputs of the same shapes is not run again: it has results of the same shapes.
    """

    def __init__(self, before: Iterable[Tensor] = ()):
        super().__init__(before)
        self.work = 0
        self._fresh: dict[object, bool] = {}
        self._seen: dict[object, tuple[int, object]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # What an operation gives is a function of the shapes that it gets, and torch finds it out slowly. So the same
        # again is not asked for, where the result is new memory (no view, nothing in place).
        fresh = self._fresh.get(func)
        if fresh is None:
            fresh = self._fresh[func] = not func._schema.is_mutable and not _may_be_a_view(func)
        key = (func, _shapes_of(args), _shapes_of(tuple(kwargs.items()))) if fresh else None
        if key in self._seen:
            work, makes = self._seen[key]
            out = tuple(map(_made, makes)) if isinstance(makes, tuple) else _made(makes)
        else:
            out = func(*args, **kwargs)
            flop = flop_registry.get(func._overloadpacket)
            work = flop(*args, **kwargs, out_val=out) if flop else 0
            if fresh:
                self._seen[key] = work, tuple(map(_fresh, out)) if isinstance(out, tuple) else _fresh(out)
        self.work += work
        self._count(out)
        return out


class _Fresh:
    """How to make a tensor like this one."""

    def __init__(self, tensor: Tensor):
        self.shape, self.stride, self.dtype, self.device = tensor.shape, tensor.stride(), tensor.dtype, tensor.device

    def __call__(self) -> Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)


def _fresh(value: object) -> object:
    return _Fresh(value) if isinstance(value, Tensor) else value


def _made(value: object) -> object:
    return value() if isinstance(value, _Fresh) else value


def _may_be_a_view(func: torch._ops.OpOverload) -> bool:
    return func is torch.ops.aten._unsafe_view.default or any(r.alias_info is not None for r in func._schema.returns)


def _shapes_of(value: object) -> object:
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    return tuple(map(_shapes_of, value)) if isinstance(value, tuple | list) else value


class MixedPrecision(TorchFunctionMode):
    """The casts of torch.autocast on a GPU, which the meta device has not, and the fused attention of one.

    low: the type of matrix products; None or float32: no casts, the attention alone.
    """

    LOW = {F.linear, torch.conv2d, F.conv2d, torch.matmul, torch.bmm, torch.baddbmm}
    HIGH = {F.group_norm, F.layer_norm, torch.group_norm, torch.layer_norm, F.softmax, torch.softmax}

    def __init__(self, low: torch.dtype | None):
        super().__init__()
        self.low = None if low == torch.float32 else low
        self._cast: dict[int, Tensor] = {}

    def backward(self, loss: Tensor) -> None:
        """Backward of a scalar, with what is computed again cast like the rest."""
        self._cast.clear()  # weights that were cast: autocast drops them at the end of forward
        # Given the tensor itself, torch suspends this mode meanwhile; given the edge of its graph, it does not.
        torch.autograd.backward(get_gradient_edge(loss), torch.ones_like(loss))

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            q, k, v = (self._as(t, self.low) for t in args[:3])
            return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]
        if self.low is not None and func in self.LOW:
            args, kwargs = self._all(args, kwargs, self.low)
        elif self.low is not None and func in self.HIGH:
            args, kwargs = self._all(args, kwargs, torch.float32)
        return func(*args, **kwargs)

    def _all(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], dtype: torch.dtype
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return tuple(self._as(a, dtype) for a in args), {k: self._as(v, dtype) for k, v in kwargs.items()}

    def _as(self, value: object, dtype: torch.dtype | None) -> object:
        if dtype is None or not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == dtype:
            return value
        if isinstance(value, nn.Parameter) and value.requires_grad:
            if id(value) not in self._cast:
                self._cast[id(value)] = value.to(dtype)
            return self._cast[id(value)]
        return value.to(dtype)
