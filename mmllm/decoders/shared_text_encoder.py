"""The text encoder of a pipeline, made of the language model's own weights (`text_encoder: llm`).

Many pipelines read the hidden states of a language model. Where that is the system's own one, its
weights are in memory already. The text encoder is then a second tree of modules over the same
tensors, without the adapters, signal tokens, hooks and kernels of the language model: captions are
those of the base model, whatever trains, and while the model answers in another thread.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from mmllm.errors import AssetError, ConfigError, quoted, wrap_errors
from mmllm.kernels.devices import to_device

COMPONENT = "text_encoder"
"""The component of a pipeline that the language model may stand for."""

_ARCHITECTURE = (
    *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "hidden_activation"),
    *("rms_norm_eps", "rope_parameters", "layer_types", "sliding_window", "attention_bias"),
)
"""Fields of a text model's config that decide what it computes."""
_CONTAINERS = {"model", "language_model", "text_model"}
"""Modules around the layers, which differ between the classes of one model."""
_TEXT_MODULES = {"embed_tokens", "layers", "norm", "rotary_emb", "lm_head"}
"""Modules that a caption passes through; all others are towers of other modalities."""
_PRECISIONS = (torch.float32, torch.float16, torch.bfloat16)
"""From fine to coarse."""


@dataclass(frozen=True)
class _Slot:
    """The place of one tensor in a module."""

    tensors: dict[str, Any]
    name: str

    def read(self) -> Tensor:
        """Return the tensor that is there now."""
        return self.tensors[self.name]


class SharedTextEncoder(nn.Module):
    """A pipeline's text encoder whose tensors are those of a language model.

    Nothing is registered as its parameter, so that what moves, casts, offloads or counts the parts
    of a pipeline leaves the language model alone.
    """

    def __init__(self, network: nn.Module, sources: Mapping[str, _Slot]):
        """Let a network compute with the tensors of a language model.

        Args:
            network: of the pipeline's class, on the meta device.
            sources: the places of the language model's tensors, by their common names.
        """
        super().__init__()
        self._unregistered = (network.requires_grad_(False).eval(),)
        self._links = [
            (slot, sources[name]) for name, slot in _slots(network).items() if name in sources
        ]
        self._bind()

    @property
    def network(self) -> Any:
        """The network, a transformers model."""
        return self._unregistered[0]

    @property
    def config(self) -> Any:
        """The network's config."""
        return self.network.config

    @property
    def model(self) -> Any:
        """The network without its head, for pipelines that look inside."""
        return self.network.model

    @property
    def device(self) -> torch.device:
        """The device of the language model."""
        return self.network.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the language model."""
        return self.network.get_input_embeddings().weight.dtype

    @property
    def caption_dtype(self) -> torch.dtype:
        """The dtype in which captions are read."""
        return self.dtype

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the network as a pipeline calls its own text encoder.

        Args:
            *args: tensors, on any device, as the pipeline gives them.
            **kwargs: the same by name, and options of the transformers class.

        Returns:
            The output of the transformers class.
        """
        self._bind()
        kwargs = {"use_cache": False, **{name: self._here(value) for name, value in kwargs.items()}}
        if hasattr(self.network, "lm_head"):  # no pipeline reads the logits: one is enough
            kwargs["logits_to_keep"] = 1
        return self.network(*(self._here(value) for value in args), **kwargs)

    def _bind(self) -> None:
        """Take the tensors as the language model has them now: it may have been moved."""
        for slot, source in self._links:
            slot.tensors[slot.name] = source.read()

    def _here(self, value: Any) -> Any:
        return to_device(value, self.device) if isinstance(value, Tensor) else value


def share_text_encoder(folder: Path, component: tuple[str, str], llm: Any, where: str) -> nn.Module:
    """Make a pipeline's text encoder of the language model, after checking that it is the same one.

    The configs are compared, and one row of every tensor of the folder, if it has the weights.

    Args:
        folder: of the pipeline.
        component: library and class of its text encoder: a class of transformers, or mini's
            `CaptionEncoder`, which reads with the first layers.
        llm: the `LanguageModel`; it may be on the meta device.
        where: the decoder's key in the config, for errors.

    Raises:
        ConfigError: the language model is another one, is quantised, or is spread over devices.
        AssetError: the folder's text encoder cannot be read.
    """
    import transformers

    library, class_name = component
    if library != "transformers":  # checked there
        return _share_layers(folder / COMPONENT, importlib.import_module(library), llm, where)
    _check_shareable(llm, where)
    part, cls = folder / COMPONENT, getattr(transformers, class_name)
    with wrap_errors(AssetError, part):
        config = cls.config_class.from_pretrained(str(part))
    difference = _config_difference(config, llm.base_model.config)
    if difference is None:
        with torch.device("meta"):
            network = cls(config)
        own = _slots(llm.base_model)
        difference = _missing(network, own) or _weights_difference(part, own)
        if difference is None:
            return SharedTextEncoder(network, own)
    raise ConfigError(
        f"{where}.text_encoder: llm, but llm.weights {quoted(llm.config.weights)} is another model "
        f"than the pipeline's own text encoder, {part}: {difference}; give that model as "
        "llm.weights, or set text_encoder to own"
    )


