"""Shards: the same bytes every time, readable by webdataset, and an index that is refused where it does not belong."""

import errno
import json
import os
import shutil
import time

import pytest
import webdataset
from lcm_lookahead.trainer.data import store as stores
from lcm_lookahead.trainer.data.shards import (
    PEOPLE,
    Sample,
    Shards,
    finished,
    shard_index,
    shard_name,
    side_name,
    write_shard,
)
from lcm_lookahead.trainer.data.store import Store
from lcm_lookahead.trainer.data.tars import ShardError, index_name, read_index, write_index


def people(first, count=3):
    """Samples of 2, 3, 4, ... pictures, whose bytes tell which they are."""
    for number in range(first, first + count):
        names = [f"{n:02}.png" for n in range(2 + number - first)]
        pictures = {name: f"picture {name} of {number} ".encode() * 40 for name in names}
        listed = [{"file": name, "caption": f"caption {name}", "reference": name == "00.png"} for name in names]
        yield Sample(f"{number:08}", pictures, {"person": number, "pictures": listed})


@pytest.fixture
def folder(tmp_path):
    for number in range(3):
        write_shard(Store(tmp_path), shard_name(number), people(10 * number), {"people": 3}, "content")
    return tmp_path


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_same_samples_give_the_same_bytes_at_another_time(folder, tmp_path_factory, monkeypatch):
    again = tmp_path_factory.mktemp("again")
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 1e6)
    for number in range(3):
        write_shard(Store(again), shard_name(number), people(10 * number), {"people": 3}, "content")
    assert files(again) == files(folder) and len(files(folder)) == 9


def test_webdataset_reads_what_is_written(folder):
    urls = str(folder / "shard-{000000..000002}.tar")
    read = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [sample["__key__"] for sample in read] == [f"{10 * s + n:08}" for s in range(3) for n in range(3)]
    assert read[1]["02.png"] == b"picture 02.png of 1 " * 40
    assert json.loads(read[1]["json"])["person"] == 1


def test_pictures_and_samples_are_found_by_their_numbers(folder):
    opened = Shards(Store(folder))
    assert len(opened) == 3 * (2 + 3 + 4) and opened.keys.tolist() == [0, 1, 2, 10, 11, 12, 20, 21, 22]
    for number in range(len(opened)):
        sample = int(opened.sample_of[number])
        place = number - int(opened.first[sample])
        assert opened.picture(number) == f"picture {place:02}.png of {opened.keys[sample]} ".encode() * 40
        assert opened.about(sample)["person"] == opened.keys[sample]
        assert opened.reference[number] == (place == 0)


def test_an_index_can_be_made_again_from_the_tar(folder):
    shard = shard_name(1)
    path = folder / index_name(shard)
    before = path.read_bytes()
    path.unlink()
    write_index(Store(folder), shard, shard_index(folder / shard, shard, "content"))
    assert path.read_bytes() == before


def test_a_killed_run_leaves_the_shard_unfinished_and_its_remains_go_with_the_next(folder, monkeypatch):
    store, shard, before = Store(folder), shard_name(0), files(folder)

    def killed(samples):
        yield from list(people(0))[:1]
        raise KeyboardInterrupt

    (folder / ".shard-000000.tar.0123.part").write_bytes(b"of a process that was killed")
    with pytest.raises(KeyboardInterrupt):
        write_shard(store, shard, killed(0), {}, "content")
    assert not finished(store, shard, "content") and finished(store, shard_name(1), "content")
    write_shard(store, shard, people(0), {"people": 3}, "content")
    assert files(folder) == before


def test_a_full_disk_is_one_sentence_and_leaves_nothing_half_written(folder, tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(stores.os, "fsync", full)
    with pytest.raises(ShardError, match="cannot be written .No space left on device.: free some space") as caught:
        write_shard(Store(tmp_path / "new"), shard_name(0), people(0), {}, "content")
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "new").iterdir())


def refused(folder):
    with pytest.raises(ShardError) as caught:
        Shards(Store(folder))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_truncated_shard_is_refused(folder):
    shard = folder / shard_name(1)
    os.truncate(shard, 5000)
    assert f"{shard} is cut short (5000 of" in refused(folder)
    assert not finished(Store(folder), shard.name, "content")
    with pytest.raises(ShardError, match="cut short or no shard"):
        shard_index(shard, shard.name, "content")


def test_the_index_of_another_shard_is_refused_though_the_sizes_are_the_same(folder):
    one, other = (folder / index_name(shard_name(n)) for n in (1, 2))
    assert (folder / shard_name(1)).stat().st_size == (folder / shard_name(2)).stat().st_size
    shutil.copy(other, one)
    assert "shard-000001.index.json does not belong to" in refused(folder)
    one.write_text(one.read_text().replace("shard-000002", "shard-000001"))
    assert "shard-000001.index.json does not belong to" in refused(folder)


def test_a_change_in_the_middle_is_found_by_the_whole_hash(tmp_path):
    samples = [Sample("00000000", {"00.png": bytes(400_000)}, {"pictures": [{"file": "00.png", "reference": True}]})]
    store, shard = Store(tmp_path), shard_name(0)
    write_shard(store, shard, samples, {}, "content")
    with (tmp_path / shard).open("r+b") as file:
        file.seek(200_000)
        file.write(b"x")
    read_index(store, shard, PEOPLE)
    with pytest.raises(ShardError, match="is damaged"):
        read_index(store, shard, PEOPLE, whole=True)


def test_damaged_missing_and_mixed_indexes_are_refused(folder, tmp_path_factory):
    assert "there is no shard" in refused(tmp_path_factory.mktemp("empty"))
    path = folder / index_name(shard_name(2))
    whole = path.read_text()
    path.write_text(whole[:50])
    assert "is damaged or no index of a shard" in refused(folder)
    path.write_text("[]")
    assert "is damaged or no index of a shard" in refused(folder)
    path.unlink()
    assert "shard-000002.index.json has no counterpart" in refused(folder)
    path.write_text(whole)
    (folder / shard_name(2)).unlink()
    assert "shard-000002.index.json has no counterpart" in refused(folder)
    write_shard(Store(folder), shard_name(2), people(20), {}, "other content")
    assert "shard-000000.tar and shard-000002.tar" in refused(folder)
    with pytest.raises(ShardError, match="made with another configuration"):
        finished(Store(folder), shard_name(2), "content")


def test_the_side_file_is_plain(folder):
    assert json.loads((folder / side_name(shard_name(0))).read_text()) == {"people": 3}
