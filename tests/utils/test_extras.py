"""Optional dependencies: what is missing is named, with the command that installs it."""

from __future__ import annotations

import sys

import pytest

from mmllm import config
from mmllm.errors import ConfigError
from mmllm.evaluation import probe
from mmllm.utils.extras import import_extra


def test_an_installed_module_is_imported() -> None:
    assert import_extra("json.decoder", extra="none", needed_by="a test").JSONDecoder


def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ConfigError, match=r"a test: nowhere is not installed; pip install 'mmllm\["
    ):
        import_extra("nowhere.at.all", extra="none", needed_by="a test")
    with pytest.raises(ModuleNotFoundError):  # of a package that is installed: broken, not missing
        import_extra("json.nowhere", extra="none", needed_by="a test")


def test_encoders_and_probes_name_their_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    packages = ("open_clip", "sklearn")

    class Missing:
        def find_spec(self, name: str, *_: object) -> None:
            if name.startswith(packages):
                raise ModuleNotFoundError(name, name=name.partition(".")[0])

    for name in [name for name in sys.modules if name.startswith(packages)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
    entry = {"type": "open_clip", "weights": "w", "architecture": "ViT-B-32"}
    with pytest.raises(ConfigError, match=r"open_clip is not installed; .*'mmllm\[encoders\]'"):
        config.build(config.parse_component("encoders", entry, "encoders.image"))
    with pytest.raises(ConfigError, match=r"sklearn is not installed; .*'mmllm\[evaluation\]'"):
        probe.fit_classifier([], [])  # pyright: ignore[reportArgumentType]
