"""Crop Lookahead Face by boxes of another node, without insightface; and crops that are padded at the edges."""

import pytest
import torch


def box(x, y, width, height, **more):
    return {"x": x, "y": y, "width": width, "height": height, **more}


FACES = [box(10, 20, 30, 30, label="face", score=0.9), box(60, 50, 40, 40, label="face", score=0.6)]


@pytest.fixture
def picture(tools):
    return tools.picture(1, height=128, width=160)


@pytest.fixture
def crop(pack):
    def run(image, boxes, **options):
        options = {"margin": 0.0, **options}
        return pack.nodes["LookaheadCropFace"].execute(None, image, boxes=boxes, **options).result

    return run


@pytest.mark.contract
def test_the_host_s_boxes_are_cut_out_without_insightface(crop, picture):
    cut, preview = crop(picture, [FACES], size=0)
    assert preview.shape == picture.shape and not torch.equal(preview, picture)
    assert cut.shape == (1, 64, 64, 3)  # the larger face is 40 pixels wide, and 64 is the smallest crop
    cut, _ = crop(picture, [FACES], margin=0.8, size=104)
    assert torch.equal(cut, picture[:, 18:122, 28:132])  # 40 + 2 * 32 around (80, 70)
    for order, face, x in (("left to right", 0, 10), ("surest first", 1, 60), ("largest first", -1, 10)):
        found, _ = crop(picture, [FACES], order=order, face=face, size=64)
        other, _ = crop(picture, [[one for one in FACES if one["x"] == x]], size=64)
        assert torch.equal(found, other)
    with pytest.raises(ValueError, match="Face 1 is not there in the picture, which has 1"):
        crop(picture, [FACES], face=1, threshold=0.7)


def test_boxes_of_a_batch_of_one_picture_and_of_all(crop, picture, tools):
    batch = torch.cat([picture, picture.flip(2)])
    assert crop(batch, [FACES, FACES[:1]], size=64)[0].shape[0] == 2
    assert crop(batch, FACES[0], size=64)[0].shape[0] == 2
    assert torch.equal(crop(picture, FACES, size=64)[0], crop(picture, [FACES], size=64)[0])
    with pytest.raises(ValueError, match="No face was found in picture 2 of 2"):
        crop(batch, [FACES, []])
    assert crop(batch, [FACES, []], if_none="skip the picture", size=64)[0].shape[0] == 1


@pytest.mark.parametrize(
    "boxes",
    [[], [FACES, FACES], [[box(0, 0, float("nan"), 3)]], "face", [["x"]], [[{"x": 1}]], 7.5, [[box("a", 0, 1, 1)]]],
    ids=str,
)
def test_what_are_no_boxes_of_these_pictures_is_refused(crop, picture, tools, boxes):
    with pytest.raises(ValueError) as error:
        crop(picture, boxes)
    assert "oxes" in tools.one_sentence(error)


def test_upright_needs_landmarks_and_something_must_find_the_faces(crop, picture, tools):
    with pytest.raises(ValueError) as error:
        crop(picture, [FACES], alignment="upright")
    assert "face_analysis" in tools.one_sentence(error)
    with pytest.raises(ValueError) as error:
        crop(picture, None)
    assert "boxes" in tools.one_sentence(error)


def test_a_box_without_extent_is_no_face(crop, picture):
    with pytest.raises(ValueError, match="No face was found"):
        crop(picture, [[box(3, 3, 0, 5)]])


def test_the_host_s_own_node_gives_what_the_socket_takes(pack):
    node = pytest.importorskip("comfy_extras.nodes_mediapipe")  # newer hosts
    kinds = {output.io_type for name in dir(node) for output in outputs_of(getattr(node, name))}
    ours = next(part for part in pack.nodes["LookaheadCropFace"].define_schema().inputs if part.id == "boxes")
    assert ours.io_type == "BOUNDING_BOX" and ours.io_type in kinds


def outputs_of(node):
    is_node = isinstance(node, type) and hasattr(node, "define_schema") and node.__module__.endswith("mediapipe")
    return node.define_schema().outputs if is_node else ()


def test_padding_keeps_the_face_in_the_middle_and_counts_as_masked_out(crop, picture, mini, tools):
    at_the_edge = [[box(0, 0, 60, 60)]]
    inside, _ = crop(picture, at_the_edge, margin=0.5, size=120)
    padded, _ = crop(picture, at_the_edge, margin=0.5, size=120, edges="pad")
    assert inside.shape == (1, 120, 120, 3) and padded.shape == (1, 120, 120, 4)
    assert torch.equal(inside, picture[:, :120, :120])
    assert torch.equal(padded[:, 30:, 30:, :3], picture[:, :90, :90]) and padded[:, 30:, 30:, 3].min() == 1
    assert padded[:, :30, :, 3].max() == padded[:, :, :30, 3].max() == 0
    assert torch.equal(padded[0, 40, 0, :3], picture[0, 10, 0])  # the colours of the edge go on
    subject = tools.reference(mini, padded).subjects[0]
    assert subject.mask is not None and subject.mask[:, :15].max() < 1e-3
    larger, _ = crop(picture, at_the_edge, margin=3.0, edges="pad")
    assert larger.shape == (1, 420, 420, 4)
    whole, _ = crop(picture, [[]], edges="pad", if_none="whole picture")
    assert whole.shape == (1, 128, 128, 4) and whole[..., 3].min() == 1
