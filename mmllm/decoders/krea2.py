"""Images by Krea 2 (Krea 2026): a DiT over packed latents, conditioned on several layers of a
Qwen3-VL.

Legend: M media, P caption tokens, L layers of the text encoder, E their width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from mmllm.decoders.config import ImageConfig, SequenceConfig
from mmllm.decoders.contract import Condition
from mmllm.decoders.loading import read_model_index
from mmllm.decoders.qwen_image import QwenCodec


@dataclass(frozen=True)
class Krea2Config(ImageConfig, SequenceConfig):
    """A `Krea2Pipeline`. Its distilled model takes 8 `steps` and a `guidance` of 0."""

    steps: int = 28
    guidance: float = 4.5
    max_caption_tokens: int = 512


class Krea2Decoder(QwenCodec):
    """Condition: `prompt_embeds` [P, L * E], the layers side by side, and `prompt_embeds_mask` [P].
    The mask has a hole: the end of the template comes after the padding."""

    pipelines: ClassVar = ["Krea2Pipeline"]
    masks: ClassVar = {"prompt_embeds": "prompt_embeds_mask"}
    passes_sigmas: ClassVar[bool] = True

    @property
    def condition_shapes(self) -> dict[str, tuple[int, ...]]:
        tokens, transformer = self.config.max_caption_tokens, self.component_config("transformer")
        width = transformer["num_text_layers"] * transformer["text_hidden_dim"]
        return {"prompt_embeds": (tokens, width), "prompt_embeds_mask": (tokens,)}

    @property
    def patch_size(self) -> int:
        return read_model_index(self.folder).get("patch_size", 2)

    def encode_prompt(self, captions: Sequence[str]) -> Condition:
        embeds, mask = self.pipeline.encode_prompt(
            list(captions), self.device, max_sequence_length=self.config.max_caption_tokens
        )
        return {"prompt_embeds": embeds.flatten(2), "prompt_embeds_mask": mask}

    def denoise(self, condition: Condition, noisy: Tensor, timesteps: Tensor) -> Tensor:
        pipeline, side = self.pipeline, self.patch_size
        scale, (height, width) = pipeline.vae_scale_factor, noisy.shape[2:]
        inputs = self._layers_and_mask(condition)
        predicted = pipeline.transformer(
            hidden_states=pipeline._pack_latents(noisy, *noisy.shape),
            encoder_hidden_states=inputs["prompt_embeds"],
            timestep=timesteps / pipeline.scheduler.config.num_train_timesteps,
            position_ids=pipeline.prepare_position_ids(
                self.config.max_caption_tokens, height // side, width // side, noisy.device
            ),
            encoder_attention_mask=inputs["prompt_embeds_mask"],
            return_dict=False,
        )[0]
        return pipeline._unpack_latents(predicted, scale * height, scale * width)[:, :, 0]

    def condition_kwargs(self, condition: Condition) -> dict[str, Any]:
        return self._layers_and_mask(self.prepare_condition(condition))

    def guidance_kwargs(self, scale: float, negative: Callable[[], Condition]) -> dict[str, Any]:
        """This pipeline adds `scale` times the difference: 0 is the condition alone."""
        return {"guidance_scale": scale, **(self.negative_kwargs(negative()) if scale > 0 else {})}

    def _layers_and_mask(self, condition: Condition) -> Condition:
        """[M, P, L, E], tied to the mask by a gradient of zero, and the mask as booleans."""
        mask, layers = condition["prompt_embeds_mask"], self.pipeline.transformer.config
        embeds = (condition["prompt_embeds"] * mask[..., None]).unflatten(
            2, (layers.num_text_layers, layers.text_hidden_dim)
        )
        return {"prompt_embeds": embeds, "prompt_embeds_mask": mask > 0.5}


def build(config: Krea2Config) -> Krea2Decoder:
    return Krea2Decoder(config)
