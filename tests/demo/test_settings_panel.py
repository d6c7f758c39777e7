"""Invalid values in the settings panel."""

from __future__ import annotations

from typing import Any

import pytest

from mmllm.demo.settings_panel import SettingsPanel
from mmllm.errors import ConfigError


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("seed",), "7a", "a number such as 7"),
        (("seed",), "9" * 30, "a number such as 7"),
        (("seed",), "\u00b2", "a number such as 7"),
        (("seed",), "-1", "a number such as 7"),
        (("stop",), "\n".join("abcdefghijklmnopqrs"), "19 texts to stop at"),
        (("decoders", "image", "negative_prompt"), "x" * 100_001, "100001 characters"),
        (("decoders", "image", "height"), 10**9, "width x height: expected at most"),
        (("decoders", "video", "frames"), 20_001, "frames: expected at most 500"),
        (("decoders", "video", "frames"), 10**40, "frames: expected at most 500"),
        (("decoders", "audio", "seconds"), 1e300, "seconds: expected at most 60"),
    ],
)
def test_an_invalid_setting_is_reported_in_one_sentence(
    place: tuple[str, ...], value: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        SettingsPanel([], [place], None).read([value])
