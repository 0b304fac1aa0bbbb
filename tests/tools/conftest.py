"""What several files of these tests use."""

from collections.abc import Iterator

import pytest
import vocabularies
from lcm_lookahead.host.server import Host
from lcm_lookahead.mini.files.host_models import mini_host


@pytest.fixture(autouse=True, scope="session")
def vocabularies_are_read_once() -> Iterator[None]:
    with vocabularies.read_once():
        yield


@pytest.fixture(scope="session")
def drawing_host() -> Iterator[Host]:
    """One ComfyUI with the shipped weights for all who draw with it: a start takes as long as many pictures."""
    with mini_host(announce=False) as running:
        yield running
