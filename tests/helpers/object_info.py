"""What the host in this process answers to GET /object_info, on a machine without model files."""

import pytest


def object_info(pack):
    """Our nodes and the host's first ones, whose lists are those that ours share."""
    import folder_paths

    classes = pack.host_nodes.NODE_CLASS_MAPPINGS
    with pytest.MonkeyPatch.context() as patch:
        empty = {name: ([], endings) for name, (_, endings) in folder_paths.folder_names_and_paths.items()}
        patch.setattr(folder_paths, "folder_names_and_paths", empty)
        patch.setattr(folder_paths, "filename_list_cache", {})
        ours = {id: classes[id].GET_NODE_INFO_V1() for id in pack.nodes}
        names = ("KSampler", "CheckpointLoaderSimple", "VAELoader")
        host = {id: {"input": classes[id].INPUT_TYPES(), "category": classes[id].CATEGORY} for id in names}
    return ours | host
