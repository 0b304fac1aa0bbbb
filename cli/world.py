"""What an evaluation is run with beside its protocol: models, judges and hosts, of files or of the mini world."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from ..evaluation.harness.backends import ModelFiles
from ..evaluation.harness.library import EvaluationError, Library
from ..evaluation.harness.protocol import Protocol
from ..evaluation.harness.run import Surroundings
from ..host.client import Client
from ..host.server import Host
from ..lookahead.files.atomic import first_line
from .assemble import read_recogniser
from .bases import KnownBase, known_base


def library_of(protocol: Protocol) -> Library:
    """The library of a protocol: files lie as they are named, or beside a base that is known."""
    from ..mini import judges
    from ..mini.plan import HERE

    base = known_base(protocol.models.base)
    beside = (base.beside, HERE / "trained") if base else ()
    packs = {protocol.models.base: base.own["detector"]} if base else {}
    return Library(beside, judges.EMBEDDERS, judges.SCORERS, read_recogniser, packs)


def world_of(protocol: Protocol) -> Surroundings:
    """All of it. Raises EvaluationError, one sentence, for a file that is not there."""
    from ..mini import judges

    base, library = known_base(protocol.models.base), library_of(protocol)
    return Surroundings(
        files=model_files(protocol, base, library),
        library=library,
        open_host=opener(protocol, base),
        sources={"drawn": judges.drawn_people},
        measures=judges.MEASURES,
        methods={},
    )


def model_files(protocol: Protocol, base: KnownBase | None, library: Library) -> ModelFiles:
    """The files of `models`, found."""
    models = protocol.models

    def path(field: str) -> Path | None:
        name = getattr(models, field)
        return None if name is None else library.find(f"models.{field}", name)

    folder = base.folder if base else library.find("models.base", models.base)
    checkpoint = base.checkpoint if base else folder if folder.is_file() else None
    encoder = path("image_encoder")
    pack = library.pack_folder(models.pack) if models.pack else None
    return ModelFiles(
        checkpoint, folder, encoder, base.own["image_encoder"] if base else encoder, path("few_step"), pack
    )


def opener(
    protocol: Protocol, base: KnownBase | None
) -> Callable[[Callable[[Path], None]], AbstractContextManager[Client]]:
    """Chooses how a host is opened: one that runs already, the mini world's, or one started with these models."""
    url = protocol.host.url

    @contextmanager
    def running(put: Callable[[Path], None]) -> Iterator[Client]:
        client = Client((url or "").rstrip("/"), None)
        try:
            client.object_info()
        except (OSError, ValueError) as error:
            raise EvaluationError(
                f"host.url is {url}, where no ComfyUI answers ({first_line(error)}): start it, or leave host.url out."
            ) from None
        yield client

    def started(put: Callable[[Path], None]) -> AbstractContextManager[Client]:
        if base is None:
            return Host(prepare=put)
        from ..mini.files.host_models import mini_host

        return mini_host(prepare=put)

    return running if url else started
