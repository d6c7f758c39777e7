"""Tiny random language models of several families, each with a tokenizer of its family's kind and
the chat template that its instruction models come with (tool calls left out)."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.parts import SENTENCES

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}
WINDOW = 8
"""Positions of sliding-window attention: shorter than every conversation of the tests."""
SLIDING = {"sliding_window": WINDOW}

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token}}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}"
    "{% endfor %}"
)
QWEN3 = (
    "{% set ns = namespace(last=0) %}{% for message in messages %}"
    "{% if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for message in messages %}{% set content = message.content %}"
    "{% if message.role == 'assistant' and loop.index0 > ns.last and loop.last %}"
    "{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' + content.lstrip('\n') }}{% else %}"
    "{{ '<|im_start|>' + message.role + '\n' + content }}{% endif %}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{% set first = messages[0]['content'] + '\n\n' %}{% set turns = messages[1:] %}"
    "{% else %}{% set first = '' %}{% set turns = messages %}{% endif %}"
    "{% for message in turns %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + (first if loop.first else '') }}"
    "{{ message['content'] | trim }}{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """`config`: class of transformers and its own settings; `words`: the tokenizer's kind; `ends`:
    the token that ends a turn; `llm`: what a user writes into the config for it."""

    config: str
    options: dict[str, Any]
    words: Callable[[Path, str | None, str], Any]
    template: str | None
    end: str
    llm: dict[str, Any]


def byte_level(folder: Path, template: str | None, end: str) -> Any:
    """Llama 3, Qwen, SmolLM: a space is part of the word that it precedes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    marks += ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=380,
        special_tokens=marks,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(SENTENCES, trainer)
    bos = "<|begin_of_text|>" if end == "<|eot_id|>" else None
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token=bos,
        eos_token=end,
        pad_token="<|endoftext|>",
        chat_template=template,
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def sentencepiece(folder: Path, template: str | None, end: str) -> Any:
    """Llama 2, Vicuna, Mistral: every text begins with a space, and unknown bytes are tokens."""
    from transformers import LlamaTokenizer

    vocabulary, merges = _metaspace(["<unk>", "<s>", "</s>"])
    tokenizer = LlamaTokenizer(vocab=vocabulary, merges=merges, chat_template=template)
    tokenizer.save_pretrained(folder)
    return tokenizer


def gemma_words(folder: Path, template: str | None, end: str) -> Any:
    """Gemma: like Llama's, without the space at the beginning."""
    from transformers import GemmaTokenizer

    marks = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>"]
    vocabulary, merges = _metaspace(marks)
    tokenizer = GemmaTokenizer(vocab=vocabulary, merges=merges, chat_template=template)
    tokenizer.add_special_tokens({"extra_special_tokens": marks[-2:]})
    tokenizer.save_pretrained(folder)
    return tokenizer


def _metaspace(marks: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=160, show_progress=False))
    trained = json.loads(raw.to_str())["model"]
    order = sorted(trained["vocab"], key=trained["vocab"].__getitem__)
    names = [*marks, *(f"<0x{byte:02X}>" for byte in range(256)), *order]
    return {name: index for index, name in enumerate(names)}, [tuple(m) for m in trained["merges"]]


FAMILIES = {
    "llama3": Family("LlamaConfig", {}, byte_level, LLAMA3, "<|eot_id|>", {}),
    "vicuna": Family("LlamaConfig", {}, sentencepiece, None, "</s>", {"chat_template": "vicuna"}),
    "mistral": Family("MistralConfig", SLIDING, sentencepiece, MISTRAL, "</s>", {}),
    "qwen3": Family(
        "Qwen3Config",
        {"head_dim": 16},
        byte_level,
        QWEN3,
        "<|im_end|>",
        {"template_options": {"enable_thinking": False}},
    ),
    "gemma3": Family(
        "Gemma3TextConfig",
        {
            **SLIDING,
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "layer_types": ["sliding_attention", "full_attention"],
            "final_logit_softcapping": 5.0,
        },
        gemma_words,
        GEMMA,
        "<end_of_turn>",
        {},
    ),
    "qwen3_moe": Family(
        "Qwen3MoeConfig",
        {
            "head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "mlp_only_layers": [1],
        },
        byte_level,
        CHATML,
        "<|im_end|>",
        {},
    ),
    "smollm": Family("LlamaConfig", {}, byte_level, CHATML, "<|im_end|>", {}),
    "granite": Family(
        "GraniteConfig",
        {"logits_scaling": 3.0, "embedding_multiplier": 2.0, "attention_multiplier": 0.2},
        byte_level,
        CHATML,
        "<|im_end|>",
        {},
    ),
}


def write(name: str, folder: Path, *, tied: bool, seed: int = 0, **sizes: float) -> Path:
    """A model of the family and its tokenizer, as a transformers folder. Its table has a few rows
    more than the tokenizer has tokens, as published ones have."""
    import transformers

    family = FAMILIES[name]
    tokenizer = family.words(folder, family.template, family.end)
    config = getattr(transformers, family.config)(
        **{**SIZES, **family.options, **sizes},
        vocab_size=len(tokenizer) + 5,
        tie_word_embeddings=tied,
        eos_token_id=tokenizer.convert_tokens_to_ids(family.end),
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder
