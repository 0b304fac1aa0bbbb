"""`lookahead schema`: JSON schemas of configurations, for editors."""

from __future__ import annotations

import functools
import json
import operator
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from ..trainer.config import Section

ConfigKind = Literal["train", "generate", "guide", "concept", "evaluate"]


def schema(
    kind: Annotated[ConfigKind, typer.Argument(help="Command whose files it is for.")] = "train",
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
    from ..trainer.concept.config import ConceptConfig
    from ..trainer.data.generate.config import GenerateConfig
    from ..trainer.lookahead.config import Config
    from ..trainer.noise_guide.config import NoiseGuideConfig
    from ..trainer.schema import schema_of

    kinds: dict[str, type[Section]] = {
        "train": Config,
        "generate": GenerateConfig,
        "guide": NoiseGuideConfig,
        "concept": ConceptConfig,
    }
    return json.dumps(schema_of(kinds.get(kind) or protocol_section()), indent=1, ensure_ascii=False) + "\n"


def protocol_section() -> type[Section]:
    """Makes the fields of a protocol as a file has them: entries with those of their kinds, and the section `full`.

    What must be given may stand in the rest of the file, over which `full` is laid.
    """
    from pydantic import Field, create_model

    from ..evaluation.harness.measures import MEASURES
    from ..evaluation.harness.methods import METHODS
    from ..evaluation.harness.protocol import Protocol
    from ..mini import judges

    def entries(kinds: Mapping[str, type[Section]], about: str) -> Any:
        """The type of a section whose entries are of one of these kinds, and what an editor says of it."""
        named = [
            create_model(
                kind.__name__,
                __base__=kind,
                __doc__=kind.__doc__,
                chosen=(str, Field(alias="kind", json_schema_extra={"const": name})),
            )
            for name, kind in kinds.items()
        ]
        return dict[str, functools.reduce(operator.or_, named)], Field(description=about)  # type: ignore[misc]

    sections = create_model(
        "Protocol",
        __base__=Protocol,
        __doc__=Protocol.__doc__,
        methods=entries(METHODS, "what is compared, by its name in tables"),
        measures=entries({**MEASURES, **judges.MEASURES}, "what judges pictures, by its name in tables"),
    )
    over = Field(None, description="what --full puts over the other sections")
    return create_model("ProtocolFile", __base__=sections, __doc__=Protocol.__doc__, full=(sections | None, over))
