"""`text_encoder: llm`: captions are the pipeline's own, of weights that are in memory once."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from mmllm import config
from mmllm.decoders.decoder import ModalityDecoder
from mmllm.decoders.shared_text_encoder import SharedTextEncoder
from mmllm.errors import ConfigError
from tests.decoders import tiny
from tests.decoders.comparing import CAPTIONS, arrays, seeded

CLASSES = {
    "z_image": "Qwen3ForCausalLM",
    "flux2_klein": "Qwen3ForCausalLM",
    "flux2": "Mistral3ForConditionalGeneration",
    "qwen_image": "Qwen2_5_VLForConditionalGeneration",
    "qwen_image21": "Qwen3VLForConditionalGeneration",
    "sana": "Gemma2ForCausalLM",
    "sana_video": "Gemma2ForCausalLM",
    "nucleus_image": "Qwen3VLForConditionalGeneration",
    "krea2": "Qwen3VLForConditionalGeneration",
    "kandinsky6": "Qwen2_5_VLForConditionalGeneration",
    "kandinsky5": "Qwen2_5_VLForConditionalGeneration",
    "kandinsky5_video": "Qwen2_5_VLForConditionalGeneration",
    "ltx2": "Gemma3ForConditionalGeneration",
}
"""Family -> the class in which a system would hold the language model that it reads."""
FAMILIES = pytest.mark.parametrize("family", CLASSES)


def language_model(part: Path, class_name: str, **changes: Any) -> Any:
    """What a decoder sees of a LanguageModel, with the weights of a pipeline's text encoder."""
    model = getattr(transformers, class_name).from_pretrained(part)
    options = {"weights": "the/llm", "quantization": None, "device_map": None, **changes}
    config = SimpleNamespace(**options)
    return SimpleNamespace(base_model=model, config=config, is_quantized=False)


def adapt(llm: Any) -> None:
    """Put adapters that change something into the model, as training does."""
    settings = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    llm.base_model = get_peft_model(llm.base_model, settings).get_base_model()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=0, atol=1e-4)


@pytest.fixture
def share(folders, make, tmp_path: Path) -> Callable[..., tuple[ModalityDecoder, Any]]:
    """`share("z_image")`: a decoder that a language model serves, and that model. The pipeline's
    folder has no weights of a text encoder any more when the decoder is used."""

    def build(family: str, *, adapted: bool = False, **options: Any) -> tuple[ModalityDecoder, Any]:
        folder = shutil.copytree(folders[family], tmp_path / family)
        llm = language_model(folder / "text_encoder", CLASSES[family])
        if adapted:
            adapt(llm)
        decoder = config.build(tiny.entry(family, folder, text_encoder="llm", **options))
        decoder.share_text_encoder(llm, "decoders.image")
        for file in folder.glob("text_encoder/*.safetensors"):
            file.unlink()
        return decoder, llm

    return build


@FAMILIES
def test_captions_are_the_pipelines_own_whatever_the_adapters_say(make, share, family) -> None:
    own, (decoder, llm) = make(family), share(family, adapted=True)
    same(decoder.encode_captions(CAPTIONS), own.encode_captions(CAPTIONS))
    same(decoder.unconditional(2), own.unconditional(2))
    assert any("lora_" in name for name, _ in llm.base_model.named_parameters())


@FAMILIES
def test_a_model_that_is_adapted_later_encodes_as_before(make, share, family) -> None:
    decoder, llm = share(family)
    before = decoder.encode_captions(CAPTIONS)
    adapt(llm)
    same(decoder.encode_captions(CAPTIONS), before)


@FAMILIES
def test_the_weights_are_in_memory_once(share, family) -> None:
    decoder, llm = share(family)
    encoder = decoder.pipeline.text_encoder
    assert isinstance(encoder, SharedTextEncoder)
    own = {p.data_ptr(): p.numel() for p in llm.base_model.parameters()}
    used = {p.data_ptr(): p.numel() for p in encoder.network.parameters() if not p.is_meta}
    assert used.items() <= own.items()
    text = llm.base_model.get_decoder().parameters()
    assert {p.data_ptr() for p in text} <= used.keys()
    assert list(encoder.parameters()) == []  # a pipeline that is moved or offloaded moves none
    assert sum(p.numel() for p in encoder.network.parameters() if p.is_meta) == 0


