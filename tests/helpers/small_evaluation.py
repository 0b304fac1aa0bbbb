"""A small evaluation in diffusers on the mini world: the values of its protocol, its file, and how it is opened."""

import yaml
from lcm_lookahead.cli.world import world_of
from lcm_lookahead.evaluation.harness import protocol, run

VALUES = {
    "title": "A small one",
    "models": {"base": "mini", "image_encoder": "mini_clip_vision.safetensors", "pack": "mini"},
    "people": {"source": "drawn", "count": 3},
    "prompts": {"photo": ["a photo of a face"]},
    "seeds": [0],
    "drawing": {"size": 128, "steps": 2, "guidance": 3.0},
    "backends": ["diffusers"],
    "baseline": "adapter",
    "methods": {
        "adapter": {"kind": "encoder", "file": "mini_ip_adapter_plus_face.safetensors", "weights": [1.0, 0.5]},
        "nothing": {"kind": "none"},
        "best": {"kind": "best of", "of": "nothing", "pictures": 2, "by": {"kind": "prompt", "clip": "mini"}},
    },
    "measures": {
        "identity": {"kind": "identity", "recogniser": "mini"},
        "prompt": {"kind": "prompt", "clip": "mini"},
        "change": {"kind": "change", "clip": "mini_clip/model.safetensors"},
    },
    "full": {"people": {"count": 5}, "methods": {"adapter": {"weights": [0.25]}}},
}


def written(folder, **changed):
    """The protocol as a file of a folder, with other values for some of its sections."""
    path = folder / "protocol.yaml"
    path.write_text(yaml.safe_dump({**VALUES, "out": str(folder / "out"), **changed}), encoding="utf-8")
    return path


def evaluation(path, overrides=(), **options):
    """An evaluation of a protocol's file."""
    settings = protocol.load(path, overrides)
    return run.EvaluationRun(settings, world_of(settings), **options)
