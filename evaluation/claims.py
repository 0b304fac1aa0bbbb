"""The claims of the papers, each with the commands that measure it and the figures that it stands or falls by.

`claims.yaml` lists them. A check reads one interval out of a JSON file that a command wrote (a study's in `docs`, or
`figures.json` of `lookahead evaluate`); nothing is measured here.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..lookahead.files.atomic import first_line
from .pages import templates
from .stats import Interval
from .unique_keys import DuplicateKeyError, load_yaml

CLAIMS = Path(__file__).with_name("claims.yaml")
ClaimVerdict = Literal["shown", "in part", "not shown", "contrary", "not measured"]
WORDS: Mapping[ClaimVerdict, str] = {
    "shown": "the whole interval is on the claim's side",
    "in part": "some of a claim's checks are shown",
    "not shown": "the interval reaches over to the other side",
    "contrary": "the whole interval is on the other side",
    "not measured": "there are no figures yet",
}


class ClaimError(ValueError):
    """Says what is wrong with a list of claims or their figures, in one sentence."""


class MissingFigure(ClaimError):
    """Says that a file of figures lacks one."""


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ClaimStep(_Entry):
    """A command of `lookahead`, and the file that is there when it has ended."""

    run: str
    makes: str

    def command(self) -> list[str]:
        """The arguments of `lookahead`."""
        return shlex.split(self.run)


class ClaimCheck(_Entry):
    """A figure and the side of a bound that the claim puts it on.

    figure: a JSON file, then the keys that lead to an interval (a list of value, low, high). above, below: one of them,
    the bound; for gains and differences 0, or the loss that is still taken for level.
    """

    says: str
    figure: tuple[str, ...] = Field(min_length=2)
    above: float | None = None
    below: float | None = None

    @model_validator(mode="after")
    def _one_bound(self) -> ClaimCheck:
        if (self.above is None) == (self.below is None):
            raise ValueError("give one of above and below")
        return self

    @property
    def bound(self) -> str:
        """The side and the bound in words."""
        return f"below {self.below:g}" if self.below is not None else f"above {self.above:g}"

    def measured(self, root: Path) -> bool:
        """Tells whether its figure is there. Raises ClaimError for one that is no interval."""
        try:
            return _figure(root, self.figure) is not None
        except MissingFigure:
            return False

    def judged(self, root: Path) -> ClaimFigure:
        """Reads the figure and judges it. Raises ClaimError where the file has no such figure."""
        found = _figure(root, self.figure)
        if found is None:
            return ClaimFigure(self, None, "not measured")
        if self.below is not None:
            return ClaimFigure(self, found, _side(-found.high, -found.low, -self.below))
        return ClaimFigure(self, found, _side(found.low, found.high, self.above or 0.0))


def _side(low: float, high: float, bound: float) -> ClaimVerdict:
    """Where an interval lies to a bound that it should exceed."""
    if low > bound:
        return "shown"
    return "contrary" if high < bound else "not shown"


@dataclass(frozen=True)
class ClaimFigure:
    """A check with its figure; `found` is None where nothing was measured."""

    check: ClaimCheck
    found: Interval | None
    verdict: ClaimVerdict

    @property
    def figure(self) -> str:
        """The figure in words."""
        return "" if self.found is None else str(self.found)


class PaperClaim(_Entry):
    """A claim of a paper. published: what the paper reports; note: what is to be known beside the figures."""

    title: str
    paper: str
    says: str
    published: str
    steps: tuple[ClaimStep, ...]
    checks: tuple[ClaimCheck, ...] = Field(min_length=1)
    pages: tuple[str, ...] = ()
    pictures: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class JudgedClaim:
    """A claim with the results of its checks."""

    name: str
    claim: PaperClaim
    results: tuple[ClaimFigure, ...]

    @property
    def verdict(self) -> ClaimVerdict:
        """All of its checks together."""
        verdicts = [result.verdict for result in self.results]
        if "shown" in verdicts:
            return "shown" if set(verdicts) == {"shown"} else "in part"
        return max(verdicts, key=("not measured", "not shown", "contrary").index)

    @property
    def count(self) -> str:
        """Tells how many of its checks are shown, as "2 of 3"."""
        return f"{sum(result.verdict == 'shown' for result in self.results)} of {len(self.results)}"


def read(path: Path = CLAIMS) -> dict[str, PaperClaim]:
    """The claims of a file, by name. Raises ClaimError, one sentence."""
    try:
        listed = load_yaml(path.read_text(encoding="utf-8"))
    except DuplicateKeyError as error:
        raise ClaimError(f"{path}: {error}: leave one out.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ClaimError(f"{path} cannot be read as a list of claims ({first_line(error)}).") from None
    if not isinstance(listed, dict):
        raise ClaimError(f"{path} is no list of claims: write them by name, as {CLAIMS.name} has them.")
    out = {}
    for name, values in listed.items():
        try:
            out[str(name)] = PaperClaim.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in (name, *first["loc"]))
            raise ClaimError(f"{path}: {where}: {first['msg']}.") from None
    return out


def chosen(claims: Mapping[str, PaperClaim], names: Sequence[str]) -> dict[str, PaperClaim]:
    """The claims of these names, all where none is named. Raises ClaimError for a name that is not there."""
    if unknown := [name for name in names if name not in claims]:
        raise ClaimError(f"{unknown[0]!r} is no claim: name some of {', '.join(claims)}.")
    return {name: claims[name] for name in names} if names else dict(claims)


def judged(claims: Mapping[str, PaperClaim], root: Path) -> list[JudgedClaim]:
    """Judges claims by the figures under `root`. Raises ClaimError where a file lacks a figure that a check names."""
    return [JudgedClaim(n, claim, tuple(c.judged(root) for c in claim.checks)) for n, claim in claims.items()]


def run_missing(claims: Mapping[str, PaperClaim], root: Path, run: Callable[[list[str]], None]) -> int:
    """Runs the commands whose figures are not there, in their order; returns how many. A shared command runs once.

    A claim that has all of its figures runs nothing, whatever else is gone: what was trained for them need not be kept.
    Of another's steps run those whose files are not there, and again those that make the file of a missing figure.

    run: gets the arguments of `lookahead`; what it raises ends the run, and the next call goes on there.
    """
    ran: set[str] = set()
    for claim in claims.values():
        missing = [check for check in claim.checks if not check.measured(root)]
        for step in claim.steps if missing else ():
            makes = [check for check in missing if check.figure[0] == step.makes]
            if (root / step.makes).exists() and not makes:
                continue
            if step.run not in ran:
                run(step.command())
                ran.add(step.run)
            lacks = [f"the figure {' / '.join(c.figure[1:])} into {c.figure[0]}" for c in makes if not c.measured(root)]
            if lacks or not (root / step.makes).exists():
                raise ClaimError(
                    f"lookahead {step.run} has ended without writing {lacks[0] if lacks else step.makes}, as the list "
                    "of claims says: mend the list."
                )
    return len(ran)


def page(results: Sequence[JudgedClaim], root: Path, beside: Path) -> str:
    """Markdown of judged claims; `beside` is the folder that its links start from."""
    pages = templates(Path(__file__).parent)

    def link(path: str) -> str:
        return Path(os.path.relpath(root / path, beside)).as_posix()

    there = {path: (root / path).exists() for one in results for path in (*one.claim.pages, *one.claim.pictures)}
    return pages.get_template("claims.md.jinja").render(results=results, words=WORDS, link=link, there=there)


def _figure(root: Path, keys: Sequence[str]) -> Interval | None:
    """An interval out of a JSON file; None where the file, or what it says of an arm, is not there yet."""
    path = root / keys[0]
    if not path.is_file():
        return None
    value: Any = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(value, dict) and len(keys) > 2 and keys[1] not in value:
        return None  # a study may be asked for some of its arms
    for number, key in enumerate(keys[1:], 1):
        if not isinstance(value, dict) or key not in value:
            raise MissingFigure(f"{path} has no figure {' / '.join(keys[1 : number + 1])}: run its command again.")
        value = value[key]
    if isinstance(value, dict):
        value = [value.get(part) for part in Interval._fields]
    try:
        return Interval(*(float(part) for part in value))
    except (TypeError, ValueError):
        raise ClaimError(f"{path}: {' / '.join(keys[1:])} is {value!r}, and no interval of three numbers.") from None
