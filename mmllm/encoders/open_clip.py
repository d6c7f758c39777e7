"""Images -> patch tokens, by the vision tower of any open_clip model.

Its vision transformers, its CLIP ResNets and the towers that it takes from timm all have
`forward_intermediates`; the text tower is neither built nor read.
Legend: M media, h x w patches, L tokens, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mmllm.conversation import Image
from mmllm.encoders.base import Features, ModalityEncoder
from mmllm.encoders.loading import open_folder, read_json, weight_files
from mmllm.encoders.pooling import block_number, check_grid, pool_grid
from mmllm.encoders.pretrained import PretrainedConfig, PretrainedEncoder, dtype_of
from mmllm.errors import AssetError, ConfigError, quoted
from mmllm.utils.extras import import_extra
from mmllm.utils.hashing import fingerprint, sha256_files
from mmllm.utils.hints import did_you_mean
from mmllm.weights import are_weights_skipped

_WHERE = "open_clip"
_CONFIG = "open_clip_config.json"
_PREFIXES = ("local-dir:", "hf-hub:")


@dataclass(frozen=True)
class OpenClipConfig(PretrainedConfig):
    """Which weights, and how their output is pooled.

    `weights` may be prefixed by open_clip's `local-dir:` and `hf-hub:`; with `architecture` it may
    also be one of its tags, such as laion2b_s34b_b79k.
    """

    modality: Literal["image"] = "image"
    architecture: str | None = None
    """A name of `open_clip.list_models()`; None where the weights come with open_clip's config."""
    layer: int = -1
    """Output of which block (of which stage, in a convolutional network); -1 is the last, with the
    model's final norm."""
    grid: int | None = None
    """Patches are averaged to grid x grid tokens; None keeps them all."""
    class_token: bool = False
    """Keep the class token, first."""


class OpenClipEncoder(PretrainedEncoder):
    """float[M, 3, H, W] -> float[M, L, C]: patches row by row from the top left."""

    component = "open_clip"
    modality: ClassVar[str] = "image"
    fingerprint_fields = ("grid", "class_token")

    def __init__(
        self, config: OpenClipConfig, tower: nn.Module, preprocessing: dict[str, Any], weights: str
    ) -> None:
        """Wrap a vision tower of open_clip; `weights` is their hash. Raises ConfigError."""
        super().__init__()
        transform = _open_clip("transform")
        self.config = config
        self.network = tower
        size = self.network.image_size
        size = (size, size) if isinstance(size, int) else tuple(size)
        preprocessing = {**preprocessing, "size": size}
        self.transform: Any = transform.image_transform_v2(
            transform.PreprocessCfg(**preprocessing), is_train=False
        )
        blocks, has_class_token, self._normed = _anatomy(self.network)
        if config.class_token and not has_class_token:
            raise ConfigError(f"{_WHERE}.class_token: this tower has none")
        self._block = block_number(config.layer, blocks, where=_WHERE)
        self._normed &= self._block == blocks

        self.sample_shape = (3, *size)
        channels, *shape = self._probe().shape[1:]
        self._grid = (shape[0], shape[1])
        check_grid(config.grid, self._grid, where=_WHERE)
        tokens = shape[0] * shape[1] if config.grid is None else config.grid**2
        self.feature_shape = (tokens + config.class_token, channels)
        self.finish(weights=weights, preprocessing=preprocessing, layer=self._block)

    def to_tensor(self, medium: Image) -> Tensor:
        """An image -> float[3, H, W], by open_clip's transform for inference."""
        return self.transform(medium.to_pil())

    def forward(self, samples: Tensor) -> Features:
        """float[M, 3, H, W] -> float[M, L, C]."""
        output = self._intermediates(self.on_network(samples))
        patches = output["image_intermediates"][0].flatten(2).transpose(1, 2)
        patches = pool_grid(patches, self._grid, self.config.grid)
        if self.config.class_token:
            prefix = output["image_intermediates_prefix"][0]  # [M, 1 or more, C]
            patches = torch.cat([prefix[:, :1], patches], dim=1)
        return Features(patches.float())

    def _intermediates(self, samples: Tensor) -> dict[str, list[Tensor]]:
        """The output of the chosen block: patches as float[M, C, h, w]."""
        return self.network.forward_intermediates(
            samples,
            indices=[self._block - 1],
            stop_early=True,
            normalize_intermediates=self._normed,
            intermediates_only=True,
            output_fmt="NCHW",
            output_extra_tokens=self.config.class_token,
        )

    def _probe(self) -> Tensor:
        """A meta tensor [1, C, h, w] of the shape of an image's patches."""
        state = {**dict(self.network.named_parameters()), **dict(self.network.named_buffers())}
        shapes = {f"network.{key}": value.to("meta") for key, value in state.items()}
        samples = torch.empty(1, *self.sample_shape, device="meta", dtype=dtype_of(self.network))
        with torch.no_grad():
            method = _MethodCall(self.network, self._intermediates)
            output = torch.func.functional_call(method, shapes, (samples,))
        return output["image_intermediates"][0]


