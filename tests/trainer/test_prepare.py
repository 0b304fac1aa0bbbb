"""What the frozen models see, made ahead as shards: the same bytes whoever makes them and whenever they are killed;
batches that workers read ahead are those that are computed."""

import os
import pickle
import random
import subprocess
import sys

import pytest
import torch
from lcm_lookahead.cli import main
from lcm_lookahead.cli.assemble import open_models_and_source
from lcm_lookahead.trainer.ahead import Ahead
from lcm_lookahead.trainer.config import CONFIGS
from lcm_lookahead.trainer.data import prepare as preparing
from lcm_lookahead.trainer.data.features import FeatureReader, PreparedFeatures
from lcm_lookahead.trainer.data.pairs import DataError
from lcm_lookahead.trainer.data.source import PictureSource
from lcm_lookahead.trainer.lookahead.config import Config
from lcm_lookahead.trainer.seeds import order

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    out = tmp_path_factory.mktemp("generated") / "drawn"
    more = ["shards=2", "people_per_shard=2", "prompts.per_person=3", "generator.size=64"]
    main.main(["generate", str(CONFIGS / "generate/drawn.yaml"), f"out={out}", *more])
    return out


def asked(drawn, cache, *more):
    small = [f"data.source={drawn}", "data.size=64", f"data.cache={cache}", "batch=2", "steps=6", "validate_every=0"]
    return [*small, "precision=fp32", "workers=0", "data.read_batch=3", *more]


def settings(drawn, cache, *more):
    return Config.load(CONFIGS / "mini.yaml", asked(drawn, cache, *more))


@pytest.fixture(scope="module")
def loaded(drawn):
    return open_models_and_source(settings(drawn, "nowhere"))


@pytest.fixture
def short(monkeypatch):
    """Shards of few pictures, so that there are several."""
    monkeypatch.setattr(preparing, "STRETCH", 3)


def opened(loaded, config):
    """A source of this configuration, with the models that are loaded already."""
    return PictureSource(config, loaded.pictures, loaded.models, loaded.recogniser, loaded.detector)


def written(cache):
    return {path.name: path.read_bytes() for path in (cache / "features").iterdir()}


def batch_of(source, first=0, count=4):
    numbers = range(first, first + count)
    return source.batch(order(len(source), source.config.seed, numbers), numbers, CPU)


def assert_equal(one, other, **tolerance):
    assert one.names == other.names
    for name in ("target", "reference", "features"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), **tolerance)
    torch.testing.assert_close(one.text.context, other.text.context, **tolerance)
    torch.testing.assert_close(one.reference_text.pooled, other.reference_text.pooled, **tolerance)
    known, made = one.loss.references, other.loss.references
    torch.testing.assert_close(known.embeddings, made.embeddings, **tolerance)
    assert torch.equal(known.points, made.points)


def test_two_workers_that_are_killed_twenty_times_write_what_one_writes_in_one_go(
    loaded, drawn, tmp_path, short, monkeypatch
):
    whole = opened(loaded, settings(drawn, tmp_path / "whole"))
    whole.prepare(CPU)
    assert len(written(tmp_path / "whole")) >= 8  # four shards with their indexes
    see, chance, kills = FeatureReader.see, random.Random(0), 0

    def killed(self, *asked):
        if chance.random() < 0.5:
            raise KeyboardInterrupt
        return see(self, *asked)

    monkeypatch.setattr(FeatureReader, "see", killed)
    halves = opened(loaded, settings(drawn, tmp_path / "halves"))
    for turn in range(200):
        if kills == 20:
            monkeypatch.setattr(FeatureReader, "see", see)
        try:
            halves.prepare(CPU, (turn % 2, 2))
        except KeyboardInterrupt:
            kills += 1
        if kills == 20 and not halves.missing().chunks:
            break
        if not halves.missing().chunks:  # all is there before it was killed often enough: anew, from the middle
            for path in sorted((tmp_path / "halves/features").iterdir())[::2]:
                path.unlink()
    assert kills == 20 and written(tmp_path / "halves") == written(tmp_path / "whole")


def test_what_is_kept_gives_the_batches_that_are_computed_and_is_not_computed_again(
    loaded, drawn, tmp_path, short, monkeypatch
):
    kept = opened(loaded, settings(drawn, tmp_path))
    kept.prepare(CPU)
    fresh = opened(loaded, settings(drawn, tmp_path, "data.keep=false"))
    made = batch_of(fresh)

    def see(*_):
        raise AssertionError("it is computed again")

    monkeypatch.setattr(FeatureReader, "see", see)
    monkeypatch.setattr(FeatureReader, "text", see)
    again = opened(loaded, settings(drawn, tmp_path))
    again.prepare(CPU)
    assert_equal(batch_of(again), made, atol=1e-4, rtol=1e-4)  # last bits: read in batches
    assert_equal(batch_of(again), batch_of(kept), atol=0, rtol=0)
    with pytest.raises(AssertionError, match="computed again"):
        batch_of(opened(loaded, settings(drawn, tmp_path / "elsewhere")))


