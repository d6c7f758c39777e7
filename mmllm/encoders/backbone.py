"""Images -> embeddings, by the tower and the projector that the language model was trained with.

Both are parts of the language model's weights, which are loaded once; with `type: identity` as its
input projection an untrained system reads an image as the model itself does.
Legend: M media, L tokens, C channels.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from mmllm.conversation import Image, Medium
from mmllm.encoders.base import Features, ModalityEncoder
from mmllm.encoders.loading import METADATA_KEYS, open_folder
from mmllm.encoders.towers import Tower, build_tower
from mmllm.errors import ConfigError
from mmllm.utils.hashing import fingerprint
from mmllm.weights import remote_code_disabled

_FILES = ("*.json",)


@dataclass(frozen=True)
class BackboneConfig:
    """How much of an image is read.

    Attributes:
        modality: image.
        max_tokens: most embeddings of an image: larger ones are made smaller, or fewer tiles.
    """

    has_weights_of_llm: ClassVar[bool] = True

    modality: Literal["image"] = "image"
    max_tokens: int = 256

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ConfigError(f"max_tokens: expected at least 1, got {self.max_tokens}")


class BackboneEncoder(ModalityEncoder):
    """float[M, *S] -> float[M, L, C], with a mask: images differ in their number of tokens.

    Its weights are the language model's: they are moved, saved and counted there.
    """

    modality = "image"
    tower: Tower
    _parts: tuple[Any, ...] = ()

    def __init__(self, config: BackboneConfig):
        super().__init__()
        self.config = config
        self._fingerprint = ""

    def attach(self, llm: Any) -> None:
        """Take the tower of the language model.

        Raises:
            ConfigError: it has none that mmllm can use.
            AssetError: its folder has no processor.
        """
        folder = open_folder(llm.config.weights, where="encoders: backbone", files=_FILES)
        with remote_code_disabled():
            model = llm.base_model
            self.tower = build_tower(
                model, folder, self.config.max_tokens, where="encoders: backbone"
            )
        self._parts = (model,)  # not a submodule: it is one of the language model already
        self.sample_shape, self.feature_shape = self.tower.sample_shape, self.tower.feature_shape

    @property
    def layout(self) -> tuple[str, str, Callable[[Medium], Any], bool]:
        """How an image stands in a prompt."""
        tower = self.tower
        return tower.before, tower.after, self._measure, tower.attends_to_itself

    def _measure(self, medium: Medium) -> tuple[int, tuple[int, int, int] | None]:
        assert isinstance(medium, Image)
        return self.tower.measure(medium)

    def to_tensor(self, medium: Image) -> Tensor:
        """An image -> float[*S]."""
        return self.tower.to_tensor(medium)

    @torch.no_grad()
    def forward(self, samples: Tensor) -> Features:
        """float[M, *S] -> float[M, L, C] and bool[M, L]."""
        (model,) = self._parts
        weight = next(model.get_encoder(modality="image").parameters())
        return self.tower.forward(samples.to(weight.device))

    @property
    def fingerprint(self) -> str:
        if not self._fingerprint:
            (model,) = self._parts
            self._fingerprint = fingerprint(
                {
                    "component": "backbone",
                    "weights": _hash_towers(model),
                    "preprocessing": self.tower.processor.to_dict(),
                    "max_tokens": self.config.max_tokens,
                }
            )
        return self._fingerprint


def _hash_towers(model: Any) -> str:
    """The hash of all weights that are not the language part's, and of the tower's config."""
    language = {id(weight) for weight in model.get_decoder().parameters()}
    language.add(id(model.get_output_embeddings().weight))
    vision = model.config.vision_config.to_dict()
    facts = {key: value for key, value in vision.items() if key not in {*METADATA_KEYS, "dtype"}}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    for name, weight in model.named_parameters():
        if id(weight) not in language and not weight.is_meta:
            digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
            flat = weight.detach().contiguous().view(-1).view(torch.uint8)
            digest.update(flat.cpu().numpy().tobytes())
    return digest.hexdigest()


def build(config: BackboneConfig) -> ModalityEncoder:
    """The encoder, which has no weights before `attach`."""
    return BackboneEncoder(config)
