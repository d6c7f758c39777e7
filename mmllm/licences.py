"""Under which licence a system's parts are, and whether the user has accepted those that forbid
commercial use. `mmllm plan` shows them; nothing is built before they are accepted.

The table names what the recipes, the docs' examples and `mini` use. Each entry says where its
licence was read; what is not in the table is shown as unknown, and its card must be read. A part of
your own, or one in a local folder, is told in the config: `licences: {encoders.image: MIT}`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mmllm.config import SystemConfig, parse_component
from mmllm.errors import ConfigError
from mmllm.utils.extras import import_extra
from mmllm.utils.hints import did_you_mean

UNKNOWN = "unknown"


@dataclass(frozen=True)
class Licence:
    """`terms`: what to know of it in a few words. `commercial`: False where it forbids that."""

    terms: str
    commercial: bool = True


LICENCES: dict[str, Licence] = {
    "Apache-2.0": Licence("free, with its notices"),
    "MIT": Licence("free, with its notice"),
    "CC-BY-4.0": Licence("free, with credit"),
    "CreativeML-OpenRAIL-M": Licence("free, but for the uses that it lists"),
    "Llama-2-Community": Licence("free below 700 million monthly users, but for listed uses"),
    "Stability-AI-Community": Licence("free below 1 million USD of revenue a year"),
    "CC-BY-NC-4.0": Licence("with credit", commercial=False),
    "CC-BY-NC-SA-4.0": Licence("with credit, under the same licence", commercial=False),
    "FLUX-Non-Commercial": Licence("outputs are free", commercial=False),
    "NVIDIA-Source-Code-NC": Licence("research only", commercial=False),
}
"""Name -> terms, in a few words that replace no reading."""


@dataclass(frozen=True)
class Entry:
    licence: str
    source: str
    """Where it was read."""


def _page(licence: str, of: str = "its") -> Entry:
    return Entry(licence, f"{of} page on the hub")


WEIGHTS: dict[str, Entry] = {
    "mini:smollm2-135m-instruct": Entry("Apache-2.0", "mmllm.mini.assets"),
    "mini:efficientnet-lite0": Entry("Apache-2.0", "mmllm.mini.assets"),
    "mini:efficientnet-lite1": Entry("Apache-2.0", "mmllm.mini.assets"),
    "mini:efficientnet-lite2": Entry("Apache-2.0", "mmllm.mini.assets"),
    "mini:aisfx": Entry("CC-BY-4.0", "mmllm.mini.assets"),
    "mini:decoders/image": Entry("Apache-2.0", "its README.md"),
    "mini:decoders/audio": Entry("Apache-2.0", "its README.md"),
    "mini:decoders/video": Entry("Apache-2.0", "its README.md"),
    "lmsys/vicuna-7b-v1.5": _page("Llama-2-Community"),
    "Qwen/Qwen3-8B": _page("Apache-2.0", "a copy's"),
    "laion/CLIP-ViT-L-14-DataComp.XL-s13B-b90K": Entry("MIT", "its README.md"),
    "timm/ViT-SO400M-16-SigLIP2-384": _page("Apache-2.0", "its 256-pixel sibling's"),
    "laion/clap-htsat-unfused": _page("Apache-2.0"),
    "laion/clap-htsat-fused": _page("Apache-2.0"),
    "openai/whisper-large-v3": _page("Apache-2.0"),
    "stable-diffusion-v1-5/stable-diffusion-v1-5": _page(
        "CreativeML-OpenRAIL-M", "runwayml/stable-diffusion-v1-5's"
    ),
    "cvssp/audioldm": _page("CC-BY-NC-SA-4.0"),
    "cvssp/audioldm-m-full": _page("CC-BY-NC-SA-4.0"),
    "cvssp/audioldm-l-full": _page("CC-BY-NC-SA-4.0"),
    "cvssp/audioldm2": _page("CC-BY-NC-SA-4.0"),
    "cvssp/audioldm2-large": _page("CC-BY-NC-SA-4.0"),
    "cerspense/zeroscope_v2_576w": _page("CC-BY-NC-4.0"),
    "Tongyi-MAI/Z-Image-Turbo": _page("Apache-2.0"),
    "stabilityai/stable-audio-open-1.0": _page("Stability-AI-Community", "Comfy-Org's copy's"),
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": _page("Apache-2.0", "a derivative's"),
    "black-forest-labs/FLUX.1-dev": Entry("FLUX-Non-Commercial", "its licence's text"),
    "black-forest-labs/FLUX.2-dev": Entry("FLUX-Non-Commercial", "FLUX.2-klein-9B's licence"),
    "Efficient-Large-Model/Sana_600M_512px_diffusers": _page(
        "NVIDIA-Source-Code-NC", "Sana_1600M_1024px's"
    ),
}
"""A part's `weights` -> its licence. `ARCHITECTURE:TAG` of open_clip is written as its hub id."""


