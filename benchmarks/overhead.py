"""What does mmllm cost on top of the libraries that it calls?

    python benchmarks/overhead.py                    # a few minutes on two cores
    python benchmarks/overhead.py --large            # and an LLM of a billion parameters
    python benchmarks/overhead.py --json out.json

Each line is the median over pairs that are taken in turn, ours and theirs, in one run: so what else
the machine does falls on both. Exits with 1 when a bar is missed.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mmllm import config, console
from mmllm.decoders.decoder import ModalityDecoder

PAIRS = 15
LARGE = {
    "vocab_size": 32_000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 20,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
}
"""A Llama of a billion parameters, written with random weights in bfloat16."""


@dataclass(frozen=True)
class Line:
    """One measurement in seconds: ours, what it is compared with, and whether the bar is met."""

    name: str
    ours: float
    theirs: float | None
    bar: str
    met: bool


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--steps", type=int, default=4, help="denoising steps of a sample")
    parser.add_argument("--large", action="store_true", help="load a large random LLM too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table there too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = [start(options.pairs), help_page(options.pairs)]
    for modality in ("image", "video", "audio"):
        lines.append(sample(modality, options.steps, options.pairs))
    lines.append(load("mini:smollm2-135m-instruct", options.pairs))
    if options.large:
        with tempfile.TemporaryDirectory() as folder:
            lines.append(load(write_large(Path(folder)), options.pairs))
    console.echo(table(lines))
    if options.json:
        options.json.write_text(json.dumps([asdict(line) for line in lines], indent=2) + "\n")
    return 0 if all(line.met for line in lines) else 1


def start(num: int) -> Line:
    """`import mmllm` above an empty interpreter."""
    ours = "import mmllm, sys; assert not {'torch', 'transformers', 'diffusers'} & set(sys.modules)"
    mine, bare = pairs(lambda: python("-c", ours), lambda: python("-c", "pass"), num)
    return Line("import mmllm, no torch", mine - bare, None, "< 0.3 s", mine - bare < 0.3)


def help_page(num: int) -> Line:
    seconds = statistics.median(taken(lambda: python("-m", "mmllm", "--help")) for _ in range(num))
    return Line("mmllm --help", seconds, None, "< 0.5 s", seconds < 0.5)


def sample(modality: str, steps: int, num: int) -> Line:
    """`sample` of mini's decoder against its bare pipeline, from the same condition and seed."""
    entry = {"type": "pixart", "weights": f"mini:decoders/{modality}", "max_caption_tokens": 24}
    if modality == "video":
        entry |= {"type": "wan", "frames": 9, "height": 64, "width": 64}
    if modality == "audio":
        entry |= {"type": "stable_audio"}
    decoder: ModalityDecoder = config.build(
        config.parse_component("decoders", {**entry, "steps": steps}, modality)
    )
    condition = decoder.encode_captions(["a red apple"])
    bare = decoder.pipeline
    call = {
        **decoder.condition_kwargs(condition),
        **decoder.guidance_kwargs(decoder.config.guidance, lambda: decoder.unconditional(1)),
        **decoder.pipeline_kwargs(),
        "num_inference_steps": steps,
        "output_type": "np",
    }

    def seeded() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(0)]

    def ours() -> Any:
        return decoder.sample(condition, generators=seeded())

    def theirs() -> Any:
        return bare(**call, generator=seeded())

    mine, other = pairs(ours, theirs, num)
    met = mine <= max(1.02 * other, other + 0.005)
    return Line(f"sample, {modality}, {steps} steps", mine, other, "<= 1.02 or + 5 ms", met)


def load(weights: str, num: int) -> Line:
    """Our LLM against tokenizer and model by `from_pretrained`, in the same dtype."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from mmllm.llm.loading import CausalLMConfig, build
    from mmllm.weights import locate

    folder = locate(weights, "llm.weights")

    def theirs() -> Any:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, use_safetensors=True
        )
        return tokenizer, model

    def ours() -> Any:
        return build(CausalLMConfig(weights=weights), dtype=torch.bfloat16)

    mine, other = pairs(ours, theirs, num)
    return Line(f"load {Path(weights).name}", mine, other, "<= 1.05", mine <= 1.05 * other)


def write_large(folder: Path) -> str:
    """A random LLM on disk, with mini's tokenizer."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from mmllm.weights import locate

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = LlamaForCausalLM(LlamaConfig(**LARGE))
    finally:
        torch.set_default_dtype(before)
    path = folder / f"{model.num_parameters() / 1e9:.1f}b-random"
    model.save_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(locate("mini:smollm2-135m-instruct", "llm.weights"))
    tokenizer.save_pretrained(path)
    return str(path)


def pairs(
    ours: Callable[[], Any], theirs: Callable[[], Any], num: int, warm: int = 1
) -> tuple[float, float]:
    """Medians in seconds of two ways that take turns, each first as often as second."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(-warm, num):
        for which in (0, 1) if turn % 2 else (1, 0):
            took = taken((ours, theirs)[which])
            if turn >= 0:
                seconds[which].append(took)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def taken(work: Callable[[], Any]) -> float:
    """Seconds of one call; what it leaves is thrown away afterwards."""
    gc.collect()
    began = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - began
    del result
    return seconds


def python(*arguments: str) -> None:
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)


def table(lines: list[Line]) -> str:
    rows = [f"{'':32} {'mmllm':>9} {'bare':>9} {'ratio':>6}  bar"]
    for line in lines:
        bare = f"{line.theirs:8.3f}s {line.ours / line.theirs:6.3f}" if line.theirs else " " * 16
        verdict = "met" if line.met else "NOT met"
        rows.append(f"{line.name:32} {line.ours:8.3f}s {bare}  {line.bar}: {verdict}")
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
