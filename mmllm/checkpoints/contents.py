"""What a checkpoint holds of a model: the parameters by file, and fingerprints of the frozen parts
that they were trained with."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmllm.checkpoints.manifest import Checkpoint
from mmllm.model import PROJECTIONS, AnyToAny
from mmllm.projections.base import saved_tensors
from mmllm.utils.hashing import sha256
from mmllm.weights import tensor_shapes


def saved_parameters(model: AnyToAny) -> dict[str, dict[str, Tensor]]:
    """File -> name -> parameter or persistent buffer, for all that is saved as plain safetensors.
    (Adapters are saved in peft's own format.)"""
    llm = model.llm
    loras: dict[str, dict[str, Tensor]] = {
        lora_file(key): dict(decoder.lora.named_weights())
        for key, decoder in model.decoders.items()
        if decoder.lora is not None
    }
    own: dict[str, dict[str, Tensor]] = {
        "input_projections.safetensors": saved_tensors(model.input_projections),
        "output_projections.safetensors": saved_tensors(model.output_projections),
        "rows.safetensors": {"rows": llm.signal_embeddings, "head_rows": llm.signal_head},
    }
    return loras | own


def lora_file(key: str) -> str:
    """The file in a checkpoint with the LoRA of a decoder, by the name that diffusers looks for.

    Args:
        key: the decoder's.
    """
    return f"decoders/{key}/pytorch_lora_weights.safetensors"


def saved_sizes(source: Checkpoint) -> dict[str, int]:
    """How many numbers a checkpoint holds of what its config describes, to make no more of them:
    by kind of projection, and "rows" for the signal embeddings."""
    files = {kind: source.folder / f"{kind}.safetensors" for kind in ("rows", *PROJECTIONS)}
    shapes = {kind: tensor_shapes(file) for kind, file in files.items()}
    shapes["rows"].pop("head_rows", None)
    return {kind: sum(map(math.prod, entry.values())) for kind, entry in shapes.items()}


def saved_names(source: Checkpoint) -> dict[str, int]:
    """How many names a checkpoint's input projections know (`CTCConfig.names`), by key, without
    those that know none."""
    shapes = tensor_shapes(source.folder / "input_projections.safetensors")
    ids = ".name_ids"
    return {name.removesuffix(ids): shapes[name][0] for name in shapes if name.endswith(ids)}


def fingerprints(model: AnyToAny) -> dict[str, str]:
    """Part -> what identifies it, for every frozen part, so that trained weights never meet another
    one silently."""
    parts = {"llm": _llm_fingerprint(model)}
    for key, encoder in model.encoders.items():
        parts[f"encoders.{key}"] = str(encoder.fingerprint)
    for key, decoder in model.decoders.items():
        parts[f"decoders.{key}"] = decoder.fingerprint
    return parts


def _llm_fingerprint(model: AnyToAny) -> str:
    """The shape of the embedding table and a hash of some of its rows, rounded to bfloat16 so that
    the dtype it was loaded in does not matter."""
    table = model.llm.embedding.weight.detach()
    rows = table[:: max(len(table) // 64, 1)].to("cpu", torch.bfloat16).float()
    digest = sha256(rows.numpy().tobytes())[:16]
    return f"{table.shape[0]}x{table.shape[1]}:{digest}"
