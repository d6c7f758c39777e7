"""SystemConfig: the parts of a model and their keys, as `system:` of a YAML declares them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mmllm.config.parse import as_mapping, check_keys, parse
from mmllm.config.registry import parse_component
from mmllm.errors import ConfigError, quoted


@dataclass(frozen=True)
class SystemConfig:
    """A joined model: which parts, under which keys. A projection has the key of its part.

    Attributes:
        name: what the model is called in logs and reports.
        llm: Config of the language model.
        encoders: key -> Config of a frozen encoder.
        input_projections: key of an encoder -> Config of the projection that follows it.
        decoders: key -> Config of a frozen decoder.
        output_projections: key of a decoder -> Config of the projection in front of it.
        rereads_media: whether what a reply made is encoded and read in front of the next request.
            A model that was trained on replies without their media (`targets: false`) has not
            learned to look at them, and does better from the words of its replies alone.
        licences: licences of the user's own parts (`encoders.image: MIT`).
        accept_licences: licences that forbid commercial use and are accepted (mmllm.licences).
        kernels: auto takes mmllm's own fast paths wherever they apply, reference takes none
            (mmllm/kernels/README.md); null is the environment variable MMLLM_KERNELS, else auto.
    """

    name: str
    llm: Any
    encoders: Mapping[str, Any] = field(default_factory=dict)
    input_projections: Mapping[str, Any] = field(default_factory=dict)
    decoders: Mapping[str, Any] = field(default_factory=dict)
    output_projections: Mapping[str, Any] = field(default_factory=dict)
    rereads_media: bool = True
    licences: Mapping[str, str] = field(default_factory=dict)
    accept_licences: tuple[str, ...] = ()
    kernels: Literal["auto", "reference"] | None = None

    def __post_init__(self) -> None:
        for parts, projections in (
            ("encoders", "input_projections"),
            ("decoders", "output_projections"),
        ):
            have, want = set(getattr(self, projections)), set(getattr(self, parts))
            if have != want:
                raise ConfigError(
                    f"system.{projections}: expected the keys of system.{parts} "
                    f"{quoted(sorted(want))}, got {quoted(sorted(have))}; each part needs one "
                    "projection under its own key"
                )


def parse_system(tree: Any, *, warn: bool = True) -> SystemConfig:
    """Plain data -> SystemConfig, with the Config of every component inside.

    Args:
        tree: the data.
        warn: log former names of a decoder's keys.

    Raises:
        ConfigError: an unknown or missing key, a value of the wrong type, or a part without a
            projection.
    """
    where = "system"
    tree = dict(as_mapping(tree, where))
    check_keys(SystemConfig, tree, where)
    plain = ("name", "rereads_media", "licences", "accept_licences", "kernels")
    parsed: dict[str, Any] = {key: tree[key] for key in plain if key in tree}
    parsed["llm"] = parse_component("llm", tree["llm"], "llm", default="causal_lm")
    for group in ("encoders", "input_projections", "decoders", "output_projections"):
        entries = as_mapping(tree.get(group, {}), group)
        parsed[group] = {
            key: parse_component(group, value, f"{group}.{key}", warn=warn)
            for key, value in entries.items()
        }
    return parse(SystemConfig, parsed, where)
