"""`lookahead schema`: JSON schemas of configurations, for editors."""

from __future__ import annotations

import json
from typing import Annotated, Literal

import typer

Kind = Literal["train", "generate", "guide"]


def schema(
    kind: Annotated[Kind, typer.Argument(help="Command whose files it is for.")] = "train",
) -> None:
    """Print the JSON schema of a configuration. Editors complete and check YAML files by it.

    \b
    lookahead schema train > train.schema.json
    and as the first line of a configuration beside it:
    # yaml-language-server: $schema=train.schema.json
    """
    print(text(kind), end="")


def text(kind: str) -> str:
    """The schema as the file that is shipped beside the configurations has it."""
    from ..trainer.config import Section
    from ..trainer.data.generate.config import GenerateConfig
    from ..trainer.lookahead.config import Config
    from ..trainer.noise_guide.config import NoiseGuideConfig
    from ..trainer.schema import schema_of

    kinds: dict[str, type[Section]] = {"train": Config, "generate": GenerateConfig, "guide": NoiseGuideConfig}
    return json.dumps(schema_of(kinds[kind]), indent=1, ensure_ascii=False) + "\n"
