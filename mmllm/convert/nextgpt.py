"""`mmllm convert nextgpt DIR`: the checkpoints that NExT-GPT publishes -> a checkpoint of mmllm.

Two layouts (Wu et al. 2023; `code/` and `nextgpt/` of its repository):

    7b_tiva_v0   pytorch_model.pt, config.json, the tokenizer's files
    later        non_lora_trainables.bin, adapter_model.*, adapter_config.json, config.json;
                 of its first stages mm_input_projector.bin, mm_output_projector.bin

The output projections, LoRA, the rows of the signal tokens and linear or MLP input projections are
converted; all else is listed with the reason.

Legend: D LLM width, R signal tokens, O outputs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmllm import checkpoints
from mmllm import config as configs
from mmllm.config import SystemConfig
from mmllm.convert import projections
from mmllm.convert.lora import LORA_ALPHA, lora_tensors
from mmllm.convert.projections import INPUTS, OUTPUTS, Renamed
from mmllm.convert.reading import FILES, NextGPTCheckpoint, read
from mmllm.errors import CheckpointError, ConfigError

DECODERS: dict[str, tuple[str, str]] = {
    "image": ("stable_diffusion", "runwayml/stable-diffusion-v1-5"),
    "video": ("text_to_video", "cerspense/zeroscope_v2_576w"),
    "audio": ("audioldm", "cvssp/audioldm-l-full"),
}
"""The first layout's decoders (its config/base.yaml); the later one's config.json names its own."""

_TABLE, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass
class Conversion:
    """The fate of each tensor.

    Attributes:
        folder: The new checkpoint.
        taken: NExT-GPT's name -> mmllm's.
        left: NExT-GPT's name -> why it was left.
        notes: On the whole.
    """

    folder: Path
    taken: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def convert(
    source: Path, out: Path, *, system: Path | None = None, llm: str | None = None
) -> Conversion:
    """Convert a checkpoint of NExT-GPT.

    Args:
        source: Its folder.
        out: The new folder of the converted checkpoint.
        system: A YAML whose llm, encoders and decoders are used, under the keys image, audio and
            video. Without it the decoders are those that NExT-GPT names, and there are no encoders,
            for NExT-GPT has ImageBind.
        llm: The language model that it was trained on, where neither file says it.

    Raises:
        CheckpointError: A file is missing, holds more than tensors, or has other shapes than
            NExT-GPT's code gives; or `out` exists.
        ConfigError: The system does not fit the checkpoint.
    """
    theirs = read(source)
    result = Conversion(out)
    remaining = dict.fromkeys(theirs.tensors)  # names that have not been converted
    tree = _system(theirs, system, llm)
    signal_ids = theirs.signal_ids()
    outputs = _convert_outputs(theirs, tree, signal_ids, result, system)
    rows = _signal_rows(theirs, signal_ids, list(tree["decoders"]), result)
    adapters = lora_tensors(theirs)
    tree["llm"]["lora"] = adapters.options() if adapters.tensors else None
    if adapters.tensors and not theirs.adapter_config:
        result.notes.append(f"LoRA: no file tells its alpha; {LORA_ALPHA:g} is the paper's")
    result.taken |= {name: f"adapter/{renamed}" for name, renamed in adapters.names.items()}
    inputs = _convert_inputs(theirs, tree, result)
    for name in (_TABLE, _HEAD, *result.taken, *result.left):
        remaining.pop(name, None)
    result.left |= {name: _reason(name) for name in remaining}
    _add_notes(theirs, result)

    def write_more(draft: Path) -> None:
        if adapters.tensors:
            adapters.save(draft / "adapter", tree["llm"]["weights"])
        report = {"taken": result.taken, "left": result.left, "notes": result.notes}
        (draft / "conversion.json").write_text(json.dumps(report, indent=1), encoding="utf-8")

    tensors = {
        "input_projections.safetensors": inputs,
        "output_projections.safetensors": outputs,
        "rows.safetensors": rows,
    }
    checkpoints.assemble(out, configs.parse_system(tree), tensors, write_more)
    return result


def summary(result: Conversion) -> Iterator[str]:
    """Summarise the fate of the tensors, one line for those of a module with the same fate."""
    for fate, entries in (("taken", result.taken), ("left", result.left)):
        groups: dict[tuple[str, str], int] = {}
        for name, other in entries.items():
            part = re.sub(r"\.(\d+)(?=\.)", ".*", name)
            key = (_module(part), _module(other) if fate == "taken" else other)
            groups[key] = groups.get(key, 0) + 1
        for (name, other), count in groups.items():
            tensors = f" ({count} tensors)" if count > 1 else ""
            yield f"{fate:6} {name}{tensors} {'->' if fate == 'taken' else '-'} {other}"
    for note in result.notes:
        yield f"note   {note}"
    yield (
        f"{result.folder}: {len(result.taken)} taken, {len(result.left)} left; conversion.json has "
        "all"
    )


def _module(name: str) -> str:
    """The first names of a parameter: of `mm_output_img_projector.tfm.…` the projector."""
    head = name.split(" ")[0].split(".")
    return name if " " in name or len(head) < 3 else ".".join(head[:2]) + ".…"


def _system(theirs: NextGPTCheckpoint, path: Path | None, llm: str | None) -> dict[str, Any]:
    """Return the frozen parts as the plain data of a system's config."""
    if path is not None:
        tree = configs.read_yaml(path)
        tree = dict(tree.get("system", tree))
        if llm:
            tree["llm"] = {**tree["llm"], "weights": llm}
        tree["llm"] = configs.dump(configs.parse_system(tree).llm)
        return tree
    weights = llm or theirs.adapter_config.get("base_model_name_or_path")
    if not weights:
        raise ConfigError(
            f"{theirs.folder}: the files do not say which language model it was trained on: give "
            "--llm (a folder or hub id of that Vicuna), or --system"
        )
    decoders = {
        key: {"type": kind, "weights": theirs.config.get(f"{key}_decoder") or usual}
        for key, (kind, usual) in DECODERS.items()
    }
    return {
        "name": f"nextgpt-{theirs.folder.resolve().name}",
        "llm": {"weights": weights},
        "decoders": decoders,
    }


