"""People as judges: what a page gives away, what is counted, and how."""

import json
import threading
import urllib.error
import urllib.request

import pytest
from lcm_lookahead.evaluation import preference
from lcm_lookahead.evaluation.preference import StudyError, count, krippendorff, make_study, pairs_of
from PIL import Image

BAD_SIDE = b'{"judge": "x", "answers": [{"id": 1, "question": "q", "side": "up"}]}'


@pytest.fixture
def folders(tmp_path):
    for method, shade in (("ours", 200), ("theirs", 90), ("references", 30)):
        (tmp_path / method).mkdir()
        for n in range(10):
            Image.new("RGB", (8, 8), (shade, n, n)).save(tmp_path / method / f"{n}.png")
    return tmp_path


@pytest.fixture
def study(folders):
    pairs = pairs_of(
        folders / "ours", folders / "theirs", folders / "references", {f"{n}.png": f"text {n}" for n in range(10)}
    )
    make_study(folders / "study", pairs, ("ours", "theirs"), repeats=0.3, seed=4)
    return folders / "study"


def items(study):
    page = (study / "public" / "index.html").read_text()
    return json.loads(page.split("const items = ")[1].split(", questions = ")[0])


def shade(study, item, side):
    return Image.open(study / "public" / item[side]).getpixel((0, 0))[0]


def filled_in(study, judge, choose):
    """The answers of somebody who chooses by `choose(item, side that is ours, question)`."""
    answers = []
    for item in items(study):
        ours = "left" if shade(study, item, "left") == 200 else "right"
        answers += [{"id": item["id"], "question": q, "side": choose(item, ours, q)} for q in preference.QUESTIONS]
    path = study.parent / f"{judge}.json"
    path.write_text(json.dumps({"judge": judge, "answers": answers}))
    return path


def test_the_public_folder_tells_neither_methods_nor_names(study):
    texts = (study / "public" / "index.html").read_text() + " ".join(p.name for p in (study / "public").iterdir())
    assert "ours" not in texts.replace("yours", "") and "theirs" not in texts
    assert not [p for p in (study / "public").iterdir() if p.name.split(".")[0].isdecimal()]
    assert not (study / "public" / "key.json").exists()


def test_a_browser_keeps_the_answers_of_each_study_apart(folders, study):
    """Also where two have the same seed, and so the same file names."""

    def stored(folder):
        return (folder / "public" / "index.html").read_text().split('const stored = "')[1].split('"')[0]

    Image.new("RGB", (8, 8), (91, 0, 0)).save(folders / "theirs" / "0.png")
    pairs = pairs_of(folders / "ours", folders / "theirs", folders / "references", {})
    for name in ("again", "copy"):
        make_study(folders / name, pairs, ("ours", "theirs"), repeats=0.3, seed=4)
    assert [i["left"] for i in items(folders / "again")] == [i["left"] for i in items(study)]
    assert stored(folders / "again") == stored(folders / "copy") != stored(study)


def test_both_methods_stand_on_both_sides_and_repeats_are_turned(study):
    key = json.loads((study / "key.json").read_text())["items"]
    assert len(key) == 13 and sum(item["repeat"] for item in key) == 3
    lefts = {item["pair"]: item["left"] for item in key if not item["repeat"]}
    assert set(lefts.values()) == {"ours", "theirs"}
    assert all(lefts[item["pair"]] != item["left"] for item in key if item["repeat"])


def test_the_key_says_what_the_pictures_are(study):
    key = {item["id"]: item["left"] for item in json.loads((study / "key.json").read_text())["items"]}
    assert all((shade(study, item, "left") == 200) == (key[item["id"]] == "ours") for item in items(study))


def test_a_judge_who_always_takes_ours_gives_it_every_answer(study):
    verdicts, steady = count(study, [filled_in(study, "a", lambda item, ours, q: ours)])
    assert [(v.chosen, v.answers, v.share, v.judges) for v in verdicts] == [(10, 10, 1.0, 1)] * 3
    assert all(v.low < 1 and v.p < 0.01 and v.agreement is None for v in verdicts) and steady == {"a": 1.0}


def test_a_judge_who_goes_by_the_side_is_found_out(study):
    _, steady = count(study, [filled_in(study, "a", lambda item, ours, q: "left")])
    assert steady == {"a": 0.0}


