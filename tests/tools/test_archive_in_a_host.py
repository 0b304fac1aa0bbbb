"""The registry's archive, unpacked into the custom nodes of a host as the Manager does it."""

import ast
import zipfile
from pathlib import Path

import pytest
from lcm_lookahead.host import workflow
from lcm_lookahead.mini import demo
from lcm_lookahead.mini.files.host_models import mini_host
from registry import write_archive

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_it_has_every_node_and_draws(tmp_path):
    write_archive(tmp_path / "node.zip")
    pack = tmp_path / "pack"
    with zipfile.ZipFile(tmp_path / "node.zip") as file:
        file.extractall(pack)
    assert not (pack / "trainer").exists()  # it is the archive that is tried, not the repository
    with mini_host(pack=pack, announce=False) as host:
        classes = [
            node.name
            for path in (ROOT / "nodes").rglob("*.py")
            for node in ast.parse(path.read_text()).body
            if isinstance(node, ast.ClassDef) and any(ast.unparse(base) == "io.ComfyNode" for base in node.bases)
        ]
        assert {name for name in host.object_info() if name.startswith("Lookahead")} == set(classes) != set()
        demo.draw_references(1)[0].save(host.folder("input") / "reference.png")
        (path,) = (ROOT / "workflows").glob("02 * (KV).json")
        api = demo.at_mini_size(workflow.convert(path, host.object_info()), "reference.png", seed=5)
        result = host.run(workflow.override(api, "BasicScheduler", steps=2)).check()
        assert [image for image in result.images if image.is_relative_to(host.folder("output"))]
