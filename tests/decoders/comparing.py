"""Calls of diffusers' own pipelines, and comparisons of media with what they return."""

from __future__ import annotations

import numpy as np
import torch

from mmllm.decoders.adapters import decoder_lora
from mmllm.decoders.decoder import ModalityDecoder
from tests.decoders import tiny

CAPTIONS = ["a red apple", "a blue dog runs ."]
QUOTING = ['a red "apple"', 'a "blue" dog runs .']
"""Captions with words that are to be seen."""
CALL = {
    "image": {"max_sequence_length": tiny.TOKENS, "use_resolution_binning": False},
    "video": {
        "max_sequence_length": tiny.TOKENS,
        "num_frames": tiny.FRAMES,
        "height": tiny.SIZE,
        "width": tiny.SIZE,
    },
    "text_to_video": {"num_frames": tiny.FRAMES},
    "sd3": {"max_sequence_length": tiny.TOKENS},
    "flux2": {"max_sequence_length": tiny.TOKENS, **tiny.SQUARE},
    "flux2_klein": {"max_sequence_length": tiny.TOKENS, **tiny.SQUARE},
    "z_image": {"max_sequence_length": tiny.TOKENS, **tiny.SQUARE},
    "qwen_image": {"max_sequence_length": 64, **tiny.SQUARE},
    "qwen_image21": {"height": 32, "width": 64},
    "nucleus_image": {"max_sequence_length": 96, **tiny.SQUARE},
    "krea2": {"max_sequence_length": 16, **tiny.SQUARE},
    "sana_video": {
        "max_sequence_length": tiny.TOKENS,
        "use_resolution_binning": False,
        "frames": tiny.FRAMES,
        "height": 32,
        "width": 32,
    },
    "stable_audio3": {"duration": 0.256},
    "hunyuan_video15": {"num_frames": tiny.FRAMES, **tiny.SQUARE},
    "kandinsky6": {
        "max_sequence_length": 16,
        "num_frames": tiny.FRAMES,
        "frame_rate": 4.0,
        **tiny.SQUARE,
    },
    "ace_step": {"audio_duration": 0.256, "max_text_length": 96},
    "kandinsky5": {"max_sequence_length": 16, "height": 32, "width": 32},
    "kandinsky5_video": {"max_sequence_length": 16, "num_frames": tiny.FRAMES, **tiny.SQUARE},
    "ltx": {
        "max_sequence_length": tiny.TOKENS,
        "num_frames": tiny.FRAMES,
        "height": 32,
        "width": 32,
        "frame_rate": 4.0,
    },
    "ltx2": {
        "max_sequence_length": tiny.TOKENS,
        "num_frames": tiny.FRAMES,
        "height": 32,
        "width": 32,
        "frame_rate": 4.0,
    },
    "cogvideox": {"max_sequence_length": tiny.TOKENS},
    "latte": {"video_length": tiny.FRAMES, "clean_caption": False, **tiny.SQUARE},
    "sana": {
        "max_sequence_length": tiny.TOKENS,
        "use_resolution_binning": False,
        "height": 32,
        "width": 32,
    },
    "flux": {"max_sequence_length": tiny.TOKENS, **tiny.SQUARE},
}
CALL["wan_vace"] = CALL["video"]
OUTPUT = {"image": "images", "video": "frames", "audio": "audios"}
OUTPUTS = {"kandinsky5": "image"}
"""Families whose output has another name."""


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def arrays(media: list) -> np.ndarray:
    """[M, …] in the range 0..1 (-1..1 for sounds)."""
    stacked = np.stack([medium.to_numpy() for medium in media])
    return stacked / 255 if stacked.dtype == np.uint8 else stacked


def close(media: list, expected: np.ndarray) -> None:
    """Equal to 1e-4; pixels to that and the rounding to bytes; those with opacity, on white."""
    rounding = 0.5 / 255 if media[0].to_numpy().dtype == np.uint8 else 0.0
    made = arrays(media)
    if expected.size == made.size // 3 * 4:
        *colours, opacity = np.split(expected, 4, axis=-1)
        expected = np.concatenate(colours, axis=-1) * opacity + (1 - opacity)
    np.testing.assert_allclose(made, expected.reshape(made.shape), rtol=0, atol=1e-4 + rounding)


def own_outputs(
    family: str, decoder: ModalityDecoder, captions: list[str], seeds: list[int], **guide
) -> list:
    """What the pipeline itself returns for captions and a seed each, after four steps: one output
    of all, or one each where media are made one by one."""
    whole = list(range(len(captions)))
    return [
        decoder.pipeline(
            **as_taken(
                family,
                prompt=[captions[row] for row in call],
                generator=seeded(*(seeds[row] for row in call)),
                **guiding(family, decoder.pipeline, **guide, num=len(call)),
            ),
            **CALL.get(family, {}),
            num_inference_steps=4,
            output_type="np",
        )
        for call in ([[row] for row in whole] if decoder.samples_one_by_one else [whole])
    ]


def as_taken(family: str, **call) -> dict:
    """Arguments of a call, without lists where the pipeline takes none."""
    if family != "wan_vace":
        return call
    return {name: value[0] if isinstance(value, list) else value for name, value in call.items()}


def guiding(family: str, pipeline, guidance: float, negative: str, num: int = 2) -> dict:
    """Guidance as a user would ask the pipeline for it, of `num` media."""
    if family == "flux2_klein" and negative:  # which it takes as embeddings only
        words, _ = pipeline.encode_prompt([negative] * num, max_sequence_length=tiny.TOKENS)
        return {"guidance_scale": guidance, "negative_prompt_embeds": words}
    if family == "hunyuan_video15":  # a component guides
        pipeline.guider.guidance_scale = max(guidance, 1.0)
        return {"negative_prompt": [negative] * num}
    words = {"negative_prompt": [negative] * num} if negative else {}
    if family.startswith("kandinsky"):  # without one, a prompt of its own is negative
        return {"guidance_scale": guidance, "negative_prompt": [negative] * num}
    if family.startswith("qwen_image"):  # without a negative caption it would not be guided
        return {"true_cfg_scale": guidance, "negative_prompt": [negative] * num}
    if family == "ltx2":  # of the other kinds of guidance, which are off without guidance
        words["spatio_temporal_guidance_blocks"] = [1]
        if guidance <= 1:
            words |= {"stg_scale": 0, "modality_scale": 1, "audio_guidance_scale": 1}
            words |= {"audio_stg_scale": 0, "audio_modality_scale": 1}
    return {"guidance_scale": guidance, **words}


def training_inputs(decoder: ModalityDecoder, num: int = 2):
    samples = torch.stack(
        [decoder.preprocess(tiny.medium(decoder.modality, seed)) for seed in range(num)]
    )
    latents = decoder.encode_media(samples)
    noise = torch.randn(latents.shape, generator=seeded(0)[0])
    return latents, {"noise": noise, "times": torch.linspace(0.2, 0.8, num)}


def lora_gradients(decoder: ModalityDecoder) -> list[bool]:
    """Whether each second matrix of a decoder's LoRA gets a gradient of the denoising loss."""
    lora = decoder_lora(decoder, f"decoders.{decoder.modality}", torch.device("cpu"))
    lora.requires_grad_()
    latents, noising = training_inputs(decoder)
    decoder.denoising_loss(decoder.encode_captions(CAPTIONS), latents, **noising).sum().backward()
    gradients = [weight.grad for name, weight in lora.named_weights() if ".lora_B." in name]
    assert gradients
    return [gradient is not None and bool(gradient.any()) for gradient in gradients]
