"""Loading a language model: a folder, a .gguf file, a hub id or an asset of `mini`, whole,
quantised, spread over devices, or without its weights.

Code that lies with weights is never run, and pickles are never read.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from mmllm.errors import CheckpointError, ConfigError, brief_reason, quoted, wrap_errors
from mmllm.kernels.precision import parse_dtype
from mmllm.llm.adapters import LoraOptions
from mmllm.llm.auto_classes import auto_class, language_config
from mmllm.llm.folder_checks import check_contents, check_file_names
from mmllm.llm.language_model import LanguageModel
from mmllm.llm.logit_check import check_logit_transform
from mmllm.llm.memory import MemoryOptions, check_memory
from mmllm.llm.templates import check_template
from mmllm.utils import sandbox
from mmllm.utils.extras import import_extra
from mmllm.utils.imports import deferred_imports
from mmllm.weights import are_weights_skipped, locate, remote_code_disabled

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class CausalLMConfig:
    """Settings of the language model.

    Attributes:
        weights: a folder, a .gguf file, a hub id ("owner/name", or "owner/name/file.gguf"), or
            `mini:...` for an asset that is fetched by package name.
        lora: the adapters; null: none.
        system_prompt: the system message of every conversation that has none of its own.
        chat_template: plain, vicuna or a .jinja file; null is the tokenizer's own.
        template_options: variables of the template, for example {enable_thinking: false} for Qwen3.
        attention: the attention implementation of transformers.
        max_length: the context in tokens that is used (the model's own limit still holds).
        dtype: the dtype of the frozen weights; null: what the stage or the caller chooses.
        quantization: the frozen linear layers in 4 bits (NF4 with its constants quantised too, as
            in QLoRA, Dettmers et al. 2023) or 8 bits, by bitsandbytes.
        memory: conversations beyond the model's own context, of which every step reads the parts
            that fit best (mmllm.llm.memory); null: every step reads all.
        device_map: "auto", or module -> device: the model spread over devices, by accelerate.
    """

    weights: str
    lora: LoraOptions | None = field(default_factory=LoraOptions)
    system_prompt: str = ""
    chat_template: str | None = None
    template_options: Mapping[str, Any] = field(default_factory=dict)
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    max_length: int = 2048
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    quantization: Literal["4bit", "8bit"] | None = None
    device_map: Mapping[str, int | str] | str | None = None
    memory: MemoryOptions | None = None


def build(
    config: CausalLMConfig, *, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> LanguageModel:
    """Load tokenizer and model.

    Args:
        config: What to load, and how. Its `dtype`, if set, wins.
        dtype: Of the frozen weights.
        device: Where the model goes, unless the config spreads it over devices.

    Returns:
        The language model, frozen, without adapters or signal tokens. Within
        `mmllm.weights.skip_weights()` it is on the meta device.

    Raises:
        CheckpointError: The weights are incomplete, unreadable, or of an unknown family.
        ConfigError: An option does not fit the weights or what is installed.
    """
    dtype = parse_dtype(config.dtype) if config.dtype else dtype
    where = f"llm.weights {quoted(config.weights)} cannot be loaded"
    with wrap_errors(CheckpointError, where), remote_code_disabled():
        source = _source(config.weights)
        if are_weights_skipped():
            return _build_on_meta(config, source, dtype)
        return _build(config, source, dtype, device)


def local_tokenizer(weights: str) -> tuple[PreTrainedTokenizerBase, frozenset[int]]:
    """The tokenizer of a language model, and the ids that its generation config ends a turn with:
    without the weights, and from this machine alone. Raises CheckpointError."""
    from transformers import AutoTokenizer, GenerationConfig

    source = {**_source(weights), "local_files_only": True}
    with wrap_errors(CheckpointError, f"llm.weights {quoted(weights)}: no tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(**source)
    folder = source["pretrained_model_name_or_path"]
    try:
        ends = GenerationConfig.from_pretrained(folder, local_files_only=True).eos_token_id
    except (OSError, ValueError):  # it need not have one
        ends = None
    return tokenizer, frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])


def _build(
    config: CausalLMConfig, source: dict[str, Any], dtype: torch.dtype, device: str
) -> LanguageModel:
    sandbox.start()  # for the chat template, meanwhile
    with deferred_imports("scipy.optimize"):  # for losses of object detection
        importlib.import_module("transformers.modeling_utils")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    is_gguf = "gguf_file" in source
    options: dict[str, Any] = {
        "dtype": dtype,
        "attn_implementation": config.attention,
        **_quantization(config, dtype, is_gguf=is_gguf),
    }
    if config.device_map is not None:
        mapping = config.device_map
        options["device_map"] = mapping if isinstance(mapping, str) else dict(mapping)
    elif config.quantization:
        options["device_map"] = {"": device}  # quantised where it will be used
    model_class: Any = AutoModelForCausalLM
    folder = Path(source["pretrained_model_name_or_path"])
    names = [] if is_gguf else check_file_names(config.weights, folder)
    try:
        if not is_gguf:
            options["use_safetensors"] = True
            if names:  # before the config is read: its numbers may be anything
                check_contents(folder, names, lambda: _describe(source))
            options["config"], model_class = _open_config(source)
        tokenizer = AutoTokenizer.from_pretrained(**source)
        model, report = model_class.from_pretrained(**source, **options, output_loading_info=True)
    except (OSError, ValueError, ImportError) as error:
        raise CheckpointError(
            f"llm.weights {quoted(config.weights)} cannot be loaded: {_explain(error)}"
        ) from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise CheckpointError(
            f"llm.weights {quoted(config.weights)} lacks {len(missing)} weights, first "
            f"{missing[0]!r}; was it saved completely?"
        )
    if is_gguf:
        _forget_gguf(model)
    if "device_map" not in options:
        model = model.to(device)
    llm = LanguageModel(config, model, tokenizer)
    if config.memory is not None:
        check_memory(llm.base_model, config.attention)
    check_logit_transform(llm.base_model, llm.logit_transform)
    check_template(llm.chat_template, tokenizer)
    return llm


def _build_on_meta(
    config: CausalLMConfig, source: dict[str, Any], dtype: torch.dtype
) -> LanguageModel:
    """The model on the meta device, with an empty tokenizer: nothing will be rendered, so it has no
    template of its own either."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    try:
        model = _describe(source, dtype=dtype, attention=config.attention)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"llm.weights {quoted(config.weights)}: no usable config.json: {_explain(error)}"
        ) from error
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    return LanguageModel(replace(config, chat_template="plain"), model, tokenizer)


