"""Export of a language model as a plain transformers folder: LoRA merged, and signal tokens added
to tokenizer, embedding and head where asked for.

Legend: V rows of the model's table, R signal tokens, O outputs, D width.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmllm.errors import ConfigError
from mmllm.llm.auto_classes import has_towers
from mmllm.llm.language_model import LanguageModel
from mmllm.weights import locate

_PROCESSOR_FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)


def merge_lora(llm: LanguageModel) -> None:
    """Add the adapters to the weights, W + (alpha / r) B A, and remove them: the same model, with
    one product less in every adapted layer.

    Raises:
        ConfigError: The weights are quantised, and would be rounded again.
    """
    if llm.is_quantized:
        raise ConfigError("LoRA is merged into whole weights: load with llm.quantization null")
    if llm.has_lora:
        llm.model = llm.model.merge_and_unload()


def signal_names(llm: LanguageModel) -> list[str]:
    """The signal tokens as a plain tokenizer spells them, in the order of their ids."""
    return [
        f"<|{key}_{number}|>"
        for key, count in llm.tokens.signal_tokens.items()
        for number in range(count)
    ]


def save_transformers(llm: LanguageModel, folder: Path, *, signals: bool = False) -> None:
    """Write a folder for `AutoModelForCausalLM.from_pretrained`. Merge adapters before.

    With signal tokens, embedding and head are no longer tied. A span's first token has the logit
    that it has here. Its other tokens are never predicted, which a plain head cannot say: their
    logit is the mean of all text tokens', which is never the largest.

    Args:
        llm: A language model without adapters. With `signals` it is changed.
        folder: Where.
        signals: Whether to add the signal tokens, behind the tokenizer's last token.

    Raises:
        ConfigError: The tokenizer has tokens of these names, or the table no place for them.
    """
    assert not llm.has_lora
    tokenizer, model = llm.tokenizer, llm.model
    if signals:
        _add_signals(llm)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if has_towers(model):
        _copy_processor(llm.config.weights, folder)
    if llm.chat_template != tokenizer.chat_template:  # one that the config names
        (folder / "chat_template.jinja").write_text(llm.chat_template, encoding="utf-8")


def _copy_processor(weights: str, folder: Path) -> None:
    """Copy what prepares media for the towers of a model."""
    from transformers.utils import cached_file

    source = locate(weights, "llm.weights")
    for name in _PROCESSOR_FILES:
        file = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
        if file is not None:
            shutil.copyfile(file, folder / name)


@torch.no_grad()
def _add_signals(llm: LanguageModel) -> None:
    """Add the signal tokens to tokenizer, embedding and head of the transformers model."""
    model = llm.model
    names = signal_names(llm)
    start = _add_to_tokenizer(llm, names)
    embedding = llm.embedding
    table = _with_rows(embedding.weight, llm.signal_embeddings / llm.embedding_multiplier, start)
    head: Any = model.get_output_embeddings()
    mean = head.weight[:start].float().mean(0)
    head_rows = mean.repeat(len(names), 1)
    bias_rows = None if head.bias is None else head.bias[:start].float().mean().repeat(len(names))
    for number, key in enumerate(llm.tokens.outputs):
        first = llm.tokens.signal_rows(key).start
        head_rows[first] = llm.signal_head[number]
        if bias_rows is not None:
            bias_rows[first] = 0.0
    head_table = _with_rows(head.weight, head_rows, start)
    bias: Any = head.bias
    if bias_rows is not None:
        bias = _with_rows(bias, bias_rows, start)

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


def _add_to_tokenizer(llm: LanguageModel, names: list[str]) -> int:
    """Add tokens of these names behind the last one; returns the id of the first. Raises
    ConfigError."""
    from transformers import AddedToken

    tokenizer: Any = llm.tokenizer
    start = len(tokenizer)
    tokens = [AddedToken(name, special=True, normalized=False) for name in names]
    added = tokenizer.add_tokens(tokens, special_tokens=True)
    if added != len(names) or len(tokenizer) != start + added:
        raise ConfigError(f"the tokenizer already has tokens like {names[0]}: export refused")
    if start > llm.tokens.vocab_size:
        raise ConfigError(
            f"the tokenizer has {start} tokens but the embedding {llm.tokens.vocab_size} rows: "
            "there is no place for signal tokens between them"
        )
    return start


def _with_rows(table: Tensor, rows: Tensor, start: int) -> Tensor:
    """A copy of a table float[V, ...] whose rows from `start` on are `rows`, longer if needed."""
    length = max(len(table), start + len(rows))
    longer = table.new_zeros(length, *table.shape[1:])
    longer[: len(table)] = table
    longer[start : start + len(rows)] = rows.to(table)
    return longer
