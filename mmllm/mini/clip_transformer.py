"""The denoiser of mini's clips and their codec, which share weights with those of images.

Dimensions: B clips, F frames, h x w latents of C channels, T caption tokens, D their width.
"""

# diffusers types `self.config` as a plain dict, but it answers to attributes.
# pyright: basic, reportPrivateImportUsage=false

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, LatteTransformer3DModel, ModelMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmllm.mini import folder_of

_WEIGHTS, _IMAGES = "diffusion_pytorch_model.safetensors", "images.json"


class ClipTransformer(LatteTransformer3DModel, ModelMixin):  # diffusers looks for the second here
    """PixArt's layers for each frame, and between them layers over time (Ma et al. 2024, "Latte").

    Without those over time it computes for every frame what a PixArtTransformer2DModel with the
    same weights does, whose names they have. Other than diffusers' class it leaves the padding of
    captions out: rows of zeros after the first.

    Of the layers over time each two neighbours are one (Lan et al. 2019, "ALBERT"), if it is made
    by `from_config`. With `images_from`, the folder of the pipeline of images whose transformer has
    the very weights, only the layers over time are saved.
    """

    images_from: str | None = None

    @classmethod
    def from_config(cls, *arguments: Any, **options: Any) -> Any:
        """See diffusers' ConfigMixin; every second layer over time is the one before it."""
        model: Any = super().from_config(*arguments, **options)
        blocks = model.temporal_transformer_blocks
        for index in range(1, len(blocks), 2):
            blocks[index] = blocks[index - 1]
        return model

    def save_pretrained(self, save_directory: Any, *_: object, **__: object) -> None:
        """Write the config, and those weights that `images_from` does not have."""
        folder = Path(save_directory)
        self.save_config(folder)
        own = self.state_dict()
        for name in self._shared():
            del own[name]
        if self.images_from is not None:
            _refer(folder, self.images_from)
            own = {name: value for name, value in own.items() if is_over_time(name)}
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
            model.images_from, images = _referred(folder)
            weights |= load_file(images / "transformer" / _WEIGHTS)
        model.load_state_dict(weights | {name: weights[of] for name, of in model._shared().items()})
        nn.Module.to(model, torch_dtype)  # diffusers' own warns of nothing
        return model.eval()

    def _shared(self) -> dict[str, str]:
        """Names of weights that are other weights, and of those."""
        first: dict[int, str] = {}
        names = dict(self.named_parameters(remove_duplicate=False)).items()
        return {name: of for name, w in names if (of := first.setdefault(id(w), name)) != name}

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


class ClipFrameCodec(AutoencoderKL):
    """The codec of a pipeline of images, in the folder of a pipeline of clips: only a reference is
    saved."""

    images_from: str

    @classmethod
    def of(cls, images_from: str) -> ClipFrameCodec:
        """That of the pipeline of images in a folder, or `mini:...`."""
        codec: Any = super().from_pretrained(folder_of(images_from) / "vae")
        codec.images_from = images_from
        return codec

    def save_pretrained(self, save_directory: Any, *_: object, **__: object) -> None:
        """Write the config, and where the weights are."""
        self.save_config(save_directory)
        _refer(Path(save_directory), self.images_from)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, torch_dtype: Any = None, **_: object
    ) -> ClipFrameCodec:
        """Read what `save_pretrained` wrote.

        Args:
            pretrained_model_name_or_path: The folder.
            torch_dtype: Of the weights; None: as they are saved.
        """
        codec: Any = cls.of(_referred(Path(pretrained_model_name_or_path))[0])
        nn.Module.to(codec, torch_dtype)
        return codec.eval()


def _refer(folder: Path, images_from: str) -> None:
    """Say in a part's folder which pipeline of images has the rest of its weights."""
    content = json.dumps({"images_from": images_from}) + "\n"
    (folder / _IMAGES).write_text(content, encoding="utf-8")


def _referred(folder: Path) -> tuple[str, Path]:
    """What `_refer` wrote, and the folder that it means."""
    source = json.loads((folder / _IMAGES).read_text(encoding="utf-8"))["images_from"]
    return source, folder_of(source)


def is_over_time(name: str) -> bool:
    """Whether a weight is one that images do not have.

    Args:
        name: The weight's, within the transformer.
    """
    return name.startswith("temporal_transformer_blocks.")