def _open_config(source: dict[str, Any]) -> tuple[Any, Any]:
    """The config of the model that is loaded, and the Auto class that loads it. Raises
    CheckpointError."""
    from transformers import AutoConfig

    config = language_config(AutoConfig.from_pretrained(**source))
    return config, auto_class(config)


def _describe(source: dict[str, Any], *, dtype: Any = None, attention: str = "eager") -> Any:
    """The model without its weights, on the meta device. Raises CheckpointError."""
    config, model_class = _open_config(source)
    with torch.device("meta"):
        return model_class.from_config(
            config, dtype=dtype, attn_implementation=attention, trust_remote_code=False
        )


def _source(weights: str) -> dict[str, Any]:
    """Return the keyword arguments by which `from_pretrained` opens the weights; code in their
    repository is never run."""
    source: dict[str, Any] = {"trust_remote_code": False}
    if not weights.endswith(".gguf"):
        return {**source, "pretrained_model_name_or_path": locate(weights, "llm.weights")}
    folder, _, file = weights.rpartition("/")
    path = Path(weights).expanduser()
    if path.is_file():
        folder, file = str(path.parent), path.name
    else:
        folder = locate(folder, "llm.weights")
    return {**source, "pretrained_model_name_or_path": folder, "gguf_file": file}


def _quantization(config: CausalLMConfig, dtype: torch.dtype, *, is_gguf: bool) -> dict[str, Any]:
    """The keyword argument of `from_pretrained` for weights that are quantised, if any."""
    if is_gguf:
        from transformers import GgufConfig

        if config.quantization:
            raise ConfigError(
                f"llm.quantization: {config.quantization} cannot be made of a .gguf file, whose "
                "weights are quantised already; give the model's safetensors, or leave it out"
            )
        return {"quantization_config": GgufConfig(dequantize=True)}
    if config.quantization is None:
        return {}
    needed_by = f"llm.quantization: {config.quantization}"
    import_extra("bitsandbytes", extra="quantization", needed_by=needed_by)
    from transformers import BitsAndBytesConfig

    four_bits = config.quantization == "4bit"
    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=four_bits,
            load_in_8bit=not four_bits,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    }


def _forget_gguf(model: Any) -> None:
    """Let a model whose weights were dequantised be saved; transformers refuses one that says that
    it is quantised."""
    model.hf_quantizer = None
    model.is_quantized = False
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, name):
            delattr(model.config, name)


def _explain(error: Exception) -> str:
    """The message of transformers' error; for one about a hub its first line, and the remedy."""
    message = str(error)
    if "trust_remote_code" in message:
        return (
            "it brings code of its own, which is never run here; only families that transformers "
            "itself implements can be loaded"
        )
    if "huggingface.co" not in message and "gated" not in message:
        return message if len(message) < 1000 else brief_reason(error)
    return (
        f"{message.splitlines()[0]}; give a folder, correct the id, log in with `hf auth login` if "
        "it is gated, or, where it has no safetensors, download its pickle into a folder and give "
        "that, to see the command that converts it"
    )
