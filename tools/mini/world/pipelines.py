"""Writes what was trained on mini's world as pipelines of diffusers.

Captions are read by the first layers of the language model (mmllm.mini.caption_encoder), whose
weights are no part of a pipeline's folder.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler

from mmllm.mini.caption_encoder import CaptionEncoder, CaptionTokenizer
from tools.mini.world.text import LAYERS, MAX_TOKENS, SINK, CaptionStates, base_model

WEIGHTS = "mini:smollm2-135m-instruct"


def scheduler(shift: float = 3.0) -> DPMSolverMultistepScheduler:
    """DPM-Solver++ on the flow path, for a denoiser that predicts the clean sample."""
    return DPMSolverMultistepScheduler(
        prediction_type="sample", use_flow_sigmas=True, flow_shift=shift, final_sigmas_type="zero"
    )


def text_parts(statistics: CaptionStates) -> dict[str, Any]:
    """The tokenizer and the text encoder of a pipeline.

    Args:
        statistics: mean and deviation of the states of captions.
    """
    tokenizer = CaptionTokenizer.of(WEIGHTS, MAX_TOKENS)
    embeddings = base_model().get_input_embeddings().weight
    sink: Any = tokenizer.convert_tokens_to_ids(SINK)
    encoder: Any = CaptionEncoder(
        weights=WEIGHTS,
        layers=LAYERS,
        sink=sink,
        width=len(statistics.mean),
    )
    encoder.mean.copy_(statistics.mean)
    encoder.std.copy_(statistics.std)
    encoder.sink_row.copy_(embeddings[encoder.config.sink].detach())
    return {"tokenizer": tokenizer, "text_encoder": encoder}


def ship(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Write a pipeline, its networks in float16, readable by all who may read the folder."""
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module) and name != "text_encoder":
            part.half()
    pipeline.save_pretrained(folder)
    for file in folder.rglob("*.json"):
        content = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(content, dict) and content.pop("_name_or_path", None):
            file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for file in folder.rglob("*.safetensors"):
        file.chmod(0o644)
