"""What stays when processes are killed, as by a lost machine: SIGKILL at twenty random moments, two workers at a time.

Slow: two processes start forty times (`make portable` runs it too).
"""

import random
import runpy
import sys
import time

import fresh
import pytest
import torch
from lcm_lookahead.cli import main
from lcm_lookahead.lookahead.files.tensors import read_tensors
from lcm_lookahead.trainer.config import CONFIGS
from lcm_lookahead.trainer.data import prepare as preparing
from lcm_lookahead.trainer.data.shards import Shards
from lcm_lookahead.trainer.data.store import Store

pytestmark = pytest.mark.slow
KILLS, PEOPLE, STRETCH = 20, 240, 6
DRAWN = [str(CONFIGS / "generate/drawn.yaml"), f"shards={PEOPLE}", "people_per_shard=1", "prompts.per_person=3"]
DRAWN += ["generator.size=64", "generator.batch=2"]


def the_command(*said):
    preparing.STRETCH = STRETCH  # shards of few pictures, so that there are many
    sys.argv[1:] = said
    runpy.run_module("lcm_lookahead.cli.main", run_name="__main__")


def training(source, cache, out):
    values = [f"data.source={source}", f"data.cache={cache}", f"out={out}", "data.size=64", "data.read_batch=3"]
    values += ["batch=2", "steps=100", "validate_every=0", "precision=fp32", "workers=0"]
    return [str(CONFIGS / "mini.yaml"), *values]


def finished(folder):
    """The files of shards that have an index, which is written last."""
    files = list(folder.iterdir()) if folder.is_dir() else []
    done = {path.name.removesuffix(".index.json") for path in files if path.name.endswith(".index.json")}
    own = [path for path in files if not path.name.endswith(".times.json")]
    return {path.name: path.read_bytes() for path in own if path.name.partition(".")[0] in done}


def entries(folder):
    """All names, also of what is half-written."""
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def killed(command, folder, whole, said):
    """Two workers do the work and are killed together, twenty times; what they have finished is looked at each time."""
    chance, seen = random.Random(1), []
    while len(seen) < KILLS:
        if finished(folder) == whole:  # sooner than it was killed often enough: half of it is made again
            again = sorted({name.partition(".")[0] for name in whole})[::2]
            for path in [path for path in folder.iterdir() if path.name.partition(".")[0] in again]:
                path.unlink()
        before = entries(folder)
        both = [fresh.start(the_command, *command, "--worker", f"{n}/2", output=said / f"{n}") for n in range(2)]
        while entries(folder) == before:  # nothing can be lost before that
            assert any(p.is_alive() for p in both), (said / "0").read_text()
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.5))
        for process in both:
            process.kill()
            process.join()
        there = finished(folder)
        assert there.items() <= whole.items()
        seen.append(len(there))
    print(f"{KILLS} kills; files of finished shards after each: {seen}")
    assert len(set(seen)) > KILLS // 2  # and it was killed at work


def test_what_two_killed_workers_leave_goes_on_to_the_same_bytes_and_trains_to_the_same_bits(tmp_path):
    made, left, said = (tmp_path / name for name in ("made", "left", "said"))
    said.mkdir()
    main.main(["generate", *DRAWN, f"out={made}"])
    whole = finished(made)
    killed(["generate", *DRAWN, f"out={left}"], left, whole, said)
    main.main(["generate", *DRAWN, f"out={left}"])
    assert finished(left) == whole and Shards(Store(left))
    assert not list(left.glob(".*"))  # nothing half-written

    keeping, encoders = {}, {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparing, "STRETCH", STRETCH)
        main.main(["prepare", *training(made, tmp_path / "kept", tmp_path / "none")])
        features = finished(tmp_path / "kept/features")
        again = training(left, tmp_path / "torn", tmp_path / "none")
        killed(["prepare", *again], tmp_path / "torn/features", features, said)
        main.main(["prepare", *again])
        assert finished(tmp_path / "torn/features") == features
        for name, source, cache in (("whole", made, "kept"), ("killed", left, "torn")):
            main.main(["train", *training(source, tmp_path / cache, tmp_path / name), "steps=3"])
            keeping[name] = len(list((tmp_path / cache / "features").iterdir()))
            encoders[name] = read_tensors(tmp_path / name / "mini_encoder.safetensors")[0]
    assert keeping["whole"] == keeping["killed"] == len(features)  # it has read what was made
    assert encoders["whole"].keys() == encoders["killed"].keys()
    assert all(torch.equal(value, encoders["killed"][name]) for name, value in encoders["whole"].items())
