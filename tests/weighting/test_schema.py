"""The JSON Schema accepts what the language accepts, and refuses what a schema can refuse."""

import json
from pathlib import Path

import jsonschema
import pytest
import yaml
from looping import for_each

import weighting as wt
from weighting.language.schema import schema

ROOT = Path(__file__).resolve().parent.parent.parent
SPECS = sorted((ROOT / "specs").glob("*.yaml"))
VALIDATOR = jsonschema.Draft202012Validator(schema())


def errors(text):
    """Return what the schema objects to in a YAML text."""
    return [error.message for error in VALIDATOR.iter_errors(yaml.safe_load(text))]


def test_the_schema_is_one():
    """The schema itself is valid, and describes every key of a spec."""
    jsonschema.Draft202012Validator.check_schema(schema())
    assert set(schema()["properties"]) == {*wt.Spec.model_fields, "pipeline"}


def test_the_shipped_file_is_current():
    """specs/weighting.schema.json is what `weighting schema` prints for the shipped stages."""
    shipped = json.loads((ROOT / "specs" / "weighting.schema.json").read_text(encoding="utf-8"))
    now = schema()
    for defs in (shipped["$defs"], now["$defs"]):
        own = [way for way in defs["stage"]["anyOf"] if "properties" in way]
        assert len(own) >= 30
    names = {tuple(way["properties"]) for way in shipped["$defs"]["stage"]["anyOf"][1:]}
    # Tests may have registered further stages in this process.
    now["$defs"]["stage"]["anyOf"] = [
        way for way in now["$defs"]["stage"]["anyOf"][1:] if tuple(way["properties"]) in names
    ]
    shipped["$defs"]["stage"]["anyOf"] = shipped["$defs"]["stage"]["anyOf"][1:]
    for defs in (shipped["$defs"], now["$defs"]):
        del defs["pipeline"]["anyOf"][0]["pattern"]  # lists the names once more
    assert now == shipped


@pytest.mark.slow
@for_each("path", SPECS, ids=lambda path: path.stem)
def test_every_shipped_spec_is_valid_in_both_spellings(path):
    """The schema accepts each spec as written, as arrow text and as lists."""
    spec = wt.load(path)
    for text in (path.read_text(encoding="utf-8"), wt.dumps(spec), wt.dumps(spec, "yaml")):
        assert not errors(text)


BROKEN = {
    "unknown key": "version: 1\npipline: uniform",
    "no version": "pipeline: uniform",
    "another version": "version: 2\npipeline: uniform",
    "nothing to weigh by": "version: 1\nname: x",
    "two homes": "version: 1\npipeline: uniform\nfactors: {a: uniform}",
    "an unknown stage": "version: 1\npipeline: normaliz -> temperature(1)",
    "an unknown stage in a list": "version: 1\npipeline: [normaliz]",
    "an unknown stage with arguments": "version: 1\npipeline: [{normaliz: {a: 1}}]",
    "an unknown argument": "version: 1\npipeline: [{linupper: {alhpa: 1}}]",
    "a missing argument": "version: 1\npipeline: [{temperature: {}}]",
    "text for a number": "version: 1\npipeline: [{temperature: {tau: abc}}]",
    "a temperature of zero": "version: 1\npipeline: [{temperature: {tau: 0}}]",
    "a cap below the mean": "version: 1\npipeline: [{clamp: {max: 0.5}}]",
    "a share where it means nothing": "version: 1\npipeline: [{temperature: {tau: 2/n}}]",
    "an unknown schedule": "version: 1\npipeline: [{temperature: {tau: {ramp: {start: 1}}}}]",
    "a ramp without its end": "version: 1\npipeline: [{temperature: {tau: {linear: {start: 1}}}}]",
    "an unclosed bracket": "version: 1\npipeline: 'linupper(alpha=1 -> temperature(1)'",
    "a missing stage": "version: 1\npipeline: 'normalize -> -> temperature(1)'",
    "another joint": "version: 1\npipeline: normalize | temperature(1)",
    "a wrong choice": "version: 1\nnormalize: maybe\npipeline: uniform",
    "a wrong level": "version: 1\npipeline: [{mean: {level: sentence}}]",
    "an empty list": "version: 1\npipeline: []",
    "two stages in one item": "version: 1\npipeline: [{normalize: , abs: }]",
    "an empty table": "version: 1\npipeline: [{table: {}}]",
}


@for_each("text", BROKEN.values(), ids=BROKEN.keys())
def test_what_a_schema_can_refuse_is_refused(text):
    """Wrong names, shapes and ranges are refused by the schema and by the language alike."""
    assert errors(text + "\n")
    with pytest.raises(wt.SpecError):
        wt.loads(text + "\n")


def test_most_invalid_files_are_refused():
    """Of the files the language refuses, YAML or the schema refuses most."""
    folder = Path(__file__).parent / "specs_invalid"
    seen, passed = 0, []
    for path in sorted(folder.glob("*.yaml")):
        seen += 1
        try:
            objections = errors(path.read_bytes())
        except (yaml.YAMLError, jsonschema.ValidationError):
            continue
        if not objections:
            passed.append(path.stem)
    assert seen > 120
    # What is left: values and order inside arrow text, and what YAML itself lets pass.
    assert len(passed) < seen * 0.55, passed
