"""The text encoder of mini's decoders: a language model's first layers, its own or the system's."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mmllm.decoders.shared_text_encoder import COMPONENT, share_text_encoder
from mmllm.errors import ConfigError
from mmllm.mini.caption_encoder import CaptionEncoder
from tests import parts

CAPTIONS = ["a red apple", "hello world, this is the sound of a violin"]
SLOT = ("mmllm.mini.caption_encoder", "CaptionEncoder")


def language_model(folder: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    config = SimpleNamespace(weights=str(folder), quantization=None, device_map=None)
    return SimpleNamespace(base_model=model, config=config, is_quantized=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A pipeline's folder with an encoder of one layer of a tiny language model."""
    llm = parts.write_llm(tmp_path / "llm")
    encoder: Any = CaptionEncoder(weights=str(llm), layers=1, sink=1, width=32)
    encoder.mean.copy_(torch.randn(32))
    encoder.std.copy_(1 + torch.rand(32))
    embeddings = language_model(llm).base_model.get_input_embeddings().weight
    encoder.sink_row.copy_(embeddings[1].detach())
    encoder.save_pretrained(tmp_path / COMPONENT)
    return tmp_path


def read(encoder: Any, captions: list[str], llm: Path, length: int = 16) -> torch.Tensor:
    tokenizer: Any = AutoTokenizer.from_pretrained(llm)
    tokenizer.padding_side = "right"
    tokens = tokenizer(captions, padding="max_length", max_length=length, return_tensors="pt")
    with torch.no_grad():
        return encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0]


def test_states_are_those_of_the_first_layer_standardised(folder: Path) -> None:
    encoder: Any = CaptionEncoder.from_pretrained(folder / COMPONENT)
    llm = folder / "llm"
    tokenizer: Any = AutoTokenizer.from_pretrained(llm)
    ids = tokenizer(CAPTIONS[0], return_tensors="pt").input_ids
    model: Any = language_model(llm).base_model
    with torch.no_grad():
        whole = model(torch.cat([torch.ones_like(ids[:, :1]), ids], 1), output_hidden_states=True)
    wanted = (whole.hidden_states[1][0, 1:] - encoder.mean) / encoder.std
    states = read(encoder, CAPTIONS, llm, length=32)
    torch.testing.assert_close(states[0, : len(wanted)], wanted, rtol=0, atol=1e-5)
    assert not states[0, len(wanted) :].any()
    alone = read(encoder, CAPTIONS[1:], llm, length=32)
    torch.testing.assert_close(states[1:], alone, rtol=0, atol=1e-5)


def test_the_system_s_own_language_model_reads_the_same(folder: Path) -> None:
    llm = language_model(folder / "llm")
    shared: Any = share_text_encoder(folder, SLOT, llm, "decoders.image")
    own: Any = CaptionEncoder.from_pretrained(folder / COMPONENT)
    states = read(shared, CAPTIONS, folder / "llm", length=32)
    torch.testing.assert_close(
        states, read(own, CAPTIONS, folder / "llm", length=32), rtol=0, atol=1e-5
    )
    held = {tensor.data_ptr() for tensor in llm.base_model.parameters()}
    assert {tensor.data_ptr() for tensor in shared.network.network.parameters()} <= held
    assert not list(shared.parameters())


def test_another_language_model_is_refused(folder: Path, tmp_path: Path) -> None:
    other = language_model(parts.write_llm(tmp_path / "other", seed=7))
    with pytest.raises(
        ConfigError, match=r"decoders.image.text_encoder: llm, but .* another model"
    ):
        share_text_encoder(folder, SLOT, other, "decoders.image")
