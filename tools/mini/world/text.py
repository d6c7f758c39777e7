"""Captions as states of the frozen language model: the text encoder of mini's decoders.

SmolLM2's own first layers read the caption, once, before a decoder is trained. The first position
is left out (it is an attention sink with a hundred times the norm of the others), and every
channel is standardised by statistics over captions of training.

Dimensions: N captions, T tokens (without the first), D = 576 channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from mmllm.kernels.precision import fast_dtype
from mmllm.mini import assets
from mmllm.mini.caption_encoder import CaptionTokenizer

LAYERS = 20
"""Layers of the language model that read a caption, of 30."""
MAX_TOKENS = 40
SINK = "<|im_start|>"
"""The token before every caption, whose state is left out."""


def base_model() -> Any:
    """The language model without its head, in bfloat16 where that is fast."""
    folder = assets.fetch("smollm2-135m-instruct")
    causal: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=fast_dtype("cpu"))
    return causal.model.eval()


class CaptionReader:
    """The tokenizer and the first layers of the language model."""

    def __init__(self) -> None:
        folder = assets.fetch("smollm2-135m-instruct")
        self.tokenizer: Any = CaptionTokenizer.of(str(folder), MAX_TOKENS)
        self.model = base_model()
        self.model.layers = self.model.layers[:LAYERS]
        self.model.norm = torch.nn.Identity()
        self.sink = self.tokenizer.convert_tokens_to_ids(SINK)

    @torch.inference_mode()
    def read(self, captions: list[str]) -> list[Tensor]:
        """The states of each caption, bfloat16[T, D], in one padded forward pass."""
        ids = [self.tokenizer(text).input_ids[:MAX_TOKENS] for text in captions]
        width = max(map(len, ids)) + 1
        tokens = torch.full((len(ids), width), self.sink)
        mask = torch.zeros(len(ids), width, dtype=torch.long)
        for row, text in enumerate(ids):
            tokens[row, 1 : len(text) + 1] = torch.tensor(text)
            mask[row, : len(text) + 1] = 1
        states = self.model(tokens, attention_mask=mask, use_cache=False).last_hidden_state
        states = states.bfloat16()
        return [state[1 : len(text) + 1].clone() for state, text in zip(states, ids, strict=True)]


@dataclass(frozen=True)
class CaptionStates:
    """States of many captions, one after another, and their statistics."""

    states: Tensor  # bfloat16[sum of T, D], as the model gives them
    offsets: Tensor  # long[N + 1]
    mean: Tensor  # float[D]
    std: Tensor  # float[D]

    @classmethod
    def of(cls, captions: list[str], reader: CaptionReader, batch: int = 64) -> CaptionStates:
        """Read captions, those of similar length together."""
        order = sorted(range(len(captions)), key=lambda index: len(captions[index]))
        parts: dict[int, Tensor] = {}
        for start in tqdm(range(0, len(order), batch), desc="reading captions", mininterval=10):
            chosen = order[start : start + batch]
            read = reader.read([captions[index] for index in chosen])
            parts |= dict(zip(chosen, read, strict=True))
        lengths = torch.tensor([0] + [len(parts[index]) for index in range(len(captions))])
        states = torch.cat([parts[index] for index in range(len(captions))])
        sample = states[:: max(1, len(states) // 100_000)].float()
        return cls(states, lengths.cumsum(0), sample.mean(0), sample.std(0))

    def save(self, path: Path) -> None:
        save_file(vars(self), path)

    @classmethod
    def load(cls, path: Path) -> CaptionStates:
        return cls(**load_file(path))

    def batch(self, rows: list[int], empty: list[bool]) -> tuple[Tensor, Tensor]:
        """Standardised states and mask of captions: float[B, MAX_TOKENS, D], float[B, MAX_TOKENS].

        Args:
            rows: Which captions.
            empty: Where the caption is left out: one zero state, as for an empty prompt.
        """
        return standardised(
            [self.states[self.offsets[row] : self.offsets[row + 1]] for row in rows],
            self.mean,
            self.std,
            empty,
        )


def standardised(
    read: list[Tensor], mean: Tensor, std: Tensor, empty: list[bool]
) -> tuple[Tensor, Tensor]:
    """States with mean 0 and deviation 1 per channel, padded by zeros, and their mask."""
    width = max([1, *(len(state) for state in read)])
    states = torch.zeros(len(read), width, len(mean))
    mask = torch.zeros(len(read), width)
    for row, (state, left_out) in enumerate(zip(read, empty, strict=True)):
        if left_out:
            mask[row, 0] = 1
            continue
        states[row, : len(state)] = (state.float() - mean) / std
        mask[row, : len(state)] = 1
    return states, mask
