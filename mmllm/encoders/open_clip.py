"""Pictures -> patch tokens, by the vision tower of any open_clip model.

Its vision transformers, its CLIP ResNets and the towers that it takes from timm all answer
`forward_intermediates`; the text tower is neither built nor read.
Legend: M pictures, h x w patches, L tokens, C channels.
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
from mmllm.encoders import pretrained
from mmllm.encoders.base import Features, ModalityEncoder
from mmllm.errors import AssetError, ConfigError, quoted
from mmllm.utils.hints import did_you_mean
from mmllm.weights import are_weights_skipped

_WHERE = "open_clip"
_CONFIG = "open_clip_config.json"
_PREFIXES = ("local-dir:", "hf-hub:")


@dataclass(frozen=True)
class OpenClipConfig:
    """Which weights, what of their answer."""

    weights: str
    """A folder or a hub id (open_clip's `local-dir:` and `hf-hub:` before it are allowed); with
    `architecture` also one of its tags, "laion2b_s34b_b79k" say."""
    modality: Literal["image"] = "image"
    architecture: str | None = None
    """A name of `open_clip.list_models()`; None where the weights come with open_clip's config."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    layer: int = -1
    """Output of which block (of which stage, in a convolutional network); -1 is the last, with the
    model's final norm."""
    grid: int | None = None
    """Patches are averaged to grid x grid tokens; None keeps them all."""
    class_token: bool = False
    """Keep the class token, first."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the weights; tokens are float32."""


class OpenClipEncoder(ModalityEncoder):
    """float[M, 3, H, W] -> float[M, L, C]: patches row by row from the top left."""

    modality: ClassVar[str] = "image"

    def __init__(
        self, config: OpenClipConfig, tower: nn.Module, preprocessing: dict[str, Any], weights: str
    ) -> None:
        """`tower` is open_clip's, `weights` the hash of what it holds; raises ConfigError."""
        super().__init__()
        from open_clip.transform import PreprocessCfg, image_transform_v2

        self.config = config
        self.network: Any = tower
        size = self.network.image_size
        size = (size, size) if isinstance(size, int) else tuple(size)
        preprocessing = {**preprocessing, "size": size}
        self.transform: Any = image_transform_v2(PreprocessCfg(**preprocessing), is_train=False)
        blocks, has_class_token, self._normed = _anatomy(self.network)
        if config.class_token and not has_class_token:
            raise ConfigError(f"{_WHERE}.class_token: this tower has none")
        self._block = pretrained.block_number(config.layer, blocks, where=_WHERE)
        self._normed &= self._block == blocks

        self.sample_shape = (3, *size)
        channels, *shape = self._probe().shape[1:]
        self._grid = (shape[0], shape[1])
        pretrained.check_grid(config.grid, self._grid, where=_WHERE)
        tokens = shape[0] * shape[1] if config.grid is None else config.grid**2
        self.feature_shape = (tokens + config.class_token, channels)
        self._fingerprint = pretrained.fingerprint(
            {
                "component": _WHERE,
                "weights": weights,
                "preprocessing": preprocessing,
                "layer": self._block,
                "grid": config.grid,
                "class_token": config.class_token,
                "dtype": config.dtype,
            }
        )
        self.freeze()

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    def _preprocess(self, medium: Image) -> Tensor:
        """A picture -> float[3, H, W], as open_clip does at inference."""
        return self.transform(medium.to_pil())

    def forward(self, samples: Tensor) -> Features:
        """float[M, 3, H, W] -> float[M, L, C]."""
        said = self._run(pretrained.placed(samples, self.network))
        patches = said["image_intermediates"][0].flatten(2).transpose(1, 2)
        patches = pretrained.pool_grid(patches, self._grid, self.config.grid)
        if self.config.class_token:
            prefix = said["image_intermediates_prefix"][0]  # [M, 1 or more, C]
            patches = torch.cat([prefix[:, :1], patches], dim=1)
        return Features(patches.float())

    def _run(self, samples: Tensor) -> dict[str, list[Tensor]]:
        """Upstream's answer at the chosen block: patches as float[M, C, h, w]."""
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
        """float[1, C, h, w] of the shape that pictures give, without computing anything."""
        state = {**dict(self.network.named_parameters()), **dict(self.network.named_buffers())}
        shapes = {f"network.{key}": value.to("meta") for key, value in state.items()}
        samples = torch.empty(1, *self.sample_shape, device="meta", dtype=_dtype(self.network))
        with torch.no_grad():
            said = torch.func.functional_call(_Call(self.network, self._run), shapes, (samples,))
        return said["image_intermediates"][0]


class _Call(nn.Module):
    """A method that runs `network`, as the forward of a module that holds it."""

    def __init__(self, network: nn.Module, method: Any) -> None:
        super().__init__()
        self.network = network.eval()
        self.method = method

    def forward(self, samples: Tensor) -> Any:
        return self.method(samples)


def _dtype(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


def _anatomy(tower: Any) -> tuple[int, bool, bool]:
    """How many blocks (stages) a tower has, whether a class token, and whether its final norm
    applies to patches: in CoCa it comes after the pooling by attention."""
    if hasattr(tower, "trunk"):  # of timm
        return len(tower.trunk.feature_info), getattr(tower.trunk, "num_prefix_tokens", 0) > 0, True
    if hasattr(tower, "transformer"):
        normed = tower.attn_pool is None and not tower.final_ln_after_pool
        return len(tower.transformer.resblocks), True, normed
    return 5, False, False  # a CLIP ResNet: the stem and four stages


def load_tower(model: dict[str, Any], file: Path, dtype: str) -> nn.Module:
    """The vision tower of open_clip's model config with the weights of a safetensors file."""
    from open_clip.model import resize_pos_embed

    tower = make_tower(model)
    try:
        weights = load_file(file)
    except (OSError, SafetensorError) as error:
        raise AssetError(f"{_WHERE}.weights: {file} cannot be read: {error}") from error
    holder = nn.Module()
    holder.visual = tower
    resize_pos_embed(weights, holder)
    expected, found = holder.state_dict(), {k: v for k, v in weights.items() if k[:7] == "visual."}
    odd = sorted(expected.keys() ^ found.keys())
    odd += [key for key in found if not odd and found[key].shape != expected[key].shape]
    if odd:
        shapes = [list(a[odd[0]].shape) if odd[0] in a else "nothing" for a in (expected, found)]
        raise AssetError(
            f"{_WHERE}.weights: {file} does not hold the vision tower of this model: {len(odd)} "
            f"tensors differ, first {odd[0]!r}: expected {shapes[0]}, got {shapes[1]}; is it "
            f"open_clip's own format, and do architecture and {_CONFIG} fit it?"
        )
    holder.load_state_dict(found)
    return tower.to(getattr(torch, dtype))


def make_tower(model: dict[str, Any]) -> nn.Module:
    """The vision tower of open_clip's model config, random. `create_model` would also build the
    text tower, which may be larger, and ask a hub for it."""
    from open_clip.model import CLIPVisionCfg, _build_vision_tower

    told = {**model["vision_cfg"], "timm_model_pretrained": False}  # its weights are in the folder
    if ":" in str(told.get("timm_model_name")):  # a hub's or a folder's, which timm would open
        raise AssetError(
            f"{_WHERE}.weights: expected the name of a model of timm, got "
            f"{quoted(told['timm_model_name'])}"
        )
    vision = CLIPVisionCfg(**told)
    return _build_vision_tower(model["embed_dim"], vision, model.get("quick_gelu", False))


def _hollow(model: dict[str, Any], dtype: str) -> nn.Module:
    """The same on the meta device."""
    with torch.device("meta"):
        return make_tower(model).to(getattr(torch, dtype))


def _architecture(name: str) -> dict[str, Any]:
    """The config of a model in open_clip's list; raises ConfigError with the near name."""
    import open_clip

    found = open_clip.get_model_config(name)
    if found is None:
        hint = did_you_mean(name, open_clip.list_models())
        raise ConfigError(
            f"{_WHERE}.architecture: open_clip has no {name!r}{hint}; `open_clip.list_models()` "
            "names all"
        )
    return found


def _tag(config: OpenClipConfig, model: dict[str, Any]) -> dict[str, Any]:
    """What open_clip knows of the tag that `weights` may be; empty if it is none."""
    from open_clip.pretrained import get_pretrained_cfg

    if config.architecture is None:
        return {}
    tag = get_pretrained_cfg(config.architecture, config.weights)
    if tag and not tag["hf_hub"]:
        raise AssetError(
            f"{_WHERE}.weights: {config.architecture} {config.weights} is published as a pickle "
            "only, which is not read here; convert it once and give its folder"
        )
    if tag and tag.get("quick_gelu", False) != model.get("quick_gelu", False):
        other = config.architecture.removesuffix("-quickgelu")
        other = f"{other}-quickgelu" if other == config.architecture else other
        raise ConfigError(
            f"{_WHERE}.architecture: the weights {config.weights} were trained with another "
            f"activation than {config.architecture} has; use {other}"
        )
    return tag


def build(config: OpenClipConfig) -> ModalityEncoder:
    """The frozen encoder. Raises AssetError and ConfigError."""
    from open_clip.transform import PreprocessCfg, merge_preprocess_dict

    model = _architecture(config.architecture) if config.architecture else {}
    tag, weights, pattern = _tag(config, model), config.weights, "open_clip*.safetensors"
    for prefix in _PREFIXES:
        weights = weights.removeprefix(prefix)
    if tag:  # owner/name/ or owner/name/file
        place = PurePosixPath(tag["hf_hub"])
        weights = str(PurePosixPath(*place.parts[:2]))
        if len(place.parts) > 2:
            pattern = place.with_suffix(".safetensors").name
    if model and are_weights_skipped():  # open_clip's own list says all of it
        preprocessing = merge_preprocess_dict(PreprocessCfg(), tag or {})
        return OpenClipEncoder(config, _hollow(model, config.dtype), preprocessing, "left out")
    folder = pretrained.open_folder(
        weights, where=_WHERE, revision=config.revision, files=(_CONFIG, pattern)
    )
    told: dict[str, Any] = {}
    if not config.architecture or (folder / _CONFIG).is_file():
        told = pretrained.read_json(folder, _CONFIG, where=_WHERE)
    model = model or told.get("model_cfg", {})
    if not model.keys() >= {"embed_dim", "vision_cfg"}:
        raise AssetError(f"{_WHERE}.weights: {folder / _CONFIG} has no usable model_cfg")
    preprocessing = merge_preprocess_dict(PreprocessCfg(), tag or told.get("preprocess_cfg", {}))
    if are_weights_skipped():
        return OpenClipEncoder(config, _hollow(model, config.dtype), preprocessing, "left out")
    pattern = pattern if list(folder.glob(pattern)) else "*.safetensors"
    file = pretrained.weight_files(folder, pattern, where=_WHERE)[0]
    seen = [model["vision_cfg"], model.get("quick_gelu", False)]
    hashed = pretrained.fingerprint([pretrained.digest([file]), seen])
    return OpenClipEncoder(config, load_tower(model, file, config.dtype), preprocessing, hashed)
