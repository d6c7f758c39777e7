"""The denoiser of mini's clips, which shares its layers with that of images.

Dimensions: B clips, F frames, h x w latents of C channels, T caption tokens, D their width.
"""

# diffusers types `self.config` as a plain dict, but it answers to attributes.
# pyright: basic, reportPrivateImportUsage=false

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import LatteTransformer3DModel, ModelMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmllm.mini import folder_of

_WEIGHTS, _IMAGES = "diffusion_pytorch_model.safetensors", "images.json"


class ClipTransformer(LatteTransformer3DModel, ModelMixin):  # diffusers looks for the second here
    """PixArt's layers for each frame, and between them layers over time (Ma et al. 2024, "Latte").

    Without those over time it computes for every frame what a PixArtTransformer2DModel with the
    same weights does, whose names they have. Other than diffusers' class it leaves the padding of
    captions out: rows of zeros after the first.

    With `images_from`, the folder of the pipeline of images whose transformer has the very weights,
    only the layers over time are saved.
    """

    images_from: str | None = None

    def save_pretrained(self, save_directory: Any, *_: object, **__: object) -> None:
        """Write the config, and those weights that `images_from` does not have."""
        folder = Path(save_directory)
        self.save_config(folder)
        own = self.state_dict()
        if self.images_from is not None:
            elsewhere = {"images_from": self.images_from}
            (folder / _IMAGES).write_text(json.dumps(elsewhere) + "\n", encoding="utf-8")
            own = {name: value for name, value in own.items() if _is_over_time(name)}
        save_file({name: value.contiguous() for name, value in own.items()}, folder / _WEIGHTS)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, torch_dtype: Any = None, **_: object
    ) -> ClipTransformer:
        """Read what `save_pretrained` wrote.

        Args:
            pretrained_model_name_or_path: The folder.
            torch_dtype: Of the weights; None: as they are created.
        """
        folder = Path(pretrained_model_name_or_path)
        config: Any = cls.load_config(folder)
        model: Any = cls.from_config(config)
        weights = load_file(folder / _WEIGHTS)
        if (folder / _IMAGES).is_file():
            source = json.loads((folder / _IMAGES).read_text(encoding="utf-8"))["images_from"]
            weights |= load_file(folder_of(source) / "transformer" / _WEIGHTS)
            model.images_from = source
        model.load_state_dict(weights)
        return model.to(torch_dtype).eval()

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        enable_temporal_attentions: bool = True,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Denoise.

        Args:
            hidden_states: float[B, C, F, h, w].
            timestep: float[B].
            encoder_hidden_states: float[B, T, D], zeros at padding.
            enable_temporal_attentions: Whether frames see each other.
            return_dict: Whether the result is diffusers' or a tuple.

        Returns:
            float[B, 2 C, F, h, w]; the second half, which Latte's pipeline leaves out, is zeros.
        """
        counts = (encoder_hidden_states != 0).any(-1)
        counts[:, 0] = True  # an empty caption
        bias = torch.where(counts, 0.0, -10_000.0).to(hidden_states.dtype)[:, None]  # [B, 1, T]
        made = super().forward(
            hidden_states,
            timestep=timestep,  # pyright: ignore[reportArgumentType] - any numbers do
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=bias.repeat_interleave(hidden_states.shape[2], 0),
            enable_temporal_attentions=enable_temporal_attentions,
            return_dict=False,
        )[0]
        made = torch.cat([made, torch.zeros_like(made)], dim=1)
        return Transformer2DModelOutput(sample=made) if return_dict else (made,)


def _is_over_time(name: str) -> bool:
    """Whether a weight is one that images do not have."""
    return name.startswith("temporal_transformer_blocks.")
