"""The licences of a system's parts, and whether the user has accepted those that forbid commercial
use. `mmllm plan` shows them; nothing is built before they are accepted.

The table lists the parts of the recipes, of the docs' examples and of `mini`. Each entry records
where its licence was read; a part that is not in the table is shown as unknown, and its card must
be read. The licence of a part of your own, or of one in a local folder, goes into the config:
`licences: {encoders.image: MIT}`.
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
    """The terms of a licence.

    Attributes:
        terms: its conditions in a few words.
        commercial: False if it forbids commercial use.
    """

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
    "LTXV-Open-Weights": Licence("free below 10 million USD of revenue a year"),
    "FLUX-Non-Commercial": Licence("outputs are free", commercial=False),
    "NVIDIA-Source-Code-NC": Licence("research only", commercial=False),
}
"""Name -> terms: a summary, which does not replace the text."""


@dataclass(frozen=True)
class LicenceEntry:
    """The licence of published weights.

    Attributes:
        licence: its name, a key of the table of terms.
        source: where it was read.
    """

    licence: str
    source: str


def _page(licence: str, whose: str = "its") -> LicenceEntry:
    """An entry that was read on a page of the hub."""
    return LicenceEntry(licence, f"{whose} page on the hub")


WEIGHTS: dict[str, LicenceEntry] = {
    "mini:smollm2-135m-instruct": LicenceEntry("Apache-2.0", "mmllm.mini.assets"),
    "mini:efficientnet-lite0": LicenceEntry("Apache-2.0", "mmllm.mini.assets"),
    "mini:efficientnet-lite1": LicenceEntry("Apache-2.0", "mmllm.mini.assets"),
    "mini:efficientnet-lite2": LicenceEntry("Apache-2.0", "mmllm.mini.assets"),
    "mini:aisfx": LicenceEntry("CC-BY-4.0", "mmllm.mini.assets"),
    "mini:decoders/image": LicenceEntry("Apache-2.0", "its README.md"),
    "mini:decoders/audio": LicenceEntry("Apache-2.0", "its README.md"),
    "mini:decoders/video": LicenceEntry("Apache-2.0", "its README.md"),
    "lmsys/vicuna-7b-v1.5": _page("Llama-2-Community"),
    "Qwen/Qwen3-8B": _page("Apache-2.0", "a copy's"),
    "Qwen/Qwen3-VL-2B-Instruct": LicenceEntry(
        "Apache-2.0", "the README.md of an example of its use"
    ),
    "Qwen/Qwen3-VL-8B-Instruct": _page("Apache-2.0"),
    "laion/CLIP-ViT-L-14-DataComp.XL-s13B-b90K": LicenceEntry("MIT", "its README.md"),
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
    "Lightricks/LTX-Video": LicenceEntry(
        "LTXV-Open-Weights", "a manual that lists its versions, utensils.io/mold"
    ),
    "black-forest-labs/FLUX.1-dev": LicenceEntry("FLUX-Non-Commercial", "its licence's text"),
    "black-forest-labs/FLUX.2-dev": LicenceEntry(
        "FLUX-Non-Commercial", "FLUX.2-klein-9B's licence"
    ),
    "Efficient-Large-Model/Sana_600M_512px_diffusers": _page(
        "NVIDIA-Source-Code-NC", "Sana_1600M_1024px's"
    ),
    "Efficient-Large-Model/Sana_1600M_512px_diffusers": _page(
        "NVIDIA-Source-Code-NC", "Sana_1600M_1024px's"
    ),
}
"""A part's `weights` -> its licence. `ARCHITECTURE:TAG` of open_clip is written as its hub id."""


@dataclass(frozen=True)
class PartLicence:
    """A part, its weights as the config names them, and its licence."""

    part: str
    weights: str
    licence: str
    terms: str
    source: str
    commercial: bool


def of_parts(system: SystemConfig) -> list[PartLicence]:
    """The licence of every part, in the order of the config. Raises ConfigError if `licences` has a
    key that is no part."""
    parts = dict(_weights(system))
    for part in system.licences:
        if part not in parts:
            raise ConfigError(f"system.licences: no part {part!r}{_near(part, parts)}")
    licences = []
    for part, weights in parts.items():
        entry = WEIGHTS.get(weights, LicenceEntry(UNKNOWN, "not in the table: read its card"))
        if part in system.licences:
            entry = LicenceEntry(system.licences[part], "the config")
        terms = LICENCES.get(entry.licence)
        licences.append(
            PartLicence(
                part=part,
                weights=weights,
                licence=entry.licence,
                terms=terms.terms if terms else "",
                source=entry.source,
                commercial=terms.commercial if terms else "-NC" not in entry.licence.upper(),
            )
        )
    return licences


def check(system: SystemConfig) -> None:
    """Raise ConfigError unless every licence that forbids commercial use is accepted."""
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
    """(part, weights as the config names them); for a part without weights, its type."""
    yield "llm", _name(system.llm)
    for kind in ("encoders", "decoders"):
        for key, entry in getattr(system, kind).items():
            is_of_llm = getattr(entry, "has_weights_of_llm", False)
            inner = {name: getattr(entry, name, None) for name in ("video", "audio")}
            if all(isinstance(tree, Mapping) for tree in inner.values()):  # a clip and its track
                for name, tree in inner.items():
                    where = f"{kind}.{key}.{name}"
                    yield where, _name(parse_component("encoders", tree, where))
            else:
                yield f"{kind}.{key}", _name(system.llm if is_of_llm else entry)
    for key, entry in system.output_projections.items():
        if getattr(entry, "weights", None):  # a connector that starts from a language model
            yield f"output_projections.{key}", _name(entry)


def _name(entry: Any) -> str:
    """The weights that a part's config names, without open_clip's prefixes."""
    fields = {field.name: getattr(entry, field.name) for field in dataclasses.fields(entry)}
    inner = fields.get("encoder")
    if isinstance(inner, Mapping) and "type" in inner:  # an image encoder on frames
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
    """A pretrained tag of open_clip -> the hub id that it stands for."""
    name = "open_clip.pretrained"
    pretrained = import_extra(name, extra="encoders", needed_by="an encoder of type open_clip")
    return (pretrained.get_pretrained_cfg(architecture, tag).get("hf_hub") or tag).strip("/")


def _near(name: str, known: Any) -> str:
    """The end of a message: the nearest known name, or all of them."""
    return (
        did_you_mean(name, sorted(known), cutoff=0.4) or f"; known are {', '.join(sorted(known))}"
    )