class _MethodCall(nn.Module):
    """A module whose forward is a method that runs `network`."""

    def __init__(self, network: nn.Module, method: Any) -> None:
        super().__init__()
        self.network = network.eval()
        self.method = method

    def forward(self, samples: Tensor) -> Any:
        return self.method(samples)


def _anatomy(tower: Any) -> tuple[int, bool, bool]:
    """The number of blocks (stages) of a tower, whether it has a class token, and whether its final
    norm applies to patches: in CoCa it follows the attention pooling."""
    if hasattr(tower, "trunk"):  # of timm
        return len(tower.trunk.feature_info), getattr(tower.trunk, "num_prefix_tokens", 0) > 0, True
    if hasattr(tower, "transformer"):
        normed = tower.attn_pool is None and not tower.final_ln_after_pool
        return len(tower.transformer.resblocks), True, normed
    return 5, False, False  # a CLIP ResNet: the stem and four stages


def load_tower(model: dict[str, Any], file: Path, dtype: str) -> nn.Module:
    """Build a vision tower and load its weights.

    Args:
        model: open_clip's model config, with `embed_dim` and `vision_cfg`.
        file: safetensors in open_clip's own format; only tensors named `visual.` are loaded,
            position embeddings resized to the tower's grid.
        dtype: float32, bfloat16 or float16, as a name.

    Raises:
        AssetError: the file cannot be read, or holds another tower's weights.
    """
    tower = make_tower(model)
    try:
        weights = load_file(file)
    except (OSError, SafetensorError) as error:
        raise AssetError(f"{_WHERE}.weights: {file} cannot be read: {error}") from error
    holder = nn.Module()
    holder.visual = tower
    _open_clip("model").resize_pos_embed(weights, holder)
    expected, got = holder.state_dict(), {k: v for k, v in weights.items() if k[:7] == "visual."}
    differing = sorted(expected.keys() ^ got.keys())
    differing += [k for k in got if not differing and got[k].shape != expected[k].shape]
    if differing:
        first = differing[0]
        shapes = [list(a[first].shape) if first in a else "nothing" for a in (expected, got)]
        raise AssetError(
            f"{_WHERE}.weights: {file} does not hold the vision tower of this model: "
            f"{len(differing)} tensors differ, first {first!r}: expected {shapes[0]}, got "
            f"{shapes[1]}; is it open_clip's own format, and do architecture and {_CONFIG} fit it?"
        )
    holder.load_state_dict(got)
    return tower.to(getattr(torch, dtype))


def make_tower(model: dict[str, Any]) -> nn.Module:
    """The vision tower of open_clip's model config, untrained. (`create_model` would also build the
    text tower, which may be larger, and request it from a hub.)"""
    clip_model = _open_clip("model")
    settings = {**model["vision_cfg"], "timm_model_pretrained": False}  # weights are in the folder
    if ":" in str(settings.get("timm_model_name")):  # a hub's or a folder's, which timm would open
        raise AssetError(
            f"{_WHERE}.weights: expected the name of a model of timm, got "
            f"{quoted(settings['timm_model_name'])}"
        )
    vision = clip_model.CLIPVisionCfg(**settings)
    return clip_model._build_vision_tower(
        model["embed_dim"], vision, model.get("quick_gelu", False)
    )


