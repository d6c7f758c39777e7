"""The renderer of a system without its weights, for checking data."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mmllm import model as models
from mmllm.config import SystemConfig
from mmllm.data.rendering import Renderer
from mmllm.llm.loading import local_tokenizer
from mmllm.llm.templates import chat_template


def renderer(system: SystemConfig) -> Renderer:
    """The renderer of a system, without its weights and from this machine alone: what a dataset's
    rows become, and how long they are. Raises AssetError, CheckpointError or ConfigError where the
    tokenizer or the configs of a part are not on this machine."""
    llm: Any = system.llm
    tokenizer, ends = local_tokenizer(llm.weights)
    model = models.build(replace(system, llm=replace(llm, chat_template="plain")), meta=True)
    model.llm.tokenizer = tokenizer
    rendering = Renderer(
        tokenizer,
        model.renderer.tokens,
        end_ids=model.llm.end_ids | ends,
        input_keys=model.renderer.input_keys,
        output_keys=model.renderer.output_keys,
        template=chat_template(llm.chat_template, tokenizer),
        template_options=llm.template_options,
        system_prompt=llm.system_prompt,
        rereads_media=system.rereads_media,
    )
    rendering.layouts = model.renderer.layouts
    return rendering
