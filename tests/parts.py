"""Tiny real parts for tests: a random Llama with a chat template, an encoder, three pipelines.

The LLM and tokenizer are transformers', the decoders diffusers'; only their sizes are small.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from mmllm import config
from mmllm.conversation import Medium
from mmllm.encoders.base import Features, ModalityEncoder
from tests.decoders import tiny

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
KEYS = ("image", "audio", "video")
SENTENCES = [
    "What is this? Draw a red apple, please. This is the sound of a violin.",
    "Here is a clip of a rocket. You can see, hear, draw, play and animate.",
    "user assistant system hello world one two three four five six seven eight nine ten",
]


def write_llm(folder: Path, *, width: int = 32, seed: int = 0, tied: bool = True) -> Path:
    """A Llama of two layers and its byte-level BPE tokenizer, as a transformers folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(
            vocab_size=380,
            special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        eos_token="<|im_end|>",
        bos_token="<|im_start|>",
        pad_token="<|endoftext|>",
        chat_template=TEMPLATE,
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    llama = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )
    LlamaForCausalLM(llama).save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class ColourConfig:
    """An encoder that a user could bring: see ColourEncoder."""

    modality: str = "image"
    tokens: int = 4
    channels: int = 6


class ColourEncoder(ModalityEncoder):
    """A frozen random map of a medium's means: pictures, clips and sounds alike."""

    def __init__(self, colour: ColourConfig):
        super().__init__()
        self.modality = colour.modality  # pyright: ignore
        self.config = colour
        self.sample_shape = (colour.tokens, 3)
        self.feature_shape = (colour.tokens, colour.channels)
        generator = torch.Generator().manual_seed(7)
        self.map = nn.Parameter(torch.randn(3, colour.channels, generator=generator))

    def preprocess(self, medium: Medium) -> Tensor:
        values = medium.to_numpy().astype(np.float32).reshape(-1)
        parts = np.array_split(values, self.config.tokens * 3)
        return torch.tensor([part.mean() for part in parts]).view(self.config.tokens, 3) / 255

    def forward(self, samples: Tensor) -> Features:
        assert len(samples) > 0, "frozen encoders cannot take zero rows"
        return Features(samples @ self.map)

    @property
    def fingerprint(self) -> str:
        return f"colour-{self.config.tokens}x{self.config.channels}"


def build(config: ColourConfig) -> ColourEncoder:
    return ColourEncoder(config)


def system_tree(folder: Path, **changes: object) -> dict:
    """The config of a system of tiny parts, which are written under `folder`."""
    pipelines = tiny.save_pipelines(folder / "pipelines")
    signals = {"image": 4, "audio": 3, "video": 5}
    return {
        "name": "tiny",
        "llm": {
            "weights": str(write_llm(folder / "llm")),
            "system_prompt": "You see.",
            "lora": {"rank": 4, "alpha": 8, "targets": ["q_proj", "v_proj"]},
            "max_length": 256,
        },
        "encoders": {
            key: {"type": "tests.parts:ColourConfig", "modality": key, "tokens": tokens}
            for key, tokens in (("image", 4), ("audio", 2), ("video", 6))
        },
        "input_projections": {
            "image": {"type": "linear"},
            "audio": {"type": "mlp", "hidden": 16},
            "video": {"type": "resampler", "num_tokens": 3, "width": 16, "heads": 2, "layers": 1},
        },
        "decoders": {
            key: config.dump(decoder) for key, decoder in tiny.configs(pipelines, steps=2).items()
        },
        "output_projections": {
            key: {
                "type": "transformer",
                "signal_tokens": count,
                "width": 16,
                "encoder_layers": 1,
                "decoder_layers": 1,
                "heads": 2,
                "feed_forward": 32,
            }
            for key, count in signals.items()
        },
        **changes,
    }
