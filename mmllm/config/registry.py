"""The component registry: type name -> Config class, and building what a Config describes.

A component is named by its `type`. Its Config stands next to its class, in a module that is
imported only when a config names it.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmllm.config.parse import as_mapping, parse, suggest
from mmllm.config.renamed import RENAMED_OPTIONS, rename_keys
from mmllm.config.trusted import TRUSTED
from mmllm.errors import ConfigError, quoted

COMPONENTS: dict[str, dict[str, str]] = {
    "llm": {"causal_lm": "mmllm.llm.loading:CausalLMConfig"},
    "encoders": {
        "backbone": "mmllm.encoders.backbone:BackboneConfig",
        "efficientnet": "mmllm.encoders.efficientnet:EfficientNetConfig",
        "frames": "mmllm.encoders.frames:FramesConfig",
        "tiles": "mmllm.encoders.tiles:TilesConfig",
        "windows": "mmllm.encoders.windows:WindowsConfig",
        "audio_video": "mmllm.encoders.audio_video:AudioVideoConfig",
        "pe_audio_video": "mmllm.encoders.pe_audio_video:PeAudioVideoConfig",
        "aisfx": "mmllm.encoders.aisfx:AisfxConfig",
        "clap": "mmllm.encoders.clap:ClapConfig",
        "whisper": "mmllm.encoders.whisper:WhisperConfig",
        "ast": "mmllm.encoders.ast:AstConfig",
        "open_clip": "mmllm.encoders.open_clip:OpenClipConfig",
        "transformers_audio": "mmllm.encoders.transformers_audio:TransformersAudioConfig",
        "transformers_video": "mmllm.encoders.transformers_video:TransformersVideoConfig",
        "transformers_vision": "mmllm.encoders.transformers_vision:TransformersVisionConfig",
    },
    "input_projections": {
        "identity": "mmllm.projections.identity:IdentityConfig",
        "linear": "mmllm.projections.input:LinearConfig",
        "mlp": "mmllm.projections.input:MLPConfig",
        "words": "mmllm.projections.input:WordsConfig",
        "ctc": "mmllm.projections.ctc:CTCConfig",
        "grouping": "mmllm.projections.input:GroupingConfig",
        "resampler": "mmllm.projections.input:ResamplerConfig",
    },
    "output_projections": {
        "transformer": "mmllm.projections.output:TransformerConfig",
        "connector": "mmllm.projections.connector:ConnectorConfig",
        "residual": "mmllm.projections.residual:ResidualConfig",
    },
    "decoders": {
        "pixart": "mmllm.decoders.pixart:PixArtConfig",
        "wan": "mmllm.decoders.wan:WanConfig",
        "wan_i2v": "mmllm.decoders.wan_i2v:WanI2VConfig",
        "wan_vace": "mmllm.decoders.wan_vace:WanVACEConfig",
        "stable_audio": "mmllm.decoders.stable_audio:StableAudioConfig",
        "stable_diffusion": "mmllm.decoders.stable_diffusion:StableDiffusionConfig",
        "sd3": "mmllm.decoders.sd3:SD3Config",
        "flux": "mmllm.decoders.flux:FluxConfig",
        "audioldm2": "mmllm.decoders.audioldm2:AudioLDM2Config",
        "ltx": "mmllm.decoders.ltx:LTXConfig",
        "ltx2": "mmllm.decoders.ltx2:LTX2Config",
        "cogvideox": "mmllm.decoders.cogvideox:CogVideoXConfig",
        "latte": "mmllm.decoders.latte:LatteConfig",
        "sana": "mmllm.decoders.sana:SanaConfig",
        "modular": "mmllm.decoders.modular:ModularImageConfig",
        "modular_video": "mmllm.decoders.modular:ModularVideoConfig",
        "sana_video": "mmllm.decoders.sana_video:SanaVideoConfig",
        "ace_step": "mmllm.decoders.ace_step:AceStepConfig",
        "kandinsky5": "mmllm.decoders.kandinsky5:Kandinsky5Config",
        "kandinsky5_video": "mmllm.decoders.kandinsky5:Kandinsky5VideoConfig",
        "kandinsky6": "mmllm.decoders.kandinsky6:Kandinsky6Config",
        "nucleus_image": "mmllm.decoders.nucleus_image:NucleusImageConfig",
        "krea2": "mmllm.decoders.krea2:Krea2Config",
        "hunyuan_video15": "mmllm.decoders.hunyuan_video15:HunyuanVideo15Config",
        "stable_audio3": "mmllm.decoders.stable_audio3:StableAudio3Config",
        "z_image": "mmllm.decoders.z_image:ZImageConfig",
        "qwen_image": "mmllm.decoders.qwen_image:QwenImageConfig",
        "qwen_image21": "mmllm.decoders.qwen_image21:QwenImage21Config",
        "flux2": "mmllm.decoders.flux2:Flux2Config",
        "sdxl": "mmllm.decoders.sdxl:SDXLConfig",
        "audioldm": "mmllm.decoders.audioldm:AudioLDMConfig",
        "text_to_video": "mmllm.decoders.text_to_video:TextToVideoConfig",
    },
    "data": {
        "pairs": "mmllm.data.formats.pairs:PairsConfig",
        "dialogues": "mmllm.data.formats.dialogues:DialoguesConfig",
        "nextgpt": "mmllm.data.formats.nextgpt:NextGPTConfig",
        "llava": "mmllm.data.formats.llava:LlavaConfig",
        "edits": "mmllm.data.formats.edits:EditsConfig",
        "alpaca": "mmllm.data.formats.alpaca:AlpacaConfig",
        "messages": "mmllm.data.formats.openai_messages:OpenAIMessagesConfig",
        "table": "mmllm.data.formats.table:TableConfig",
        "labelled": "mmllm.data.formats.labelled:LabelledConfig",
        "webdataset": "mmllm.data.formats.webdataset:WebDatasetConfig",
        "scenes": "mmllm.mini.world.conversations:ConversationsConfig",
    },
}
"""Group -> type -> "module:Config". A new component is one file and one entry here."""


def component_class(group: str, kind: str, where: str | None = None) -> type:
    """Import the Config class of a component type.

    Args:
        group: key of `COMPONENTS`.
        kind: a type of that group, or "module:Config" for a component of the user's own.
        where: names the component in errors.

    Raises:
        ConfigError: an unknown type, or a module of the user's own that cannot be imported.
    """
    entry = COMPONENTS[group].get(kind, kind if ":" in kind else None)
    if entry is None:
        near = suggest(kind, COMPONENTS[group])
        raise ConfigError(
            f"{where or group}: unknown type {quoted(kind)}{near}; known are "
            f"{', '.join(sorted(COMPONENTS[group]))}, or 'your.module:YourConfig'"
        )
    module, _, name = entry.partition(":")
    if kind in COMPONENTS[group]:
        return getattr(importlib.import_module(module), name)
    try:
        cls = getattr(_import_user_module(module), name)
    except Exception as error:  # whatever a module of the user's own raises
        raise ConfigError(
            f"{where or group}: type {quoted(kind)} cannot be loaded: {type(error).__name__}: "
            f"{error}; its module has to be installed, on PYTHONPATH, or in the working folder"
        ) from error
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise ConfigError(f"{where or group}: type {quoted(kind)} is no dataclass")
    TRUSTED.components.add(entry)
    return cls


def _import_user_module(module: str) -> types.ModuleType:
    """Import a module of the user's own from the import path, else from the working folder, which
    is then appended to that path."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        folder = str(Path.cwd())
        if error.name != module.partition(".")[0] or folder in sys.path:
            raise
        sys.path.append(folder)
        try:
            return importlib.import_module(module)
        except ModuleNotFoundError:
            sys.path.remove(folder)
            raise


