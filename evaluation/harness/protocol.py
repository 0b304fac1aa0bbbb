"""What an evaluation is: one YAML file, which anyone can run again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from ...lookahead.files.atomic import first_line
from ...trainer.config import ConfigError, Count, Section, read_values, set_value, validated
from ..unique_keys import DuplicateKeyError, load_yaml
from .library import EvaluationError
from .measures import MEASURES, MeasureKind
from .methods import METHODS, Method
from .sections import DrawingOptions, HostOptions, ModelNames, People, Plot, Prompt, Seed

PROTOCOLS = Path(__file__).parents[1] / "protocols"
PROMPTS = PROTOCOLS / "prompts.yaml"  # the kinds of the paper's prompts, which ship
SHIPPED = "shipped"
FULL = "full"  # the section of a file that --full puts over the others


class Protocol(Section):
    """An evaluation."""

    title: str = "Evaluation"
    out: str | None = Field(None, description="folder of all that is written; by default output/evaluate/NAME")
    models: ModelNames
    people: People
    prompts: str | dict[str, tuple[str, ...]] = Field(
        SHIPPED, description="`shipped`, a file (.txt with a prompt a line, .yaml with lists by kind), or lists by kind"
    )
    kinds: tuple[str, ...] | None = Field(None, description="kinds of prompts to take; by default all")
    prompts_a_kind: Count | None = Field(None, description="prompts to take of each kind; by default all")
    seeds: tuple[Seed, ...] = (0,)
    drawing: DrawingOptions = DrawingOptions()
    backends: tuple[str, ...] = ("host",)
    host: HostOptions = HostOptions()
    methods: dict[str, dict[str, Any]]
    measures: dict[str, dict[str, Any]]
    baseline: str | None = Field(None, description="the method that differences are over; by default the first")
    plot: Plot = Plot()

    def parsed_methods(self, kinds: Mapping[str, type[Method]] = METHODS) -> dict[str, Method]:
        """Makes the methods of their sections. Raises ConfigError for an unknown kind or field."""
        return {name: of_kind("methods", name, values, kinds) for name, values in self.methods.items()}

    def parsed_measures(self, kinds: Mapping[str, type[MeasureKind]] = MEASURES) -> dict[str, MeasureKind]:
        """Makes the measures of their sections. Raises ConfigError for an unknown kind or field."""
        return {name: of_kind("measures", name, values, kinds) for name, values in self.measures.items()}

    def prompt_list(self) -> list[Prompt]:
        """Lists the prompts that are drawn. Raises EvaluationError, one sentence, for a file that is no list."""
        lists = read_prompts(self.prompts)
        if self.kinds is not None and (unknown := [k for k in self.kinds if k not in lists]):
            raise EvaluationError(f"kinds names {unknown[0]!r}, and the prompts have {', '.join(lists)}: use these.")
        chosen = [(kind, text) for kind in self.kinds or lists for text in lists[kind][: self.prompts_a_kind]]
        if not chosen:
            raise EvaluationError(f"prompts is {self.prompts!r}, which holds no prompt: write at least one.")
        return [Prompt(number=number, kind=kind, text=text) for number, (kind, text) in enumerate(chosen)]


def load(path: Path, overrides: Sequence[str] = (), full: bool = False) -> Protocol:
    """Read a protocol. full: with its section `full` over the rest. Raises ConfigError, which lists all that is wrong.

    `methods` and `measures` of `full` are added to the others; every other section is merged key by key.
    """
    values = read_values(path)
    larger = values.pop(FULL, None)
    if full and not isinstance(larger, dict):
        raise ConfigError(f"{path} has no section `{FULL}`, which --full asks for: leave the flag out.")
    if full:
        _merge(values, larger)
    for override in overrides:
        set_value(values, override)
    values.setdefault("out", str(Path("output") / "evaluate" / (path.stem + (f"-{FULL}" if full else ""))))
    return validated(Protocol, values)


def _merge(below: dict[str, Any], above: Mapping[str, Any]) -> None:
    for key, value in above.items():
        if isinstance(value, dict) and isinstance(below.get(key), dict):
            _merge(below[key], value)
        else:
            below[key] = value


def of_kind(section: str, name: str, values: Mapping[str, Any], kinds: Mapping[str, type[Any]]) -> Any:
    """Makes an entry of a section, by its kind. Raises ConfigError for an unknown kind or field."""
    kind = str(values.get("kind"))
    if kind not in kinds:
        raise ConfigError(f"{section}.{name}.kind is {kind!r}: use one of {', '.join(kinds)}.")
    try:
        return validated(kinds[kind], {k: v for k, v in values.items() if k != "kind"})
    except ConfigError as error:
        raise ConfigError("\n".join(f"{section}.{name}: {line}" for line in str(error).splitlines())) from None


def read_prompts(source: str | Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Lists of prompts by kind, as `Protocol.prompts` says it. Raises EvaluationError, one sentence."""
    if not isinstance(source, str):
        return {kind: list(texts) for kind, texts in source.items()}
    path = PROMPTS if source == SHIPPED else Path(source).expanduser()
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise EvaluationError(
            f"prompts names {source}, which cannot be read ({error.strerror}): give a file."
        ) from None
    except UnicodeDecodeError as error:
        raise EvaluationError(
            f"{path} is not in UTF-8 (byte {error.object[error.start]:#04x} at place {error.start}): save it again as "
            "UTF-8, in your editor's menu of encodings."
        ) from None
    if path.suffix.lower() not in (".yaml", ".yml"):
        return {"prompt": [line.strip() for line in text.replace("\r", "\n").split("\n") if line.strip()]}
    try:
        lists = load_yaml(text)
    except DuplicateKeyError as error:
        raise EvaluationError(f"{path}: {error}: leave one out.") from None
    except yaml.YAMLError as error:
        raise EvaluationError(f"{path} is no YAML ({first_line(error)}): write lists by kind.") from None
    if not isinstance(lists, dict) or not all(
        isinstance(v, list) and all(isinstance(t, str) for t in v) for v in lists.values()
    ):
        raise EvaluationError(f"{path} is no list of prompts: write, by kind, a list of texts, as {PROMPTS} has it.")
    return lists