def test_two_judges_of_opposite_minds_disagree_and_cancel_out(study):
    other = {"left": "right", "right": "left"}
    files = [filled_in(study, "a", lambda i, ours, q: ours), filled_in(study, "b", lambda i, ours, q: other[ours])]
    verdict = count(study, files)[0][0]
    assert (verdict.share, verdict.answers, verdict.judges) == (0.5, 20, 2) and verdict.agreement < 0


def test_krippendorff_s_alpha_is_that_of_the_published_example():
    # Krippendorff (2011), "Computing Krippendorff's alpha-reliability", two observers, ten units: 0.095.
    a, b = "0100000010", "1110010000"
    assert krippendorff(list(zip(a, b, strict=True))) == pytest.approx(0.095, abs=1e-3)
    assert krippendorff([["x"], ["y"]]) is None and krippendorff([["x", "x"]]) == 1.0


def test_the_server_takes_answers_and_serves_nothing_but_the_page(study):
    server = preference.server(study)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    base = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        assert b"Which picture" in urllib.request.urlopen(base + "/").read()
        for path in ("/key.json", "/../key.json", "/answers.jsonl"):
            with pytest.raises(urllib.error.HTTPError) as error:
                urllib.request.urlopen(base + path)
            assert error.value.code == 404
        body = filled_in(study, "web", lambda item, ours, q: ours).read_bytes()
        assert urllib.request.urlopen(urllib.request.Request(base + "/answers", body)).status == 204
        for bad in (b"{}", b"no json", b'{"judge": "x"}', BAD_SIDE):
            with pytest.raises(urllib.error.HTTPError) as error:
                urllib.request.urlopen(urllib.request.Request(base + "/answers", bad))
            assert error.value.code == 400
    finally:
        server.shutdown()
        server.server_close()
    assert count(study)[0][0].share == 1.0


@pytest.mark.parametrize("key", ["{", "{}", "[]", '{"items": [1], "methods": ["a"], "questions": {}}', "\xff"])
def test_a_key_that_is_damaged_is_said_in_one_sentence(study, key):
    (study / "key.json").write_bytes(key.encode("latin-1"))
    with pytest.raises(StudyError, match=r"key.json is not what `study make` wrote: .*\.$"):
        count(study)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_answers_may_hold_any_character_and_a_mark_of_their_encoding(study, encoding):
    file = filled_in(study, "judge", lambda item, ours, q: ours)
    sheet = json.loads(file.read_text()) | {"judge": "a\u2028b\x85"}
    file.write_bytes(json.dumps(sheet, ensure_ascii=False).encode(encoding))
    assert count(study, [file])[0][0].share == 1.0
    (study / "answers.jsonl").write_text(json.dumps(sheet, ensure_ascii=False) + "\n", encoding="utf-8")
    assert count(study)[0][0].share == 1.0


def test_what_cannot_be_a_study_is_said_in_one_sentence(folders, study):
    pairs = pairs_of(folders / "ours", folders / "theirs")
    (folders / "empty").mkdir()
    (folders / "broken").mkdir()
    (folders / "broken" / "0.png").write_bytes(b"no picture")
    (folders / "x.json").write_text("[]")
    (folders / "utf-16.json").write_text("[]", encoding="utf-16")
    cases = [
        lambda: pairs_of(folders / "ours", folders / "empty"),
        lambda: pairs_of(folders / "ours", folders / "theirs", folders / "empty"),
        lambda: make_study(study, pairs, ("a", "b")),
        lambda: make_study(folders / "new", pairs, ("a", "b"), ["identity"]),
        lambda: make_study(folders / "new", pairs, ("a", "b"), ["beauty"]),
        lambda: make_study(folders / "new", pairs_of(folders / "broken", folders / "ours"), ("a", "b")),
        lambda: count(folders / "empty"),
        lambda: count(study),
        lambda: count(study, [folders / "x.json"]),
        lambda: count(study, [folders / "utf-16.json"]),
        lambda: count(study, [folders / "nowhere.json"]),
    ]
    for case in cases:
        with pytest.raises(StudyError) as error:
            case()
        assert str(error.value).endswith(".") and "\n" not in str(error.value)
    assert not (folders / "new").exists() and not list(folders.glob(".*part"))
