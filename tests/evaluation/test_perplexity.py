"""Perplexity against the straightforward slow way, on a tiny random model."""

from collections.abc import Callable

import pytest
import torch

from mmllm.evaluation.perplexity import measure
from mmllm.model import AnyToAny

TEXT = "What is this? Draw a red apple, please. This is the sound of a violin. " * 3
WINDOW = 16


def _slow(model: AnyToAny, *, rows: bool) -> tuple[int, float]:
    """Token by token, from the transformers model itself where no new rows take part."""
    llm = model.llm
    ids = llm.tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    tokens, token_nll = 0, 0.0
    for start in range(0, len(ids) - WINDOW + 1, WINDOW):
        for place in range(start + 1, start + WINDOW):
            seen = torch.tensor([ids[start:place]])
            if rows:
                logits = llm.head(llm(llm.embed(seen))[0, -1])
            else:
                logits = llm.model.get_base_model()(seen).logits[0, -1]
            token_nll -= logits.log_softmax(-1)[ids[place]].item()
            tokens += 1
    return tokens, token_nll


@torch.no_grad()
def test_perplexity_is_that_of_the_slow_way(make_model: Callable[..., AnyToAny]) -> None:
    model = make_model()
    model.llm.attach_lora()
    base = _slow(model, rows=False)  # fresh adapters change nothing
    torch.manual_seed(0)
    for _, parameter in model.llm.lora_parameters():
        parameter.data.normal_(std=0.2)
    model.llm.head_rows.data.normal_()
    adapted = _slow(model, rows=True)
    found = measure(model, TEXT, window=WINDOW)
    assert found.tokens == base[0] == adapted[0]
    assert found.base_nll == pytest.approx(base[1], rel=1e-5)
    assert found.adapted_nll == pytest.approx(adapted[1], rel=1e-5)
    assert found.ratio == pytest.approx(found.adapted / found.base)
    assert abs(found.ratio - 1) > 0.01


def test_new_rows_count(tiny_model: AnyToAny) -> None:
    """Without adapters only the new rows in the softmax make a difference, and never a gain."""
    before = measure(tiny_model, TEXT, window=WINDOW)
    assert before.ratio > 1
    tiny_model.llm.head_rows.data.zero_()
    tiny_model.llm.head_rows.data += 100 * torch.randn(tiny_model.llm.width)
    assert measure(tiny_model, TEXT, window=WINDOW).adapted > before.adapted


def test_a_text_shorter_than_a_window_is_an_error(tiny_model: AnyToAny) -> None:
    with pytest.raises(ValueError, match="a window is 512"):
        measure(tiny_model, "short")
