"""The switch between the kernels and their reference: who sets it, and what it switches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor
from torch.nn.attention import SDPBackend

from mmllm import config
from mmllm.errors import ConfigError
from mmllm.kernels import (
    cached_attention,
    decoder_stack,
    inference_layer,
    linear_cross_entropy,
    lora_linear,
    packed_attention,
    prepacked_linear,
    registry,
    rms_norm,
    rope,
    short_attention,
)
from mmllm.kernels.backend import ENVIRONMENT_VARIABLE, resolve_backend, use_kernels
from mmllm.llm.language_model import LanguageModel
from mmllm.projections.output import TransformerConfig, TransformerProjection
from tests.llm.families import FAMILIES

KERNELS: list[tuple[Any, str]] = [
    (cached_attention.CachedAttention, "__call__"),
    (decoder_stack, "run_layers"),
    (inference_layer, "matmul"),
    (registry, "matmul"),
    (linear_cross_entropy.TokenLossFn, "apply"),
    (lora_linear.LoRALinearFn, "apply"),
    (lora_linear.FrozenLinearFn, "apply"),
    (decoder_stack, "packed_attention"),
    (packed_attention.MathAttention, "apply"),
    (packed_attention.MathPackedAttention, "apply"),
    (prepacked_linear.PrepackCache, "__call__"),
    (rms_norm.AddRMSNormFn, "apply"),
    (rope, "apply_rope"),
    (short_attention, "sdpa_kernel"),
]
PREFIX, LENGTHS = 3, (6, 2, 9)


def build(folder: Path, **options: Any) -> LanguageModel:
    """A language model with adapters that do something, which train."""
    tree = {
        "weights": str(folder),
        "lora": {"rank": 2, "targets": ["q_proj", "up_proj"]},
        **options,
    }
    llm = config.build(config.parse_component("llm", tree, "llm", default="causal_lm"))
    llm.attach_lora()
    torch.manual_seed(0)
    for _, parameter in llm.lora_parameters():
        parameter.data.normal_(std=0.1)
        parameter.requires_grad_()
    return llm.train()


def pack(llm: LanguageModel) -> tuple[Tensor, Tensor]:
    """The states of a pack, and the gradient of its embeddings."""
    places = [torch.arange(PREFIX), *(PREFIX + torch.arange(length) for length in LENGTHS)]
    positions = torch.cat(places)[None]
    embeds = torch.randn(1, positions.shape[1], llm.width, generator=torch.Generator())
    embeds.requires_grad_()
    states = llm(embeds, positions=positions, prefix_len=PREFIX, seq_lens=LENGTHS)
    slope = torch.linspace(-1, 1, states.numel()).view(states.shape)
    return states, torch.autograd.grad((states * slope).sum(), embeds)[0]


@torch.inference_mode()
def generate(llm: LanguageModel) -> list[Tensor]:
    """The states of a prompt and of two steps that extend its cache."""
    llm.eval()
    cache, states = llm.new_cache(), []
    embeds = llm.embed(torch.arange(8)[None])
    for start, stop in ((0, 6), (6, 7), (7, 8)):
        positions = torch.arange(start, stop)[None]
        states.append(llm(embeds[:, start:stop], positions=positions, cache=cache))
    llm.train()
    return [*states, llm.head(states[-1][0])]


def test_an_argument_goes_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT_VARIABLE)
    assert resolve_backend() == "auto"
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "reference")
    assert resolve_backend() == "reference"
    assert resolve_backend("auto") == "auto"
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "fast")
    with pytest.raises(ConfigError, match="MMLLM_KERNELS: expected auto or reference, got 'fast'"):
        resolve_backend()


def test_a_system_names_its_kernels(make_model: Callable[..., Any]) -> None:
    model = make_model(kernels="reference")
    assert model.llm.kernels == "reference"
    assert {each.kernels for each in model.output_projections.values()} == {"reference"}
    assert make_model().llm.kernels == "auto"
    with pytest.raises(
        ConfigError, match=r"system\.kernels: input should be 'auto' or 'reference'"
    ):
        make_model(kernels="fast")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_computes_the_same_with_and_without_kernels(
    name: str, folders: Callable[..., Path]
) -> None:
    llm = build(folders(name))
    hidden, labels = torch.randn(5, llm.width), torch.arange(5)

    def results() -> list[Tensor]:
        packed = pack(llm) if llm.supports_prefix_packing else ()
        losses = llm.token_nll(hidden, labels), llm.kl_divergence(hidden, hidden.flip(0))
        return [*packed, *generate(llm), *losses]

    auto = results()
    use_kernels(llm, "reference")
    reference = results()
    use_kernels(llm, "auto")
    for actual, expected in zip(auto, reference, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    assert all(one.equal(again) for one, again in zip(auto, results(), strict=True))


@pytest.mark.parametrize("early", [True, False], ids=["from the start", "switched"])
def test_the_reference_calls_no_kernel(
    early: bool, folders: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And `auto` calls every one of them, so that none is forgotten here."""
    called: set[str] = set()
    for owner, name in KERNELS:
        kernel, label = getattr(owner, name), f"{owner.__name__}.{name}"

        def spy(*args: Any, _kernel: Any = kernel, _label: str = label, **kwargs: Any) -> Any:
            called.add(_label)
            return _kernel(*args, **kwargs)

        monkeypatch.setattr(owner, name, spy)
    if early:
        monkeypatch.setenv(ENVIRONMENT_VARIABLE, "reference")
    llm = build(folders("smollm"))
    shapes = {"prompt_embeds": (3, 4)}
    projection = TransformerProjection(
        TransformerConfig(2, 8, 1, 1, 2, 8), condition_shapes=shapes, width=4
    )
    for module in (llm, projection):
        use_kernels(module, "reference")
    run_everything(llm, projection)
    assert called == set()
    if not early:
        for module in (llm, projection):
            use_kernels(module, "auto")
        run_everything(llm, projection)
        expected = {f"{owner.__name__}.{name}" for owner, name in KERNELS}
        assert expected - called == {"MathAttention.apply"}  # of batches; packs have their own


