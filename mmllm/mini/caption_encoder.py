"""A language model's tokenizer and first layers in the text slots of mini's decoders.

Neither is saved with a pipeline: both are those of the language model's own folder.

Dimensions: B captions, T tokens, E width of the language model.
"""

# diffusers types `self.config` as a plain dict, but it answers to attributes.
# pyright: basic, reportAttributeAccessIssue=false, reportPrivateImportUsage=false

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from tokenizers.normalizers import Lowercase
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from transformers.modeling_outputs import BaseModelOutput

from mmllm.mini import folder_of
from mmllm.utils.locks import LOADING
from mmllm.utils.quiet import quiet_libraries


class CaptionTokenizer(PreTrainedTokenizerFast):
    """The tokenizer of a language model in small letters, as pipelines of diffusers make captions
    before they read them, padding on the right up to a pipeline's own length."""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *_: object, **__: object
    ) -> CaptionTokenizer:
        """Load it as a pipeline's folder says: `weights`, and `model_max_length` in tokens."""
        file = Path(pretrained_model_name_or_path, "tokenizer_config.json")
        settings = json.loads(file.read_text(encoding="utf-8"))
        return cls.of(settings["weights"], settings["model_max_length"])

    @classmethod
    def of(cls, weights: str, length: int) -> CaptionTokenizer:
        """That of a language model.

        Args:
            weights: the folder of the language model, or `mini:...`.
            length: tokens of the longest caption.
        """
        folder = folder_of(weights)
        tokenizer: Any = super().from_pretrained(folder, padding_side="right")
        tokenizer.backend_tokenizer.normalizer = Lowercase()
        tokenizer.model_max_length, tokenizer.weights = length, weights
        return tokenizer

    def save_pretrained(self, save_directory: Any, *_: object, **__: object) -> tuple[str, ...]:
        """Write where it comes from, not what it consists of."""
        own: Any = self
        file = Path(save_directory, "tokenizer_config.json")
        file.parent.mkdir(parents=True, exist_ok=True)
        settings = {"weights": own.weights, "model_max_length": self.model_max_length}
        file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        return (str(file),)


class CaptionEncoder(ModelMixin, ConfigMixin):
    """States of captions as a language model's first layers give them, channel by channel with mean
    0 and deviation 1 over captions of training.

    The first position of a sequence is an attention sink, whose state is a hundred times larger
    than the others: a token of its own stands there, and its state is left out. The layers are no
    part of the saved weights: they are read from `weights` at the first call, or belong to a
    system's language model (`text_encoder: llm`).

    `layers` is how many are used, `sink` the id of the first token, whose embedding, `sink_row`,
    tells one language model from another.
    """

    config: Any

    @register_to_config
    def __init__(
        self,
        weights: str = "mini:smollm2-135m-instruct",
        layers: int = 20,
        sink: int = 1,
        width: int = 576,
    ):
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))
        self.register_buffer("sink_row", torch.zeros(width))
        self._unregistered: tuple[Any, ...] = ()

    def read_with(self, network: Any) -> None:
        """Let a language model read the captions.

        Args:
            network: a transformers model without a head, cut to `layers`, without its last norm.
        """
        self._unregistered = (network,)

    def cut(self, config: Any) -> Any:
        """The config of a language model with `layers` layers alone.

        Args:
            config: that of a transformers model; it is changed.
        """
        config.num_hidden_layers = self.config.layers
        if kinds := getattr(config, "layer_types", None):
            config.layer_types = kinds[: self.config.layers]
        return config

    @property
    def network(self) -> Any:
        """The language model, loaded once."""
        if not self._unregistered:
            with LOADING:
                if not self._unregistered:  # else another thread was first
                    self.read_with(self._load())
        return self._unregistered[0]

    @property
    def caption_dtype(self) -> torch.dtype:
        """The dtype in which captions are read; the states that come of it have `dtype`."""
        return self.network.dtype

    def _load(self) -> Any:
        from transformers import AutoConfig, AutoModel

        folder = folder_of(self.config.weights)
        config = self.cut(AutoConfig.from_pretrained(folder))
        with torch.inference_mode(False), quiet_libraries("transformers"):
            network = AutoModel.from_pretrained(
                folder, config=config, dtype=self.dtype, use_safetensors=True
            )
        network.norm = torch.nn.Identity()
        return network.requires_grad_(False).eval().to(self.device)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: object
    ) -> BaseModelOutput:
        """Read captions.

        Args:
            input_ids: int[B, T], padded on the right.
            attention_mask: int[B, T], 1 at words; None: all are.

        Returns:
            `last_hidden_state` float[B, T, E], 0 at padding.
        """
        ids = torch.nn.functional.pad(input_ids, (1, 0), value=self.config.sink)
        words = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        mask = torch.nn.functional.pad(words, (1, 0), value=1)
        states = self.network(ids, attention_mask=mask, use_cache=False).last_hidden_state[:, 1:]
        states = (states.to(self.mean) - self.mean) / self.std
        return BaseModelOutput(last_hidden_state=states * words[..., None].to(states))
