"""The axolotl plugin against a stand-in of the interface that axolotl documents for plugins."""

import importlib
import re
import sys
import types
from pathlib import Path

import pydantic
import pytest
import yaml

from weighting.integrations import versions


class BasePlugin:
    """The methods of axolotl's class that the plugin fills in, as axolotl calls them."""

    def get_input_args(self):
        """Return the dotted name of a pydantic model."""

    def post_trainer_create(self, cfg, trainer):
        """Change the trainer."""


@pytest.fixture
def plugin(monkeypatch):
    """Return the plugin's file, imported as axolotl does."""
    for name in ("axolotl", "axolotl.integrations", "axolotl.integrations.base"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["axolotl.integrations.base"].BasePlugin = BasePlugin
    monkeypatch.setattr(versions, "version", lambda _name: "0.19.0")
    monkeypatch.setattr(versions, "_warned", set())
    monkeypatch.delitem(sys.modules, "weighting.integrations.axolotl", raising=False)
    yield importlib.import_module("weighting.integrations.axolotl")
    sys.modules.pop("weighting.integrations.axolotl")


def test_the_plugin_weighs_the_trainer_by_what_the_yaml_says(plugin, monkeypatch):
    """The words of the page's YAML reach `weigh`, and a wrong spec is refused when it is read."""
    page = Path(__file__).resolve().parents[3] / "docs" / "other-trainers.md"
    text = re.search(r"```yaml\n(plugins: .*?)```", page.read_text(encoding="utf-8"), re.DOTALL)[1]
    given = yaml.safe_load(text)
    seen = []
    monkeypatch.setattr(plugin, "weigh", lambda *to, **more: seen.append((to, more)))
    (name,) = given.pop("plugins")
    assert name == "weighting.integrations.axolotl.WeightingPlugin"
    made = plugin.WeightingPlugin()
    where, name = made.get_input_args().rsplit(".", 1)
    args = getattr(importlib.import_module(where), name)
    cfg = args(**given, weighting_fused=True)
    with pytest.warns(UserWarning, match=r"not run with axolotl.* read at 0\.18\.0; this is 0\.19"):
        made.post_trainer_create(cfg, "trainer")
    ((spec, more),) = seen
    assert spec == ("trainer", "linupper")
    assert more.pop("domains") == ["code", "prose"]
    assert more == {"domain_column": "domain", "record": 0, "fused": True}
    with pytest.raises(pydantic.ValidationError, match="did you mean"):
        args(weighting="linuper")