def parse_component(
    group: str, tree: Any, where: str, *, default: str | None = None, warn: bool = True
) -> Any:
    """`{type: …, …}` -> the Config of that type.

    Args:
        group: key of `COMPONENTS`.
        tree: the data; a Config is returned as it is.
        where: names the component in errors.
        default: the type where none is given.
        warn: log former names of a decoder's keys.

    Raises:
        ConfigError: an unknown type, an unknown or missing key, or a value of the wrong type.
    """
    if dataclasses.is_dataclass(tree):
        return tree
    tree = dict(as_mapping(tree, where))
    kind = tree.pop("type", default)
    if not isinstance(kind, str):
        known = ", ".join(sorted(COMPONENTS[group]))
        raise ConfigError(f"{where}: missing key 'type'; known are {known}")
    cls = component_class(group, kind, where)
    if group == "decoders":
        fields = {entry.name for entry in dataclasses.fields(cls)}
        former = {old: new for old, new in RENAMED_OPTIONS.items() if old not in fields}
        tree = rename_keys(tree, where, former, warn=warn)
    return parse(cls, tree, where)


def build(config: Any, **context: Any) -> Any:
    """Build the component that a Config describes, by `build` of the Config's own module.

    Args:
        config: the Config of a component.
        context: what the component needs to know of the others, such as `width`.
    """
    return importlib.import_module(type(config).__module__).build(config, **context)


def dump(config: Any) -> Any:
    """Turn a dataclass into plain data that `parse_*` reads back, component types included."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        tree: dict[str, Any] = {}
        kind = _component_type(type(config))
        if kind is not None:
            tree["type"] = kind
        for entry in dataclasses.fields(config):
            tree[entry.name] = dump(getattr(config, entry.name))
        return tree
    if isinstance(config, Mapping):
        return {key: dump(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [dump(value) for value in config]
    return str(config) if isinstance(config, Path) else config


def _component_type(cls: type) -> str | None:
    """The `type` that names this class in a config; None if it is no component."""
    entry = f"{cls.__module__}:{cls.__name__}"
    for kinds in COMPONENTS.values():
        for kind, known in kinds.items():
            if known == entry:
                return kind
    return entry if entry in TRUSTED.components else None