def _convert_outputs(
    theirs: NextGPTCheckpoint,
    tree: dict[str, Any],
    signal_ids: dict[str, list[int]],
    result: Conversion,
    system: Path | None,
) -> dict[str, Tensor]:
    """The output projections' parameters; the tree keeps the decoders that have one, and gets the
    projections' configs."""
    tensors = {key: projections.find_output(theirs, key) for key in OUTPUTS}
    present = [key for key in OUTPUTS if tensors[key]]
    if not present:
        raise CheckpointError(
            f"{theirs.folder}: no output projection ({OUTPUTS['image'][0]}… or "
            f"{OUTPUTS['image'][1]}… and so on); expected NExT-GPT's checkpoint of its second or "
            "third stage"
        )
    for key in tree["decoders"].keys() - set(present):
        result.notes.append(f"decoder {key}: left out, the checkpoint has no projection to it")
    tree["decoders"] = {key: entry for key, entry in tree["decoders"].items() if key in present}
    if missing := set(present) - tree["decoders"].keys():
        raise ConfigError(
            f"{system}: the checkpoint makes {', '.join(present)}; system.decoders has no key "
            f"{sorted(missing)[0]!r}"
        )
    parameters: dict[str, Tensor] = {}
    tree["output_projections"] = {}
    for key in tree["decoders"]:
        entry, converted = projections.convert_output(key, tensors[key], len(signal_ids[key]))
        tree["output_projections"][key] = entry
        for name, (whole_name, value) in converted.items():
            parameters[name] = value
            result.taken[whole_name] = f"output_projections.{name}"
    return parameters


