"""A language model as a plain transformers folder: LoRA merged, and signal tokens where asked for.

Legend: V rows of the model's table, R signal tokens, O outputs, D width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmllm.errors import ConfigError
from mmllm.llm.language_model import LanguageModel


def merge(llm: LanguageModel) -> None:
    """Add the adapters to the weights, W + (alpha / r) B A, and take them away: the same model,
    a product less in every layer. Refused for quantised weights, which would be rounded again."""
    if llm.is_quantized:
        raise ConfigError("LoRA is merged into whole weights: load with llm.quantization null")
    if llm.has_lora:
        llm.model = llm.model.merge_and_unload()


def signal_names(llm: LanguageModel) -> list[str]:
    """How signal tokens are spelt in a plain tokenizer, in the order of their ids."""
    return [
        f"<|{key}_{number}|>"
        for key, count in llm.tokens.signal_tokens.items()
        for number in range(count)
    ]


def save_transformers(llm: LanguageModel, folder: Path, *, signals: bool = False) -> None:
    """Write what `AutoModelForCausalLM.from_pretrained(folder)` loads; `merge` comes before.

    `signals` adds the signal tokens to the tokenizer, behind its last token, and their rows to
    embedding and head, which are then no longer tied. A run's first token has the logit that it
    has here. The others are never predicted, and a head has no such thing: their logit is the mean
    of all tokens', which is never the largest.
    """
    assert not llm.has_lora
    tokenizer, model = llm.tokenizer, llm.model
    if signals:
        _add_signals(llm)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if llm.chat_template != tokenizer.chat_template:  # one that the config names
        (folder / "chat_template.jinja").write_text(llm.chat_template, encoding="utf-8")


@torch.no_grad()
def _add_signals(llm: LanguageModel) -> None:
    from transformers import AddedToken

    tokenizer: Any = llm.tokenizer
    model = llm.model
    start = len(tokenizer)
    names = signal_names(llm)
    tokens = [AddedToken(name, special=True, normalized=False) for name in names]
    added = tokenizer.add_tokens(tokens, special_tokens=True)
    if added != len(names) or len(tokenizer) != start + added:
        raise ConfigError(f"the tokenizer already has tokens like {names[0]}: export refused")
    if start > llm.tokens.vocab_size:
        raise ConfigError(
            f"the tokenizer has {start} tokens but the embedding {llm.tokens.vocab_size} rows: "
            "there is no place for signal tokens between them"
        )
    embedding = llm.embedding
    rows = llm.signal_embeddings / llm.embedding_multiplier
    table = _extended(embedding.weight, rows, start)
    head: Any = model.get_output_embeddings()
    mean = head.weight[:start].float().mean(0)
    new_rows = mean.repeat(len(names), 1)
    new_bias = None if head.bias is None else head.bias[:start].float().mean().repeat(len(names))
    for key in llm.tokens.outputs:
        place = llm.tokens.signal_rows(key).start
        new_rows[place] = llm.signal_head[llm.tokens.outputs.index(key)]
        if new_bias is not None:
            new_bias[place] = 0.0
    head_table = _extended(head.weight, new_rows, start)
    bias: Any = head.bias
    if new_bias is not None:
        bias = _extended(bias, new_bias, start)

    model.config.tie_word_embeddings = False
    model.config.get_text_config().tie_word_embeddings = False
    model.config.get_text_config().vocab_size = len(table)
    untied = nn.Linear(head_table.shape[1], len(head_table), bias=bias is not None, device="meta")
    untied.weight = nn.Parameter(head_table, requires_grad=False)
    if bias is not None:
        untied.bias = nn.Parameter(bias, requires_grad=False)
    model.set_output_embeddings(untied)
    embedding.weight = nn.Parameter(table, requires_grad=False)
    embedding.num_embeddings = len(table)


def _extended(table: Tensor, rows: Tensor, start: int) -> Tensor:
    """A copy of the table in which `rows` stand from `start` on; as long as it needs to be."""
    length = max(len(table), start + len(rows))
    longer = table.new_zeros(length, *table.shape[1:])
    longer[: len(table)] = table
    longer[start : start + len(rows)] = rows.to(table)
    return longer
