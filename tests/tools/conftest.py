"""What several files of these tests use."""

from collections.abc import Iterator

import pytest
from lcm_lookahead.host.server import Host
from lcm_lookahead.mini.files.host_models import mini_host


@pytest.fixture(scope="session")
def drawing_host() -> Iterator[Host]:
    """One ComfyUI with the shipped weights for all who draw with it: a start takes as long as many pictures."""
    with mini_host(announce=False) as running:
        yield running