@dataclass(frozen=True)
class PartLicence:
    """What `mmllm plan` shows of one part: `weights` as the config names them."""

    part: str
    weights: str
    licence: str
    terms: str
    source: str
    commercial: bool


def of_parts(system: SystemConfig) -> list[PartLicence]:
    """The licence of every part, in the order of the config. Raises ConfigError for a key of
    `licences` that is no part."""
    parts = dict(_weights(system))
    for part in system.licences:
        if part not in parts:
            raise ConfigError(f"system.licences: no part {part!r}{_near(part, parts)}")
    found = []
    for part, weights in parts.items():
        entry = WEIGHTS.get(weights, Entry(UNKNOWN, "not in the table: read its card"))
        if part in system.licences:
            entry = Entry(system.licences[part], "the config")
        terms = LICENCES.get(entry.licence)
        found.append(
            PartLicence(
                part=part,
                weights=weights,
                licence=entry.licence,
                terms=terms.terms if terms else "",
                source=entry.source,
                commercial=terms.commercial if terms else "-NC" not in entry.licence.upper(),
            )
        )
    return found


def check(system: SystemConfig) -> None:
    """Raises ConfigError unless every licence that forbids commercial use is accepted."""
    parts = of_parts(system)
    known = {*LICENCES, *(part.licence for part in parts)}
    for name in system.accept_licences:
        if name not in known:
            raise ConfigError(
                f"system.accept_licences: unknown licence {name!r}{_near(name, known)}"
            )
    refused = [p for p in parts if not p.commercial and p.licence not in system.accept_licences]
    if refused:
        lines = "".join(f"\n  {p.part} ({p.weights}): {p.licence}" for p in refused)
        names = ", ".join(dict.fromkeys([*system.accept_licences, *(p.licence for p in refused)]))
        raise ConfigError(
            f"system: these parts may not be used commercially:{lines}\nIf your use is none, say "
            f"so with accept_licences: [{names}] in the system's YAML (on the command line "
            f"'system.accept_licences=[{names}]'); or name other parts"
        )


def _weights(system: SystemConfig) -> Iterator[tuple[str, str]]:
    """(part, what it calls its weights); a part without `weights` by its type."""
    yield "llm", _name(system.llm)
    for room in ("encoders", "decoders"):
        for key, entry in getattr(system, room).items():
            yield f"{room}.{key}", _name(entry)


def _name(entry: Any) -> str:
    fields = {field.name: getattr(entry, field.name) for field in dataclasses.fields(entry)}
    inner = fields.get("encoder")
    if isinstance(inner, Mapping) and "type" in inner:  # a picture encoder on frames
        return _name(parse_component("encoders", inner, "encoder"))
    if fields.get("architecture"):
        return _open_clip(fields["architecture"], fields["weights"])
    weights = fields.get("weights")
    if not isinstance(weights, str):
        return f"{type(entry).__module__}:{type(entry).__name__}"
    for prefix in ("local-dir:", "hf-hub:"):
        weights = weights.removeprefix(prefix)
    return weights


def _open_clip(architecture: str, tag: str) -> str:
    """A tag of open_clip's list -> the hub id that it stands for."""
    name = "open_clip.pretrained"
    pretrained = import_extra(name, extra="encoders", needed_by="an encoder of type open_clip")
    return (pretrained.get_pretrained_cfg(architecture, tag).get("hf_hub") or tag).strip("/")


def _near(name: str, known: Any) -> str:
    return (
        did_you_mean(name, sorted(known), cutoff=0.4) or f"; known are {', '.join(sorted(known))}"
    )
