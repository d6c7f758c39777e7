"""Encoding captions: what several families' `encode_prompt` have in common.

Legend: M captions, P positions, E width of the text encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmllm.decoders.contract import Condition, DecoderContract


def encode_with_t5(
    decoder: DecoderContract, captions: Sequence[str], *, zero_padding: bool = True
) -> Condition:
    """Encode captions with the pipeline's T5.

    Args:
        decoder: the decoder, whose config gives P, `max_caption_tokens`.
        captions: M texts; longer ones are cut.
        zero_padding: whether the states of the padding are zeros or what the T5 makes of it.

    Returns:
        `prompt_embeds` float[M, P, E], and each mask that the family declares, float[M, P].
    """
    pipeline = decoder.pipeline
    tokens = pipeline.tokenizer(
        [decoder.clean_prompt(caption) for caption in captions],
        padding="max_length",
        max_length=decoder.config.max_caption_tokens,
        truncation=True,
        return_attention_mask=True,
        return_tensors="pt",
    ).to(decoder.device)
    mask = tokens.attention_mask
    states = pipeline.text_encoder(tokens.input_ids, attention_mask=mask)[0].float()
    condition = {"prompt_embeds": states * mask[..., None] if zero_padding else states}
    return condition | {name: mask.float() for name in decoder.masks.values()}


def encode_with_mask(
    decoder: DecoderContract, captions: Sequence[str], **options: Any
) -> Condition:
    """Encode captions by a pipeline's own `encode_prompt` that also returns a mask.

    Args:
        decoder: the decoder, whose config gives P, `max_caption_tokens`.
        captions: M texts; longer ones are cut.
        **options: further arguments of `encode_prompt`.

    Returns:
        `prompt_embeds` float[M, P, E] and `prompt_attention_mask` [M, P].
    """
    embeds, mask, _, _ = decoder.pipeline.encode_prompt(
        list(captions),
        do_classifier_free_guidance=False,
        max_sequence_length=decoder.config.max_caption_tokens,
        device=decoder.device,
        **options,
    )
    return {"prompt_embeds": embeds, "prompt_attention_mask": mask}
