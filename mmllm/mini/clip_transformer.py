"""The denoiser of mini's clips, which shares its layers with that of images.

Dimensions: B clips, F frames, h x w latents of C channels, T caption tokens, D their width.
"""

# diffusers types `self.config` as a plain dict, but it answers to attributes.
# pyright: basic, reportPrivateImportUsage=false

from __future__ import annotations

import torch
from diffusers import LatteTransformer3DModel, ModelMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor


class ClipTransformer(LatteTransformer3DModel, ModelMixin):  # diffusers looks for the second here
    """PixArt's layers for each frame, and between them layers over time (Ma et al. 2024, "Latte").

    Without those over time it computes for every frame what a PixArtTransformer2DModel with the
    same weights does, whose names they have. Other than diffusers' class it leaves the padding of
    captions out: rows of zeros after the first.
    """

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
