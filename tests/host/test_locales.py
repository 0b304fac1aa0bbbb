"""Every text of every node stands in every language, as this host would ask for it."""

import pytest
from lcm_lookahead.tools import locales


@pytest.fixture(scope="module")
def object_info(pack):
    """What GET /object_info answers for our nodes and the host's first ones, on a machine without model files."""
    import folder_paths

    classes = pack.host_nodes.NODE_CLASS_MAPPINGS
    with pytest.MonkeyPatch.context() as patch:
        empty = {name: ([], endings) for name, (_, endings) in folder_paths.folder_names_and_paths.items()}
        patch.setattr(folder_paths, "folder_names_and_paths", empty)
        patch.setattr(folder_paths, "filename_list_cache", {})
        ours = {id: classes[id].GET_NODE_INFO_V1() for id in pack.nodes}
        names = ("KSampler", "CheckpointLoaderSimple", "VAELoader")  # of its lists, these have what ours share
        host = {id: {"input": classes[id].INPUT_TYPES(), "category": classes[id].CATEGORY} for id in names}
    return ours | host


def test_every_text_is_in_every_language_and_nothing_is_left_over(object_info):
    faults = locales.Locales(object_info).faults()
    assert not faults, "\n".join(["see locales/README.md:", *faults])


def test_every_input_and_output_has_a_name_and_a_tooltip_in_every_language(object_info):
    for code in ("en", *locales.LANGUAGES):
        nodes = locales.read(locales.LOCALES / code / "nodeDefs.json")
        for id, node in object_info.items():
            if id.startswith(locales.OURS):
                assert nodes[id]["display_name"] and nodes[id]["description"]
                sockets = [nodes[id]["inputs"][name] for name, _, _ in locales.inputs(node)]
                sockets += [nodes[id]["outputs"][str(i)] for i in range(len(node["output"]))]
                assert all(socket["name"] and socket["tooltip"] for socket in sockets), (code, id)
