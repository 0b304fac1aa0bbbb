"""Apply Lookahead Image Prompt: what it refuses; and how all nodes present themselves."""

import ast
import dataclasses
import inspect
import logging

import pytest
import torch

pytestmark = pytest.mark.contract
PRESETS = ["likeness", "balanced", "style"]


def test_models_that_are_not_sdxl_are_refused(mini, tools):
    import comfy.model_base
    import comfy.model_patcher
    import comfy.supported_models
    from comfy.ldm.flux.model import FluxParams

    reference = tools.reference(mini, tools.picture(1))
    sd15 = {k: v for k, v in mini.unet_config.items() if k not in ("num_classes", "adm_in_channels")}
    flux = {
        "image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": 8, "context_in_dim": 8,
        "hidden_size": 32, "mlp_ratio": 2.0, "num_heads": 2, "depth": 1, "depth_single_blocks": 1,
        "axes_dim": [4, 6, 6], "theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": False,
        "dtype": torch.float32, "txt_ids_dims": [],
    }  # fmt: skip
    known = {f.name for f in dataclasses.fields(FluxParams)} | {"image_model", "dtype"}
    flux = {k: v for k, v in flux.items() if k in known}
    cpu = torch.device("cpu")
    for config, base in (
        (comfy.supported_models.SD15(sd15), comfy.model_base.BaseModel),
        (comfy.supported_models.Flux(flux), comfy.model_base.Flux),
    ):
        patcher = comfy.model_patcher.ModelPatcher(base(config, device="cpu"), load_device=cpu, offload_device=cpu)
        for weight in (1.0, 0.0):
            with pytest.raises(ValueError) as error:
                tools.apply(patcher, reference, weight=weight)
            assert type(config).__name__ in tools.one_sentence(error) and "SDXL" in str(error.value)


def test_an_encoder_for_another_base_is_refused(worlds, mini, tools):
    sdxl = worlds("sdxl")
    with pytest.raises(ValueError) as error:
        tools.apply(sdxl.model, tools.reference(mini, tools.picture(1)))
    assert "17" in tools.one_sentence(error) and "70" in str(error.value)
    with pytest.raises(ValueError) as error:
        tools.apply(mini.model, tools.reference(sdxl, tools.picture(1)))
    tools.one_sentence(error)


def test_a_start_after_the_end_is_refused(mini, tools):
    with pytest.raises(ValueError) as error:
        tools.apply(mini.model, tools.reference(mini, tools.picture(1)), start=0.8, end=0.2)
    assert "0.8" in tools.one_sentence(error) and "0.2" in str(error.value)


# -- how the nodes present themselves


def declared(folder):
    """The ids of the nodes that the files of a folder declare: of each, one class of the same name."""
    ids = []
    for path in folder.rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and any(ast.unparse(base) == "io.ComfyNode" for base in node.bases):
                ids.append(node.name)
    return sorted(ids)


def test_every_node_that_a_file_declares_is_registered(pack, request):
    root = request.config.rootpath
    extension = ast.parse((root / "nodes" / "extension.py").read_text(encoding="utf-8"))
    (listed,) = (
        [name.id for name in node.value.elts]
        for node in ast.walk(extension)
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "nodes"
    )
    assert sorted(pack.nodes) == sorted(listed) == declared(root / "nodes")


def test_no_node_lost_its_id(pack, request):
    """Graphs name a node by its id: what had a help page and is none any more is an id that old graphs still have."""
    pages = {page.stem for page in (request.config.rootpath / "web" / "docs").glob("*.md")}
    renamed = {one.old for one in pack.module("nodes.replacements").RENAMED}
    assert pages - renamed == set(pack.nodes)


def test_every_node_input_and_output_explains_itself(pack, request):
    for node_id, node in pack.nodes.items():
        schema = node.define_schema()
        assert schema.node_id == node_id and schema.description.endswith(".") and schema.display_name
        assert schema.category.startswith("lookahead/"), node_id
        assert getattr(schema, "search_aliases", ["a host that has none"]), f"{node_id} has no search_aliases"
        for part in [*schema.inputs, *schema.outputs]:
            assert part.tooltip and part.tooltip.endswith("."), (node_id, part.id)
        page = request.config.rootpath / "web" / "docs" / f"{node_id}.md"
        text = page.read_text()
        for part in schema.inputs:  # by the name that an API graph has, and what the page shows in its place
            assert f"`{part.id}`" in text and (part.display_name or "") in text, (node_id, part.id)
        for part in schema.outputs:
            assert f"`{part.display_name or part.id}`" in text, (node_id, part.id)


def test_schema_fields_that_a_host_lacks_are_dropped(pack):
    made = pack.module("nodes.schema").schema(node_id="X", category="y", not_a_field_of_any_host=1)
    assert made.node_id == "X" and not hasattr(made, "not_a_field_of_any_host")


def test_nothing_is_printed(mini, tools, capsys, caplog):
    with caplog.at_level(logging.WARNING):
        model = tools.apply(mini.model, tools.reference(mini, tools.picture(1)))
        tools.sample(model, mini.text(1), mini.text(2), torch.zeros(1, 4, 16, 16), steps=2)
    assert capsys.readouterr().out == "" and "LCM-Lookahead" not in caplog.text


def test_a_new_node_begins_where_the_figures_are_better_and_an_old_api_graph_where_it_did(pack):
    node = pack.nodes["LookaheadApplyImagePrompt"]
    (weight,) = [asked for asked in node.define_schema().inputs if asked.id == "weight"]
    assert weight.default == 0.75 and inspect.signature(node.execute).parameters["weight"].default == 1.0


@pytest.mark.parametrize(
    ("of", "node", "own"),
    [
        ("IMAGE_PROMPT", "LookaheadApplyImagePrompt", {"weight": 0.3, "end": 0.7}),
        ("KV_INJECTION", "LookaheadApplyKVInjection", {"weight": 0.3, "end": 0.7}),
    ],
)
def test_a_preset_takes_the_place_of_the_numbers_and_says_so(pack, mini, tools, caplog, of, node, own):
    reference = tools.kv_reference(mini, tools.picture(1), encoder=tools.kv_encoder(mini))

    def draw(**options):
        model = tools.run(node, mini.model, reference, **options)
        return tools.sample(model, mini.text(1), mini.text(2), torch.zeros(1, 4, 8, 8), steps=2)

    presets = getattr(pack.module("lookahead.method.reference_presets"), of)
    values = {asked.id: getattr(asked, "default", None) for asked in pack.nodes[node].define_schema().inputs}
    assert {name: values[name] for name in presets["balanced"]} == presets["balanced"] and list(presets) == PRESETS
    with caplog.at_level(logging.INFO):
        assert torch.equal(draw(**own, preset="style"), draw(**presets["style"]))
    said = [f"{name} {presets['style'][name]} (not {value})" for name, value in own.items()]
    assert f"acts by its preset style: {', '.join(said)}." in caplog.text
    assert torch.equal(draw(**own, preset="as set below"), draw(**own))
