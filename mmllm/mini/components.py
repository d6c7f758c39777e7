"""All classes of mini's pipelines that are not diffusers' own.

`import mmllm.mini.components` before `DiffusionPipeline.from_pretrained(folder)`: diffusers takes
classes of other packages from modules that are imported already.
"""

from __future__ import annotations

from mmllm.mini.caption_encoder import CaptionEncoder, CaptionTokenizer
from mmllm.mini.clip_transformer import ClipFrameCodec, ClipTransformer
from mmllm.mini.codecs import MelAutoencoder

__all__ = [
    "CaptionEncoder",
    "CaptionTokenizer",
    "ClipFrameCodec",
    "ClipTransformer",
    "MelAutoencoder",
]
