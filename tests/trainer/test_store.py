"""Shards that lie elsewhere: in fsspec's memory, and behind a server that goes away in the middle."""

import functools
import http.server
import os
import threading
import uuid

import pytest
from lcm_lookahead.mini.generator import DrawnWorld
from lcm_lookahead.trainer.config import CONFIGS
from lcm_lookahead.trainer.data import store as stores
from lcm_lookahead.trainer.data.generate.checks import Inspector
from lcm_lookahead.trainer.data.generate.config import load
from lcm_lookahead.trainer.data.generate.engine import Engine
from lcm_lookahead.trainer.data.generate.report import write_report
from lcm_lookahead.trainer.data.sharded import ShardPictures
from lcm_lookahead.trainer.data.shards import PEOPLE, Shards, shard_name
from lcm_lookahead.trainer.data.store import Store, StoreError
from lcm_lookahead.trainer.data.tars import ShardError, read_index
from lcm_lookahead.trainer.lookahead.config import Config, cache_folder


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(stores, "PAUSES", (0.0,))


def engine(out, *more):
    values = [f"out={out}", "shards=2", "people_per_shard=2", "prompts.per_person=2", "checks.detector=null", *more]
    config = load(CONFIGS / "generate/drawn.yaml", [*values, "checks.recogniser=null", "checks.clip=null"])
    return Engine(config, DrawnWorld(64), Inspector(None, None, None, {}, "none"))


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    out = tmp_path_factory.mktemp("local")
    for number in engine(out).missing(range(2)):
        engine(out).make_shard(number)
    return out


@pytest.fixture
def memory():
    return f"memory://{uuid.uuid4().hex}/people"


@pytest.fixture
def server(local):
    """Serves the local shards; its address, and what ends it."""
    handler = functools.partial(_Quiet, directory=str(local))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()

        def stop():
            if thread.is_alive():
                running.shutdown()
                thread.join()
                running.server_close()

        yield f"http://127.0.0.1:{running.server_port}", stop
        stop()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def test_a_set_is_made_and_reported_in_a_store_elsewhere_with_the_same_bytes(local, memory, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    there = engine(memory)
    assert there.missing(range(2)) == [0, 1]
    there.make_shard(1)
    assert engine(memory).missing(range(2)) == [0]
    there.make_shard(0)
    assert not engine(memory).missing(range(2))
    store = Store(memory, tmp_path / "cache")
    for path in local.glob("shard-*"):
        if "times" not in path.name:
            assert store.read([path.name])[0] == path.read_bytes(), path.name
    assert write_report(there.config) == f"{memory}/report.html" and store.exists("report.html")
    with pytest.raises(ShardError, match="made with another configuration"):
        engine(memory, "seed=1").missing([0])


def test_pictures_elsewhere_are_those_of_here_and_are_fetched_once(local, server, tmp_path):
    address, stop = server
    here, there = Shards(Store(local)), Shards(Store(address, tmp_path))
    assert there.digest == here.digest and not list(tmp_path.glob("*.tar"))  # opened by indexes alone
    assert there.picture(0) == here.picture(0) and there.about(1) == here.about(1)
    assert len(list(tmp_path.glob("*.tar"))) == 1  # whole, since the next picture is asked for soon
    last = len(here) - 1
    stop()
    assert there.picture(1) == here.picture(1)
    with pytest.raises(StoreError, match="does not answer .*: see that it and the network are there; the same") as said:
        there.picture(last)
    assert "\n" not in str(said.value) and not list(tmp_path.glob(".*.part"))
    with pytest.raises(StoreError, match="does not answer"):
        Shards(Store(address, tmp_path))


def test_a_source_may_be_an_address(local, server, tmp_path):
    values = [f"data.source={server[0]}", "data.size=64", f"data.cache={tmp_path}"]
    pictures = ShardPictures(Config.load(CONFIGS / "mini.yaml", values), False)
    assert pictures.crop(0, False)[0].shape == (1, 3, 64, 64) and pictures.digest()
    assert (
        cache_folder(Config.load(CONFIGS / "mini.yaml", ["data.source=s3://bucket/people"]).data).name == "people.cache"
    )


def test_a_copy_that_is_not_what_its_index_says_is_refused_and_not_kept(local, server, tmp_path):
    shards = Shards(Store(server[0], tmp_path))
    shards.hashes[0] = "0" * 64
    with pytest.raises(StoreError, match="is not what its index says"):
        shards.picture(0)
    assert not list(tmp_path.glob("*.tar"))
    index = read_index(Store(server[0], tmp_path), shard_name(0), PEOPLE, whole=True)
    assert index["sha256"] == Shards(Store(local)).hashes[0]


def test_a_store_that_is_away_or_unknown_is_said_and_what_is_finished_stays(memory, tmp_path, monkeypatch):
    made = engine(memory)
    made.make_shard(0)
    from fsspec.implementations.memory import MemoryFileSystem

    def away(*_, **__):
        raise ConnectionError("the line is dead")

    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "put_file", away)
        with pytest.raises(StoreError, match="does not answer .the line is dead.: see that"):
            made.make_shard(1)
    assert engine(memory).missing(range(2)) == [1]
    with pytest.raises(StoreError, match="nothing://x cannot be reached|nothing://x does not answer"):
        Store("nothing://x", tmp_path).names()


def test_who_writes_a_file_that_another_is_writing_takes_nothing_away_from_it(tmp_path):
    """As two processes that make the same shard at once; what a dead one has left goes."""
    store = Store(tmp_path)
    for name in (".one.0123.part", ".one.4567.part", ".one.4567.lock", ".one.89ab.lock"):
        (tmp_path / name).write_bytes(b"of a process that was killed")
    with store.writing("one") as slow:
        slow.write_bytes(b"half of")
        with store.writing("one") as fast:
            fast.write_bytes(b"it")
        assert {p.name for p in tmp_path.iterdir()} == {slow.name, slow.with_suffix(".lock").name, "one"}
        assert (tmp_path / "one").read_bytes() == b"it"
        slow.write_bytes(b"all of it")
    assert [p.name for p in tmp_path.iterdir()] == ["one"] and (tmp_path / "one").read_bytes() == b"all of it"


def test_a_lock_that_is_taken_away_before_it_is_held_is_made_again(tmp_path, monkeypatch):
    """By another process that found it open, so took it for a dead one's; a part without a lock would be next."""
    held, asked = stores.fcntl.flock, []

    def late(file, how):
        asked.append(file.name)
        if len(asked) == 1:
            os.unlink(file.name)
        held(file, how)

    monkeypatch.setattr(stores.fcntl, "flock", late)
    with Store(tmp_path).writing("one") as part:
        assert part.with_suffix(".lock").is_file() and len(asked) == 2
        part.write_bytes(b"all of it")
    assert [p.name for p in tmp_path.iterdir()] == ["one"]
