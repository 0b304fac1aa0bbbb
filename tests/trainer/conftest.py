"""The trainer is imported before diffusers: its cure for torchvision on a CPU torch must come first."""

import lcm_lookahead.trainer  # noqa: F401
import pytest
import vocabularies


@pytest.fixture(autouse=True, scope="session")
def vocabularies_are_read_once():
    with vocabularies.read_once():
        yield


@pytest.fixture(autouse=True)
def one_run_a_process():
    """accelerate keeps a process at the precision of its first run; every test is a process of its own to it."""
    yield
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()