def _signal_rows(
    theirs: NextGPTCheckpoint,
    signal_ids: dict[str, list[int]],
    keys: list[str],
    result: Conversion,
) -> dict[str, Tensor]:
    """Signal embeddings float[R, D] and head float[O, D], in the order of the decoders' keys, by
    their names in a checkpoint's file."""
    tensors = theirs.tensors
    for name in (_TABLE, _HEAD):
        if name not in tensors:
            raise CheckpointError(
                f"{theirs.folder}: no {name}: the rows of the signal tokens are not there; they "
                f"stand in {FILES[0]}, {FILES[1]} or {FILES[4]}"
            )
        last = max(token for ids in signal_ids.values() for token in ids)
        if last >= len(tensors[name]):
            raise CheckpointError(
                f"{theirs.folder}: {name} has {len(tensors[name])} rows, but the last signal token "
                f"is number {last}; do the tokenizer's files belong to these weights?"
            )
    first = min(token for ids in signal_ids.values() for token in ids)
    selected = [token for key in keys for token in signal_ids[key]]
    result.taken[f"{_TABLE} ({len(selected)} rows)"] = "llm.signal_embeddings"
    result.taken[f"{_HEAD} ({len(keys)} rows)"] = "llm.signal_head"
    result.left[f"{_TABLE} (rows before {first})"] = (
        "NExT-GPT trains the whole table; here the LLM keeps its own, so replies differ as far as "
        "it had moved"
    )
    result.left[f"{_HEAD} (all other rows)"] = (
        "the same; and of a signal span only the first token is predicted, it completes by itself"
    )
    return {
        "rows": tensors[_TABLE][selected].float(),
        "head_rows": tensors[_HEAD][[signal_ids[key][0] for key in keys]].float(),
    }


def _convert_inputs(
    theirs: NextGPTCheckpoint, tree: dict[str, Any], result: Conversion
) -> dict[str, Tensor]:
    """The input projections' parameters; the tree gets their configs.

    NExT-GPT has one input projection, for ImageBind: every encoder of the system gets a copy. Where
    its kind is unknown here each encoder gets a fresh one, which a first stage must train.
    """
    tensors: Renamed = projections.find_input(theirs)
    encoders = tree.get("encoders") or {}
    if not encoders:
        tree["encoders"], tree["input_projections"] = {}, {}
        reason = "no encoder: NExT-GPT reads through ImageBind; name yours with --system"
        result.left |= {whole_name: reason for whole_name, _ in tensors.values()}
        return {}
    converted = projections.convert_input(tensors)
    if converted is None:
        return _fresh_inputs(theirs, tree, result)
    entry, names = converted
    tree["input_projections"] = dict.fromkeys(encoders, entry)
    parameters: dict[str, Tensor] = {}
    for name, (whole_name, value) in tensors.items():
        result.taken[whole_name] = f"input_projections.*.{names[name]}"
        parameters |= {f"{key}.{names[name]}": value.float() for key in encoders}
    return parameters


def _fresh_inputs(
    theirs: NextGPTCheckpoint, tree: dict[str, Any], result: Conversion
) -> dict[str, Tensor]:
    """The input projections that the system names, initialised as for a first stage."""
    table = theirs.tensors[_TABLE]
    scale = table.float().square().mean().sqrt().item()
    system: SystemConfig = configs.parse_system(tree)
    parameters: dict[str, Tensor] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for key, entry in system.encoders.items():
            projection = configs.build(
                system.input_projections[key],
                feature_shape=configs.build(entry).feature_shape,
                width=table.shape[1],
                scale=scale,
            )
            parameters |= {f"{key}.{name}": value for name, value in projection.named_parameters()}
    result.notes.append(
        "input projections: fresh, as the system names them; train the first stage before the "
        "model is shown anything"
    )
    return {name: value.detach() for name, value in parameters.items()}


def _add_notes(theirs: NextGPTCheckpoint, result: Conversion) -> None:
    """Notes on the whole checkpoint."""
    if theirs.duplicates:
        result.notes.append(f"in several files, the first counts: {', '.join(theirs.duplicates)}")
    result.notes.append(
        "prompts: NExT-GPT wrote '### Human: <Img>…</Img>', here the LLM's chat template is used"
    )
    if theirs.is_later_layout:
        result.notes.append(
            "signal spans: its training put a space between any two signal tokens and projected "
            "the states of both; here a span is the signal tokens alone. Train the second stage "
            "again before you rely on what it draws"
        )


def _reason(name: str) -> str:
    """Return the reason why a tensor is not converted."""
    if name.startswith(INPUTS):
        return (
            "its grouping projection (GroupViT, three stages) is another network than `grouping` "
            "here; NExT-GPT has one for all encoders"
        )
    if name.startswith(("gen_text_hidden_fcs", "mm_output_")):
        return "not of a transformer projection from the last layer"
    if "lora_" in name:
        return "LoRA of something else than a layer of the language model"
    if name.startswith(("visual_encoder", "multimodal_tower")):
        return "ImageBind's own weights; frozen"
    return "unknown to NExT-GPT's published code"
