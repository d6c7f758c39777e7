"""Chat templates in jinja: the tokenizer's own, one by name, or a file."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from mmllm.errors import CheckpointError, ConfigError, quoted
from mmllm.utils import sandbox

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

TEMPLATES = {
    "plain": (
        "{{ bos_token or '' }}{% for message in messages %}"
        "{{ message['role'] }}: {{ message['content'] }}"
        "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    ),
    "vicuna": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}"
        "{% else %}A chat between a curious user and an artificial intelligence assistant. The "
        "assistant gives helpful, detailed, and polite answers to the user's questions.{% endif %}"
        "{% for message in messages %}{% if message['role'] == 'user' %} USER:"
        " {{ message['content'] }}{% elif message['role'] == 'assistant' %} ASSISTANT:"
        " {{ message['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
    ),
}
"""`plain`: for a base model. `vicuna`: v1.1 and v1.5, whose tokenizers come without a template
(FastChat, conversation.py, "vicuna_v1.1"; there a turn's end leaves no space before the next)."""


def chat_template(name: str | None, tokenizer: PreTrainedTokenizerBase) -> str:
    """Resolve `llm.chat_template` of a config to the text of a template.

    Args:
        name: A key of TEMPLATES, a .jinja file, or None for the tokenizer's own.
        tokenizer: One that has no template gets `plain`, with a warning.

    Raises:
        ConfigError: There is no template of this name, or the file cannot be read.
    """
    if name is None:
        own = tokenizer.chat_template
        if isinstance(own, dict):  # several, by name
            own = own.get("default")
        if own:
            return own
        logger.warning(
            "llm: the tokenizer brings no chat template: 'plain' is used; if the model was trained "
            "with another one, name it in llm.chat_template (%s, or a .jinja file)",
            ", ".join(TEMPLATES),
        )
        return TEMPLATES["plain"]
    if name in TEMPLATES:
        return TEMPLATES[name]
    file = Path(name).expanduser()
    if file.suffix != ".jinja":
        raise ConfigError(
            f"llm.chat_template: expected {', '.join(TEMPLATES)} or a .jinja file, got "
            f"{quoted(name)}"
        )
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"llm.chat_template: {name}: cannot be read: {error}") from error


def check_template(template: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Render one turn in the sandbox, to find a chat template that cannot be used.

    Args:
        template: the Jinja source.
        tokenizer: gives the special tokens.

    Raises:
        CheckpointError: it is no Jinja, or takes too much time or memory.
    """
    turn = {"role": "user", "content": "a"}
    variables = {**tokenizer.special_tokens_map, "messages": [turn], "add_generation_prompt": True}
    try:
        sandbox.render(template, variables)
    except sandbox.ResourcesExhausted as error:
        raise CheckpointError(f"llm: the chat template cannot be used: {error}") from error
    except sandbox.InputRejected as error:
        if error.syntax:
            raise CheckpointError(f"llm: the chat template is no jinja: {error}") from error
