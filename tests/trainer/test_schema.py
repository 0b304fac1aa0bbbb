"""The JSON schemas that are shipped beside the configurations: true to the fields, and every shipped file fits."""

import json
import operator
import re

import pytest
import yaml
from lcm_lookahead.cli import main
from lcm_lookahead.cli.schema import protocol_section, text
from lcm_lookahead.evaluation.harness import protocol
from lcm_lookahead.evaluation.harness.measures import MEASURES
from lcm_lookahead.mini import judges
from lcm_lookahead.trainer.concept.config import ConceptConfig
from lcm_lookahead.trainer.config import CONFIGS, ConfigError, validated
from lcm_lookahead.trainer.data.generate.config import GenerateConfig
from lcm_lookahead.trainer.lookahead.config import Config
from lcm_lookahead.trainer.noise_guide.config import NoiseGuideConfig
from lcm_lookahead.trainer.schema import schema_of

KINDS = {
    "train": (CONFIGS, Config),
    "generate": (CONFIGS / "generate", GenerateConfig),
    "guide": (CONFIGS / "guide", NoiseGuideConfig),
    "concept": (CONFIGS / "concept", ConceptConfig),
}
PROTOCOLS = sorted(path for path in protocol.PROTOCOLS.glob("*.yaml") if path != protocol.PROMPTS)
FILES = [(kind, path) for kind, (folder, _) in KINDS.items() for path in sorted(folder.glob("*.yaml"))]
LIMITS = {
    "minItems": operator.ge,
    "maxItems": operator.le,
    "minimum": operator.ge,
    "maximum": operator.le,
    "exclusiveMinimum": operator.gt,
    "exclusiveMaximum": operator.lt,
    "multipleOf": lambda value, said: value % said == 0,
}
TYPES = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "null": type(None)}


def faults(value, schema, whole, where=""):
    """What is wrong with a value, by as much of draft 7 as these schemas use (another word is an error)."""
    known = {"title", "description", "default", "$schema", "$defs", "format"}
    for word, said in schema.items():
        if word in known:
            continue
        if word == "$ref":
            yield from faults(value, whole["$defs"][said.removeprefix("#/$defs/")], whole, where)
        elif word == "allOf":
            for each in said:
                yield from faults(value, each, whole, where)
        elif word == "anyOf":
            if all(list(faults(value, each, whole, where)) for each in said):
                yield f"{where} fits none of the kinds"
        elif word == "if":
            branch = "else" if list(faults(value, said, whole)) else "then"
            yield from faults(value, schema.get(branch, {}), whole, where)
        elif word in ("then", "else"):
            pass
        elif word == "required":
            yield from (f"{where}.{name} is missing" for name in said if name not in value)
        elif word == "type":
            right = isinstance(value, bool) if said == "boolean" else isinstance(value, TYPES[said])
            if not right or (said != "boolean" and isinstance(value, bool)):
                yield f"{where} is no {said}"
        elif word == "enum":
            if value not in said:
                yield f"{where} is none of {said}"
        elif word == "const":
            if value != said:
                yield f"{where} is not {said}"
        elif word == "properties":
            for name, each in said.items():
                if isinstance(value, dict) and name in value:
                    yield from faults(value[name], each, whole, f"{where}.{name}")
        elif word == "additionalProperties":
            others = value.keys() - schema.get("properties", {}).keys() if isinstance(value, dict) else ()
            for name in others:
                if said is False:
                    yield f"{where}.{name} is unknown"
                elif said is not True:
                    yield from faults(value[name], said, whole, f"{where}.{name}")
        elif word == "items":
            if isinstance(value, list):
                parts = said if isinstance(said, list) else [said] * len(value)
                for number, (part, each) in enumerate(zip(value, parts, strict=False)):
                    yield from faults(part, each, whole, f"{where}[{number}]")
        elif word in (
            "minItems",
            "maxItems",
            "minimum",
            "maximum",
            "exclusiveMinimum",
            "exclusiveMaximum",
            "multipleOf",
        ):
            number = len(value) if word.endswith("Items") and isinstance(value, list) else value
            if isinstance(number, int | float):
                if not LIMITS[word](number, said):
                    yield f"{where} is {value}: {word} {said}"
        else:
            raise NotImplementedError(word)