@FAMILIES
def test_media_are_those_of_the_pipeline_with_its_own_text_encoder(make, share, family) -> None:
    made = []
    for decoder in (make(family), share(family, adapted=True)[0]):
        condition = decoder.encode_captions(CAPTIONS)
        made.append(arrays(decoder.sample(condition, generators=seeded(1, 2))))
    np.testing.assert_allclose(made[0], made[1], rtol=0, atol=1e-4)
    assert np.ptp(made[0]) > 0.01


def test_a_language_model_that_moves_is_followed(share) -> None:
    decoder, llm = share("z_image")
    before = decoder.encode_captions(CAPTIONS)
    llm.base_model.to(torch.bfloat16)
    encoder = decoder.pipeline.text_encoder
    after = decoder.encode_captions(CAPTIONS)
    assert encoder.dtype == torch.bfloat16
    assert not torch.equal(after["prompt_embeds"], before["prompt_embeds"])
    torch.testing.assert_close(after["prompt_embeds"], before["prompt_embeds"], rtol=0.1, atol=0.1)
    llm.base_model.to(torch.float32)
    assert decoder.encode_captions(CAPTIONS)["prompt_embeds"].isfinite().all()


def test_caches_of_captions_are_keyed_by_their_text_encoder(make, folders, tmp_path) -> None:
    own = make("z_image")
    decoder = make("z_image", text_encoder="llm")
    llm = language_model(folders["z_image"] / "text_encoder", "Qwen3ForCausalLM")
    decoder.share_text_encoder(llm, "decoders.image")
    assert decoder.fingerprint == own.fingerprint  # a checkpoint of one is one of the other
    assert decoder.caption_fingerprint == own.caption_fingerprint == own.fingerprint
    llm.base_model.to(torch.bfloat16)
    decoder.encode_captions(["a dog"])
    assert decoder.caption_fingerprint == f"{own.fingerprint}-bfloat16"


def test_another_width_is_refused_with_both(make, folders, tmp_path: Path) -> None:
    part = folders["z_image"] / "text_encoder"
    other = transformers.Qwen3Config.from_pretrained(part, hidden_size=24, intermediate_size=48)
    transformers.Qwen3ForCausalLM(other).save_pretrained(tmp_path)
    decoder = make("z_image", text_encoder="llm")
    with pytest.raises(ConfigError) as caught:
        decoder.share_text_encoder(language_model(tmp_path, "Qwen3ForCausalLM"), "decoders.image")
    message = str(caught.value)
    assert message.startswith("decoders.image.text_encoder: llm, but llm.weights 'the/llm'")
    assert (
        "hidden_size is 16 there and 24 here, intermediate_size is 32 there and 48 here" in message
    )
    assert str(part) in message


def test_other_weights_of_the_same_size_are_refused_with_both_hashes(make, folders) -> None:
    llm = language_model(folders["z_image"] / "text_encoder", "Qwen3ForCausalLM")
    with torch.no_grad():
        llm.base_model.model.layers[1].mlp.up_proj.weight.mul_(1.01)
    decoder = make("z_image", text_encoder="llm")
    with pytest.raises(
        ConfigError,
        match=r"layers\.1\.mlp\.up_proj\.weight differs \(hash \w{12} there, \w{12} here\); give",
    ):
        decoder.share_text_encoder(llm, "decoders.image")
    llm = language_model(folders["z_image"] / "text_encoder", "Qwen3ForCausalLM")
    llm.base_model.to(torch.bfloat16)  # a dtype is no difference
    decoder.share_text_encoder(llm, "decoders.image")


@pytest.mark.parametrize("family", ["image", "video", "sdxl", "audioldm2"])
def test_a_text_encoder_that_is_no_language_model_is_refused(make, folders, family) -> None:
    llm = language_model(folders["z_image"] / "text_encoder", "Qwen3ForCausalLM")
    decoder = make(family, text_encoder="llm")
    with pytest.raises(ConfigError, match=r"model_type is '\w+' there and 'qwen3' here"):
        decoder.share_text_encoder(llm, "decoders.x")


@pytest.mark.parametrize("changes", [{"quantization": "4bit"}, {"device_map": "auto"}])
def test_weights_that_are_not_whole_are_refused(make, folders, changes) -> None:
    llm = language_model(folders["z_image"] / "text_encoder", "Qwen3ForCausalLM", **changes)
    with pytest.raises(ConfigError, match=r"quantised or spread over devices; set llm\.quant"):
        make("z_image", text_encoder="llm").share_text_encoder(llm, "decoders.image")


def test_a_decoder_outside_a_system_says_so(make) -> None:
    with pytest.raises(ConfigError, match="in no system whose LLM it could use"):
        make("z_image", text_encoder="llm").encode_captions(["a dog"])
