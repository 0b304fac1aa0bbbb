"""The real host in this process, with our pack loaded as the host loads any pack: by its folder alone.

The host is COMFYUI_DIR, else `.host/<HOST_VERSION>` (0.30.0 by default). Worlds have random weights (`worlds.py`): what
is compared here does not depend on what a picture shows.
"""

import asyncio
import importlib
import os
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from host_tools import HostTools
from object_info import object_info as object_info_of
from worlds import ROOT, SIZES, World, make_world

runpy.run_path(str(ROOT / "host/custom_nodes/cpu_torchvision/prestartup_script.py"))  # for diffusers in the tests


def host_directory() -> Path:
    """Where the host's tree is."""
    named = os.environ.get("COMFYUI_DIR")
    folder = Path(named) if named else ROOT / ".host" / os.environ.get("HOST_VERSION", "0.30.0")
    if not (folder / "comfy" / "samplers.py").is_file():
        pytest.exit(f"There is no ComfyUI in {folder}: call `make host`, or set COMFYUI_DIR.", returncode=3)
    return folder.resolve()


@pytest.fixture(scope="session")
def pack(tmp_path_factory):
    """The host has loaded the pack: `pack.nodes` by node id, `pack.module("nodes.conditioning.rows")` for the rest."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    sys.path.insert(0, str(host_directory()))
    from comfy.cli_args import args

    args.cpu = not torch.cuda.is_available()
    base = tmp_path_factory.mktemp("host")
    args.base_directory = str(base)
    import nodes as host_nodes

    assert asyncio.run(host_nodes.load_custom_node(str(ROOT), module_parent="custom_nodes"))
    names = [n for n in host_nodes.NODE_CLASS_MAPPINGS if n.startswith("Lookahead")]
    name = host_nodes.NODE_CLASS_MAPPINGS[names[0]].__module__.rpartition(".nodes.")[0]
    return SimpleNamespace(
        nodes={n: host_nodes.NODE_CLASS_MAPPINGS[n] for n in names},
        host_nodes=host_nodes,
        module=lambda path: importlib.import_module(f"{name}.{path}"),
        base=base,
    )


@pytest.fixture(scope="session")
def object_info(pack):
    """What GET /object_info answers for our nodes and the host's first ones, on a machine without model files."""
    return object_info_of(pack)


@pytest.fixture(autouse=True)
def _as_the_host_runs_nodes(pack):
    """The executor runs every node in inference mode."""
    with torch.inference_mode():
        yield


@pytest.fixture(scope="session")
def worlds(pack, tmp_path_factory):
    """`worlds("mini")`, `worlds("tiny")` and `worlds("sdxl")`, each built once."""
    built = {}

    def world(kind: str, **options) -> World:
        key = (kind, *options.items())
        if key not in built:
            with torch.inference_mode():
                built[key] = make_world(kind, tmp_path_factory.mktemp(kind), **options)
        return built[key]

    world.built = built
    return world


@pytest.fixture(autouse=True)
def _worlds_as_built(worlds):
    """No test sees what another patched: the host leaves patches in shared weights until it needs them otherwise."""
    import comfy.model_management

    yield
    # Some hosts fail on models that were collected before they could unload them, and others collect garbage for each
    # at every later load, which takes seconds in a long process: these are left out, and the rest is held meanwhile.
    loaded = comfy.model_management.current_loaded_models
    held = [(one, one.model) for one in loaded]
    loaded[:] = [one for one, model in held if model is not None]
    comfy.model_management.unload_all_models()
    for world in worlds.built.values():
        if world.model.backup or world.model.object_patches_backup:
            world.model.unpatch_model()  # left by those models
    loaded.clear()


@pytest.fixture(scope="session")
def sizes() -> dict:
    """The sizes of the mini world."""
    return SIZES


@pytest.fixture(scope="session")
def mini(worlds) -> World:
    return worlds("mini")


@pytest.fixture(scope="session")
def tiny(worlds) -> World:
    """The layout of the mini world in the narrowest of widths, for questions that no width changes."""
    return worlds("tiny")


@pytest.fixture(scope="session")
def tools(pack) -> HostTools:
    """Helpers that need the loaded pack, or the host."""
    return HostTools(pack)


@pytest.fixture
def flow(mini, tools):
    """The mini model switched to flow matching by the host's node."""
    return tools.host_node("nodes_model_advanced", "ModelSamplingSD3", mini.model, 3.0)


@pytest.fixture
def texts(tiny):
    """A positive and a negative text for the mini model, and for the tiny one, which reads texts of the same width."""
    return tiny.text(1), tiny.text(2)


@pytest.fixture
def split_batches(tiny, monkeypatch):
    """As if memory were so short that each condition runs alone."""
    monkeypatch.setattr(tiny.model.model, "memory_required", lambda *args, **kwargs: float("inf"))