def found(values, kind):
    schema = schema_of(KINDS[kind][1])
    return list(faults(values, schema, schema))


@pytest.mark.parametrize("kind", KINDS)
def test_the_shipped_schema_is_that_of_the_fields_and_what_the_command_prints(kind, capsys):
    path = KINDS[kind][0] / f"{kind}.schema.json"
    assert path.read_text(encoding="utf-8") == text(kind), f"write it anew: lookahead schema {kind} > {path}"
    main.main(["schema", kind])
    assert capsys.readouterr().out == text(kind)


@pytest.mark.parametrize(("kind", "path"), FILES, ids=lambda value: getattr(value, "stem", value))
def test_every_shipped_file_names_the_schema_and_fits(kind, path):
    written = path.read_text(encoding="utf-8")
    (named,) = re.findall(r"^# yaml-language-server: \$schema=(\S+)$", written, re.M)
    assert (path.parent / named).is_file() and named == f"{kind}.schema.json"
    assert not found(yaml.safe_load(written), kind)


BASE = {"model": {"base": "b", "start": "s"}, "data": {"source": "d"}, "lookahead": {"arm": "none"}}


@pytest.mark.parametrize(
    "change",
    [
        {"stepz": 5},
        {"steps": 0},
        {"steps": "many"},
        {"precision": "fp8"},
        {"model": {"base": "b", "start": "s", "kv_rang": 3}},
        {"optimiser": {"betas": [0.9]}},
        {"drop": {"text": 1.5}},
        {"data": {"source": "d", "size": 100}},
        {"validation": {"prompts": []}},
        {"trackers": ["mlflow"]},
    ],
)
def test_the_schema_refuses_what_the_command_refuses(change):
    assert not found(BASE, "train")
    with pytest.raises(ConfigError):
        validated(Config, BASE | change)
    assert found(BASE | change, "train")


@pytest.mark.parametrize("path", PROTOCOLS, ids=lambda path: path.stem)
def test_every_shipped_protocol_fits_the_schema_that_the_command_prints(path, capsys):
    main.main(["schema", "evaluate"])
    schema = json.loads(capsys.readouterr().out)
    assert schema == schema_of(protocol_section())
    assert not list(faults(yaml.safe_load(path.read_text(encoding="utf-8")), schema, schema))


@pytest.mark.parametrize(
    "change",
    [
        {"stepz": 5},
        {"people": {"source": "drawn", "count": 0}},
        {"methods": {"a": {"kind": "encodr"}}},
        {"methods": {"a": {"kind": "encoder", "file": "a.safetensors", "wieghts": [1]}}},
        {"methods": {"a": {"kind": "none", "file": "a.safetensors"}}},
        {"measures": {"b": {"kind": "identity parameters", "clip": "mini"}}},
    ],
)
def test_the_schema_of_a_protocol_refuses_what_the_command_refuses_also_of_the_full_one(change):
    schema = schema_of(protocol_section())
    base = {"models": {"base": "b"}, "people": {"source": "drawn"}, "methods": {"a": {"kind": "none"}}}
    base |= {"measures": {"b": {"kind": "identity", "recogniser": "r"}}}
    assert not list(faults(base | {"full": {"methods": {"a": {"weights": [0.5]}}}}, schema, schema))
    assert list(faults(base | change, schema, schema)) and list(faults(base | {"full": change}, schema, schema))
    with pytest.raises(ConfigError):
        read = validated(protocol.Protocol, base | change)
        read.parsed_methods(), read.parsed_measures({**MEASURES, **judges.MEASURES})


def test_what_must_be_given_may_stand_in_the_file_that_is_extended():
    assert found({"steps": 3}, "train") == [".model is missing", ".data is missing"]
    assert not found({"extends": "mini.yaml", "model": {"kv": False}}, "train")


def test_every_field_of_training_has_its_description_in_the_editor():
    schema = schema_of(Config)
    sections = [schema, *schema["$defs"].values()]
    fields = [field for section in sections for field in section["properties"].values()]
    assert all(field.get("description") or "$ref" in str(field) for field in fields)
