"""The packed decoder stack computes what transformers does, or leaves it to transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmllm import config
from mmllm.kernels import prepacked_linear, rms_norm
from mmllm.kernels.backend import use_kernels
from mmllm.kernels.decoder_stack import PackedDecoderStack
from mmllm.llm.language_model import LanguageModel
from tests.llm.families import FAMILIES

KNOWN = ["llama3", "vicuna", "qwen3", "smollm"]
PREFIX, LENGTHS = 3, (6, 2, 9)
TOTAL = PREFIX + sum(LENGTHS)
POSITIONS = torch.cat(
    [torch.arange(PREFIX), *(PREFIX + torch.arange(length) for length in LENGTHS)]
)


def model_of(folder: Path, dtype: torch.dtype = torch.float32, **lora: Any) -> LanguageModel:
    """In training, with adapters that do something."""
    lora = {"rank": 2, "targets": ["q_proj", "v_proj", "down_proj"], **lora}
    tree = config.parse_component(
        "llm", {"weights": str(folder), "lora": lora}, "llm", default="causal_lm"
    )
    llm = config.build(tree, dtype=dtype)
    llm.attach_lora()
    torch.manual_seed(0)
    for _, parameter in llm.lora_parameters():
        parameter.data.normal_(std=0.1)
        parameter.requires_grad_()
    return llm.train()


def states_of(llm: LanguageModel, embeds: Tensor) -> Tensor:
    return llm(embeds, positions=POSITIONS[None], prefix_len=PREFIX, seq_lens=LENGTHS)


def embeds_of(llm: LanguageModel) -> Tensor:
    embeds = torch.randn(1, TOTAL, llm.width, generator=torch.Generator().manual_seed(1))
    return embeds.to(llm.embedding.weight.dtype).requires_grad_()


def results(llm: LanguageModel) -> list[Tensor]:
    """What comes out, and the gradients of embeddings and adapters."""
    embeds = embeds_of(llm)
    states = states_of(llm, embeds)
    slope = torch.linspace(-1, 1, states.numel()).view(states.shape)
    weights = [weight for _, weight in llm.lora_parameters()]
    return [states, *torch.autograd.grad((states.float() * slope).sum(), [embeds, *weights])]


def reference(llm: LanguageModel) -> list[Tensor]:
    """The same by transformers and peft alone."""
    use_kernels(llm, "reference")
    try:
        return results(llm)
    finally:
        use_kernels(llm, "auto")


def by_modules(llm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The same by transformers' layers with the kernels' attention, which rounds alike."""
    with monkeypatch.context() as patch:
        patch.setattr(PackedDecoderStack, "supports", lambda *_: False)
        return results(llm)


def is_used(llm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> bool:
    calls = []
    run = PackedDecoderStack.__call__

    def called(*arguments: Any) -> Tensor:
        calls.append(1)
        return run(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(PackedDecoderStack, "__call__", called)
        states_of(llm, embeds_of(llm))
    return bool(calls)


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["plain", "dora"])
def test_states_and_gradients_are_the_models_own(
    name: str, options: dict, folders: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rms_norm, "BLOCK_SIZE", 8)  # and a rest
    llm = model_of(folders(name), options=options)
    assert is_used(llm, monkeypatch)
    for actual, expected in zip(results(llm), reference(llm), strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["qwen3", "smollm"])
@pytest.mark.parametrize(
    "max_bytes", [0, prepacked_linear.MAX_PREPACK_BYTES], ids=["as they are", "prepacked"]
)
def test_in_bfloat16_they_are_as_near_to_the_exact_ones(
    name: str, max_bytes: int, folders: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepacked_linear, "MAX_PREPACK_BYTES", max_bytes)
    exact = results(model_of(folders(name)))
    llm = model_of(folders(name), torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert is_used(llm, monkeypatch)
        ours, own = results(llm), reference(llm)
    for one, other, right in zip(ours, own, exact, strict=True):
        assert one.dtype == other.dtype
        assert (one - right).norm() <= 2 * (other - right).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_weights_follow_the_weights(
    dtype: torch.dtype, folders: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = model_of(folders("smollm"), dtype)
    first = results(llm)[0]
    assert results(llm)[0].equal(first)
    with torch.no_grad():
        llm.backbone.layers[0].self_attn.k_proj.weight.mul_(1.5)
        llm.backbone.layers[1].mlp.down_proj.base_layer.weight.mul_(1.5)
    second = results(llm)[0]
    assert not second.allclose(first, atol=0.05)
    torch.testing.assert_close(second, by_modules(llm, monkeypatch)[0], atol=0.05, rtol=0.05)
    llm.float()
    torch.testing.assert_close(results(llm)[0], reference(llm)[0], atol=1e-4, rtol=1e-4)


def test_unsupported_layers_run_unchanged(
    folders: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in FAMILIES:
        known = PackedDecoderStack.build(model_of(folders(name)).backbone) is not None
        assert known == (name in KNOWN)
    for case in ("as it is", "hooked", "compiled", "norm trains", "recomputes", "cast"):
        llm = model_of(folders("smollm"))
        layer = llm.backbone.layers[1]
        if case == "hooked":
            layer.register_forward_hook(lambda *_: None)
        elif case == "compiled":
            layer.compile(backend="eager")
        elif case == "norm trains":
            layer.input_layernorm.weight.requires_grad_()
        elif case == "recomputes":
            llm.gradient_checkpointing_enable()
        with torch.autocast("cpu", torch.bfloat16, enabled=case == "cast"):
            assert is_used(llm, monkeypatch) == (case == "as it is")


def test_a_layer_that_trains_gets_its_gradient(
    folders: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = model_of(folders("smollm"))
    weight = llm.backbone.layers[0].mlp.up_proj.weight.requires_grad_()
    gradients = []
    for backend in ("auto", "reference"):
        use_kernels(llm, backend)
        states = states_of(llm, embeds_of(llm))
        gradients += torch.autograd.grad(states.square().sum(), [weight])
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)
