"""The type of a list of modules that are all of one kind. torch's own says only that they are modules."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Generic, TypeVar

from torch import nn

if TYPE_CHECKING:
    M_co = TypeVar("M_co", bound=nn.Module, covariant=True)

    class ModuleListOf(nn.ModuleList, Generic[M_co]):
        """`nn.ModuleList` whose modules are of the kind M."""

        def __init__(self, modules: Iterable[M_co]) -> None: ...

        def __iter__(self) -> Iterator[M_co]: ...

        def __getitem__(self, index: int) -> M_co: ...  # type: ignore[override]  # no slices: nobody takes one

else:
    ModuleListOf = nn.ModuleList  # while it runs there is no difference