def test_a_longer_run_adds_shards_and_leaves_the_others(loaded, drawn, tmp_path, short):
    opened(loaded, settings(drawn, tmp_path, "steps=1")).prepare(CPU)
    before = written(tmp_path)
    longer = opened(loaded, settings(drawn, tmp_path))
    work = longer.missing()
    assert work.there > 0 and work.chunks
    longer.prepare(CPU)
    after = written(tmp_path)
    assert before.items() < after.items() and not longer.missing().chunks
    assert work.bytes * 0.5 < sum(map(len, after.values())) - sum(map(len, before.values())) < work.bytes * 1.5


def test_a_damaged_shard_is_made_again(loaded, drawn, tmp_path, short):
    source = opened(loaded, settings(drawn, tmp_path))
    source.prepare(CPU)
    before = written(tmp_path)
    one = next(path for path in sorted((tmp_path / "features").iterdir()) if path.suffix == ".tar")
    one.write_bytes(before[one.name][:700])
    assert len(PreparedFeatures(tmp_path / "features").names) == len(before) // 2 - 1
    opened(loaded, settings(drawn, tmp_path)).prepare(CPU)
    assert written(tmp_path) == before


@pytest.mark.parametrize("kept", [True, False])
def test_batches_are_the_same_bits_with_any_number_of_workers_and_from_any_step(loaded, drawn, tmp_path, kept):
    source = opened(loaded, settings(drawn, tmp_path, f"data.keep={kept}"))
    source.prepare(CPU)
    loader = pickle.loads(pickle.dumps(source.loader))  # as another process gets it
    assert not any(isinstance(value, torch.nn.Module) for value in vars(loader).values())
    jobs = [(order(len(source), 0, [n]), [n]) for n in range(3)]
    alone = [source.finish(one, CPU) for one in Ahead(loader, jobs, 0)]
    for workers, first in ((1, 0), (2, 1)):
        ahead = Ahead(loader, iter(jobs[first:]), workers)
        for one, other in zip(alone[first:], ahead, strict=True):
            assert_equal(source.finish(other, CPU), one, atol=0, rtol=0)
        ahead.close()


def test_an_error_in_a_worker_is_the_sentence_that_it_says(tmp_path):
    ahead = Ahead(_Fails(), [1, 2], 1)
    assert next(ahead) == 1
    with pytest.raises(DataError, match="^two is too many$"):
        next(ahead)
    ahead.close()


class _Fails:
    def __call__(self, job):
        if job == 2:
            raise DataError("two is too many")
        return job


def test_a_disk_that_is_too_small_is_said_before_anything_is_read(loaded, drawn, tmp_path, monkeypatch):
    monkeypatch.setattr(preparing, "free", lambda folder: 1000)
    with pytest.raises(DataError, match="takes .* GB, and .* has 1e-06 GB free: free some space, set data.cache"):
        opened(loaded, settings(drawn, tmp_path)).prepare(CPU)
    assert not (tmp_path / "features").exists()


@pytest.mark.parametrize("finished", [2, 3])
def test_a_disk_that_is_full_in_the_middle_keeps_what_is_finished(
    loaded, drawn, tmp_path, short, monkeypatch, finished
):
    """Full after so many files, so while a tar is written, or its index."""
    opened(loaded, settings(drawn, tmp_path / "whole")).prepare(CPU)
    whole = written(tmp_path / "whole")
    assert len(whole) >= 8  # four shards with their indexes
    sync, synced = os.fsync, []

    def full(file):
        if len(synced) == finished:
            raise OSError(28, "No space left on device")
        synced.append(file)
        sync(file)

    command = ["prepare", str(CONFIGS / "mini.yaml"), *asked(drawn, tmp_path / "full")]
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as caught:
        patch.setattr("lcm_lookahead.trainer.data.store.os.fsync", full)
        main.main(command)
    said = str(caught.value)
    assert "cannot be kept in" in said and "(No space left on device): free some space" in said and "\n" not in said
    there = written(tmp_path / "full")
    assert there.items() < whole.items() and len(there) == finished  # whole files alone, and no part of one
    main.main(command)
    assert written(tmp_path / "full") == whole


def test_the_command_says_what_is_missing_makes_it_and_says_that_it_is_there(drawn, tmp_path, capsys):
    values = [
        f"data.source={drawn}",
        "data.size=64",
        f"data.cache={tmp_path}",
        "steps=1",
        "batch=1",
        "lookahead.arm=none",
    ]
    command = ["prepare", str(CONFIGS / "mini.yaml"), *values, "validate_every=0", "workers=0"]
    main.main([*command, "--worker", "0/1"])
    said = capsys.readouterr()
    assert "pictures and" in said.err and "GB are free" in said.err and "Written: " in said.out
    main.main([*command, "--dry-run"])
    assert "Everything that the run will read is in" in capsys.readouterr().out


def test_a_process_that_ends_in_the_middle_ends_its_workers_though_they_ignore_signals():
    code = (
        "from lcm_lookahead.trainer.ahead import Ahead\n"
        "kept = Ahead(abs, iter(range(9)), 1)\nassert next(kept) == 0\nraise SystemExit(3)"
    )
    done = subprocess.run([sys.executable, "-c", code], timeout=300, check=False)
    assert done.returncode == 3
