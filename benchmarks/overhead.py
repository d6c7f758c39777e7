"""What does mmllm cost on top of the libraries that it calls?

    python benchmarks/overhead.py                # all bars but `large`: a few minutes on two cores
    python benchmarks/overhead.py sample         # one of them
    python benchmarks/overhead.py large          # load an LLM of a billion parameters

Needs `mmllm assets fetch`. `large` writes 2 GB to the folder for temporary files.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pairs
import torch
from pairs import Options, Row, timed

from mmllm import config
from mmllm.decoders.decoder import ModalityDecoder

STEPS = 4
"""Denoising steps of a sample."""
LARGE = {
    "vocab_size": 32_000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 20,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
}
"""A Llama of a billion parameters, written with random weights in bfloat16."""


def start(options: Options) -> Iterator[Row]:
    """`import mmllm` above an empty interpreter, and `mmllm --help`."""
    ours = "import mmllm, sys; assert not {'torch', 'transformers', 'diffusers'} & set(sys.modules)"
    timing = timed(lambda: python("-c", ours), lambda: python("-c", "pass"), options)
    extra = statistics.median(a - b for a, b in zip(timing.ours, timing.other, strict=True))
    yield Row("import mmllm, no torch", extra, 0.3, unit="s", detail=str(timing))
    shown = timed(lambda: python("-m", "mmllm", "--help"), lambda: python("-c", "pass"), options)
    yield Row("mmllm --help", statistics.median(shown.ours), 0.5, unit="s")


def sample(options: Options) -> Iterator[Row]:
    """`sample` of mini's decoders against their bare pipelines, from the same condition and
    seed: at most 1.02 of their time, or 5 ms more."""
    for modality in ("image", "video", "audio"):
        ours, other = _samplers(modality)
        timing = timed(ours, other, options)
        bar = max(1.02, 1 + 0.005 / statistics.median(timing.other))
        yield Row(f"sample, {modality}", timing.ratio, bar, detail=str(timing))


def _samplers(modality: str) -> tuple[pairs.Work, pairs.Work]:
    entry = {"type": "pixart", "weights": f"mini:decoders/{modality}", "max_caption_tokens": 24}
    if modality == "video":
        entry |= {"type": "wan", "frames": 9, "height": 64, "width": 64}
    if modality == "audio":
        entry |= {"type": "stable_audio"}
    decoder: ModalityDecoder = config.build(
        config.parse_component("decoders", {**entry, "steps": STEPS}, modality)
    )
    condition = decoder.encode_captions(["a red apple"])
    bare: Any = decoder.pipeline
    call = {
        **decoder.condition_kwargs(condition),
        **decoder.guidance_kwargs(decoder.config.guidance, lambda: decoder.unconditional(1)),
        **decoder.pipeline_kwargs(),
        "num_inference_steps": STEPS,
        "output_type": "np",
    }

    def seeded() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(0)]

    def ours() -> None:
        decoder.sample(condition, generators=seeded())

    def other() -> None:
        bare(**call, generator=seeded())

    return ours, other


def load(options: Options) -> Iterator[Row]:
    """mini's language model against tokenizer and model by `from_pretrained`, in the same dtype."""
    yield _loading("mini:smollm2-135m-instruct", options)


def large(options: Options) -> Iterator[Row]:
    """The same of a random language model of a billion parameters, with mini's tokenizer."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from mmllm.weights import locate

    with tempfile.TemporaryDirectory() as folder:
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = LlamaForCausalLM(LlamaConfig(**LARGE))
        finally:
            torch.set_default_dtype(before)
        path = Path(folder) / f"{model.num_parameters() / 1e9:.1f}b-random"
        model.save_pretrained(path)
        mini = locate("mini:smollm2-135m-instruct", "llm.weights")
        AutoTokenizer.from_pretrained(mini).save_pretrained(path)
        del model
        yield _loading(str(path), options)


def _loading(weights: str, options: Options) -> Row:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from mmllm.llm.loading import CausalLMConfig, build
    from mmllm.weights import locate

    folder = locate(weights, "llm.weights")

    def other() -> None:
        AutoTokenizer.from_pretrained(folder)
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, use_safetensors=True)

    def ours() -> None:
        build(CausalLMConfig(weights=weights), dtype=torch.bfloat16)

    timing = timed(ours, other, options)
    return Row(f"load {Path(weights).name}", timing.ratio, 1.05, detail=str(timing))


def python(*arguments: str) -> None:
    """Run a new Python interpreter."""
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    bars = {"start": start, "sample": sample, "load": load, "large": large}
    sys.exit(pairs.main(__doc__, bars, only_by_name={"large"}))