def _share_layers(part: Path, library: Any, llm: Any, where: str) -> nn.Module:
    """Mini's caption encoder, reading with the first layers of the language model."""
    from transformers import AutoModel

    check_first_layers(part, llm, where)
    with wrap_errors(AssetError, part):
        encoder = library.CaptionEncoder.from_pretrained(part).eval()
    models: Any = AutoModel
    config = copy.deepcopy(llm.base_model.config.get_text_config())
    with torch.device("meta"):
        network = models.from_config(encoder.cut(config))
    network.norm = nn.Identity()
    encoder.read_with(SharedTextEncoder(network, _slots(llm.base_model)))
    return encoder


def check_first_layers(part: Path, llm: Any, where: str) -> None:
    """Check that a caption encoder of mini reads with the language model, by one embedding, without
    an import of its classes.

    Args:
        part: the text encoder's folder.
        llm: the `LanguageModel`; it may be on the meta device.
        where: the decoder's key in the config, for errors.

    Raises:
        ConfigError: the language model is another one, is quantised, or is spread over devices.
        AssetError: the folder cannot be read.
    """
    _check_shareable(llm, where)
    with wrap_errors(AssetError, part):
        config = json.loads((part / "config.json").read_text(encoding="utf-8"))
        with safe_open(next(part.glob("*.safetensors")), "pt") as file:
            expected = file.get_tensor("sink_row")
        sink, weights, layers = config["sink"], config["weights"], config["layers"]
    row = _slots(llm.base_model)["embed_tokens.weight"].read().detach()[sink]
    if row.shape != expected.shape or not (
        row.is_meta or torch.allclose(row.float().cpu(), expected.float(), rtol=1e-2, atol=1e-3)
    ):
        raise ConfigError(
            f"{where}.text_encoder: llm, but llm.weights {quoted(llm.config.weights)} is another "
            f"model than {quoted(weights)}, whose first {layers} layers the pipeline reads "
            "captions with; give that model as llm.weights, or set text_encoder to own"
        )


def _check_shareable(llm: Any, where: str) -> None:
    """Raise ConfigError where a language model's weights cannot serve a pipeline."""
    if llm.is_quantized or llm.config.quantization or llm.config.device_map is not None:
        raise ConfigError(
            f"{where}.text_encoder: llm needs the weights of the language model as they are and on "
            "one device, but they are quantised or spread over devices; set llm.quantization and "
            "llm.device_map to null, or text_encoder to own"
        )


def _slots(model: nn.Module) -> dict[str, _Slot]:
    """The place of every tensor of a model, adapters left out, by a name that all classes of one
    model have in common, such as `layers.0.self_attn.q_proj.weight`."""
    slots = {}
    for prefix, module in model.named_modules():
        if "lora_" in prefix:
            continue
        for tensors in (module._parameters, module._buffers):
            for name in tensors:
                if tensors[name] is not None:
                    slots[_common_name(f"{prefix}.{name}")] = _Slot(tensors, name)
    return slots


def _common_name(name: str) -> str:
    """The name of a tensor without containers in front and without peft's wrapper."""
    parts = [part for part in name.split(".") if part != "base_layer"]
    while parts[0] in _CONTAINERS:
        parts.pop(0)
    return ".".join(parts)


def _config_difference(theirs: Any, ours: Any) -> str | None:
    """What differs between two text models' configs, in words; None if nothing that matters."""
    theirs, ours = theirs.get_text_config(), ours.get_text_config()
    differing = [
        f"{name} is {there!r} there and {here!r} here"
        for name in _ARCHITECTURE
        if (there := getattr(theirs, name, None)) != (here := getattr(ours, name, None))
    ]
    return ", ".join(differing[:3]) or None


def _missing(network: nn.Module, own: Mapping[str, _Slot]) -> str | None:
    """Which tensor that a caption needs the language model lacks, in words."""
    for name in _slots(network):
        if name not in own and name.split(".")[0] in _TEXT_MODULES:
            return f"the language model has no {name}"
    return None


def _weights_difference(part: Path, own: Mapping[str, _Slot]) -> str | None:
    """Which tensor of a folder is not the language model's, in words; None if all are, and where
    there is nothing to compare."""
    there, here, first = hashlib.sha256(), hashlib.sha256(), None
    for name, stored in _first_rows(part, own):
        tensor = own[name].read().detach()
        if not {tensor.dtype, stored.dtype} <= set(_PRECISIONS):
            return f"{name} is of {stored.dtype} there and of {tensor.dtype} here"
        dtype = max(tensor.dtype, stored.dtype, key=_PRECISIONS.index)
        rows = [(tensor[:1] if tensor.ndim > 1 else tensor).cpu(), stored]
        ours, theirs = (row.to(dtype).float() for row in rows)
        if first is None and not torch.equal(ours, theirs):
            first = name
        here.update(ours.numpy().tobytes())
        there.update(theirs.numpy().tobytes())
    if first is None:
        return None
    return f"{first} differs (hash {there.hexdigest()[:12]} there, {here.hexdigest()[:12]} here)"


def _first_rows(part: Path, own: Mapping[str, _Slot]) -> Iterator[tuple[str, Tensor]]:
    """Common name and first row of every matrix in a folder's safetensors, vectors whole, of those
    that the language model holds in memory, too."""
    for file in sorted(part.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118 - it is no mapping
                name = _common_name(key)
                if name not in own or own[name].read().is_meta:
                    continue
                values = opened.get_slice(key)
                yield name, values[:1] if len(values.get_shape()) > 1 else opened.get_tensor(key)