def run_everything(llm: LanguageModel, projection: TransformerProjection) -> None:
    pack(llm)
    generate(llm)
    hidden = torch.randn(5, llm.width, requires_grad=True)
    llm.token_nll(hidden, torch.arange(5)).sum().backward()
    llm.kl_divergence(hidden, hidden.detach().flip(0)).sum().backward()
    layer = llm.backbone.layers[0].mlp.up_proj
    layer(torch.randn(3, llm.width, requires_grad=True)).sum().backward()
    sum(value.sum() for value in projection(torch.randn(2, 2, 4)).values()).backward()  # pyright: ignore


def test_adapters_of_the_reference_are_pefts_own(
    folders: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = {}
    for backend in ("auto", "reference"):
        monkeypatch.setenv(ENVIRONMENT_VARIABLE, backend)
        llm = build(folders("smollm"))
        kinds[backend] = type(llm.backbone.layers[0].mlp.up_proj)
    assert kinds["reference"] is Linear
    assert kinds["auto"] is lora_linear.fused_lora_linear()


def test_short_rows_train_by_plain_products_on_a_cpu() -> None:
    x = torch.zeros(1)
    with short_attention.short_attention(x, "auto"):
        assert _enabled() == {SDPBackend.MATH}
    with short_attention.short_attention(x, "reference"):
        assert len(_enabled()) > 1
    with torch.no_grad(), short_attention.short_attention(x, "auto"):
        assert len(_enabled()) > 1


def _enabled() -> set[SDPBackend]:
    cuda = torch.backends.cuda
    states = {
        SDPBackend.MATH: cuda.math_sdp_enabled(),
        SDPBackend.FLASH_ATTENTION: cuda.flash_sdp_enabled(),
        SDPBackend.EFFICIENT_ATTENTION: cuda.mem_efficient_sdp_enabled(),
    }
    return {backend for backend, enabled in states.items() if enabled}