def _meta_tower(model: dict[str, Any], dtype: str) -> nn.Module:
    """The untrained tower on the meta device."""
    with torch.device("meta"):
        return make_tower(model).to(getattr(torch, dtype))


def architecture_config(name: str) -> dict[str, Any]:
    """The config of a model in open_clip's list. Raises ConfigError with the nearest name."""
    open_clip = _open_clip()
    model = open_clip.get_model_config(name)
    if model is None:
        hint = did_you_mean(name, open_clip.list_models())
        raise ConfigError(
            f"{_WHERE}.architecture: open_clip has no {name!r}{hint}; `open_clip.list_models()` "
            "names all"
        )
    return model


def _tag(config: OpenClipConfig, model: dict[str, Any]) -> dict[str, Any]:
    """open_clip's entry of the tag that `weights` may be; empty if it is none."""
    if config.architecture is None:
        return {}
    tag = _open_clip("pretrained").get_pretrained_cfg(config.architecture, config.weights)
    if tag and not tag["hf_hub"]:
        raise AssetError(
            f"{_WHERE}.weights: {config.architecture} {config.weights} is published as a pickle "
            "only, which is not read here; convert it once and give its folder"
        )
    if tag and tag.get("quick_gelu", False) != model.get("quick_gelu", False):
        base = config.architecture.removesuffix("-quickgelu")
        other = f"{base}-quickgelu" if base == config.architecture else base
        raise ConfigError(
            f"{_WHERE}.architecture: the weights {config.weights} were trained with another "
            f"activation than {config.architecture} has; use {other}"
        )
    return tag


def _open_clip(module: str = "") -> Any:
    """open_clip, or one of its modules. Raises ConfigError where it is not installed."""
    name = f"open_clip.{module}" if module else "open_clip"
    return import_extra(name, extra="encoders", needed_by="an encoder of type open_clip")


def build(config: OpenClipConfig) -> ModalityEncoder:
    """The frozen encoder. Raises AssetError and ConfigError."""
    transform = _open_clip("transform")
    model = architecture_config(config.architecture) if config.architecture else {}
    tag, weights, pattern = _tag(config, model), config.weights, "open_clip*.safetensors"
    for prefix in _PREFIXES:
        weights = weights.removeprefix(prefix)
    if tag:  # owner/name/ or owner/name/file
        place = PurePosixPath(tag["hf_hub"])
        weights = str(PurePosixPath(*place.parts[:2]))
        if len(place.parts) > 2:
            pattern = place.with_suffix(".safetensors").name
    if model and are_weights_skipped():  # the list holds all that is needed
        preprocessing = transform.merge_preprocess_dict(transform.PreprocessCfg(), tag or {})
        return OpenClipEncoder(config, _meta_tower(model, config.dtype), preprocessing, "left out")
    folder = open_folder(weights, where=_WHERE, revision=config.revision, files=(_CONFIG, pattern))
    published: dict[str, Any] = {}
    if not config.architecture or (folder / _CONFIG).is_file():
        published = read_json(folder, _CONFIG, where=_WHERE)
    model = model or published.get("model_cfg", {})
    if not model.keys() >= {"embed_dim", "vision_cfg"}:
        raise AssetError(f"{_WHERE}.weights: {folder / _CONFIG} has no usable model_cfg")
    preprocessing = transform.merge_preprocess_dict(
        transform.PreprocessCfg(), tag or published.get("preprocess_cfg", {})
    )
    if are_weights_skipped():
        return OpenClipEncoder(config, _meta_tower(model, config.dtype), preprocessing, "left out")
    pattern = pattern if list(folder.glob(pattern)) else "*.safetensors"
    file = weight_files(folder, pattern, where=_WHERE)[0]
    vision = [model["vision_cfg"], model.get("quick_gelu", False)]
    weights_hash = fingerprint([sha256_files([file]), vision])
    tower = load_tower(model, file, config.dtype)
    return OpenClipEncoder(config, tower, preprocessing, weights_hash)
