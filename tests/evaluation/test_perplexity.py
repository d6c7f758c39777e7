"""Perplexity against the straightforward slow way, on a tiny random model."""

from collections.abc import Callable

import pytest
import torch

from mmllm.evaluation.perplexity import measure
from mmllm.model import AnyToAny

TEXT = "What is this? Draw a red apple, please. This is the sound of a violin. " * 3
WINDOW = 16


def _slow(model: AnyToAny, *, with_signals: bool) -> tuple[int, float]:
    """Token by token, from the transformers model itself where no signal tokens take part."""
    llm = model.llm
    ids = llm.tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    tokens, token_nll = 0, 0.0
    for start in range(0, len(ids) - WINDOW + 1, WINDOW):
        for index in range(start + 1, start + WINDOW):
            context = torch.tensor([ids[start:index]])
            if with_signals:
                logits = llm.head(llm(llm.embed(context))[0, -1])
            else:
                logits = llm.model.get_base_model()(context).logits[0, -1]
            token_nll -= logits.log_softmax(-1)[ids[index]].item()
            tokens += 1
    return tokens, token_nll


@torch.no_grad()
def test_perplexity_is_that_of_the_slow_way(make_model: Callable[..., AnyToAny]) -> None:
    model = make_model()
    model.llm.attach_lora()
    base = _slow(model, with_signals=False)  # fresh adapters change nothing
    torch.manual_seed(0)
    for _, parameter in model.llm.lora_parameters():
        parameter.data.normal_(std=0.2)
    model.llm.signal_head.data.normal_()
    adapted = _slow(model, with_signals=True)
    result = measure(model, TEXT, window=WINDOW)
    assert result.tokens == base[0] == adapted[0]
    assert result.base_nll == pytest.approx(base[1], rel=1e-5)
    assert result.adapted_nll == pytest.approx(adapted[1], rel=1e-5)
    assert result.ratio == pytest.approx(result.adapted / result.base)
    assert abs(result.ratio - 1) > 0.01


def test_signal_tokens_count(tiny_model: AnyToAny) -> None:
    """Without adapters only the signal tokens in the softmax make a difference: never a gain."""
    before = measure(tiny_model, TEXT, window=WINDOW)
    assert before.ratio > 1
    tiny_model.llm.signal_head.data.zero_()
    tiny_model.llm.signal_head.data += 100 * torch.randn(tiny_model.llm.width)
    assert measure(tiny_model, TEXT, window=WINDOW).adapted > before.adapted


def test_a_text_shorter_than_a_window_is_an_error(tiny_model: AnyToAny) -> None:
    with pytest.raises(ValueError, match="a window is 512"):
        measure(tiny_model, "short")
