"""Checkpoints: a folder with the config, a manifest, and what trains as safetensors.

    config.yaml                       system and stage, as they were
    manifest.json                     step, versions, fingerprints of frozen parts, files' hashes
    input_projections.safetensors     output_projections.safetensors     rows.safetensors
    adapter/                          LoRA, in peft's own format (absent before it is trained)
    llm/                              the language model itself, where LoRA was merged into it
    training/                         optimiser and counters (absent in a model that is only used)

A checkpoint is written next to its place, synced and renamed, the manifest last
(mmllm.utils.files): what carries its name is complete. Before it is trained on, its files are
compared with the manifest's hashes. No pickle is written or read.

A checkpoint may come from others. It runs no code and names no file outside its folder unless the
user says so by name (mmllm.config.trust); whatever is wrong with it is a CheckpointError or
ConfigError that says where. (Weights of frozen parts are opened where its config says.)
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmllm import config as configs
from mmllm.config import RunConfig, SystemConfig
from mmllm.errors import CheckpointError, MmllmError, quoted, wrap_errors
from mmllm.llm.export import merge as merge_lora
from mmllm.llm.export import save_transformers
from mmllm.model import PROJECTIONS, AnyToAny
from mmllm.utils import files, literals
from mmllm.utils.hashing import sha256_file
from mmllm.utils.hints import did_you_mean
from mmllm.weights import check_links, copy_tensors, resolve_inside, save_tensors, tensor_shapes

logger = logging.getLogger(__name__)

FORMAT = 1
MODELS = ("mini",)
"""Models that are known by name."""
_PACKAGES = ("torch", "transformers", "peft", "diffusers", "accelerate", "safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk, its manifest read and its files' sizes checked."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.manifest["step"])

    def system(self) -> SystemConfig:
        with self._naming():
            return configs.parse_system(self.config()["system"], warn=False)

    def run(self) -> RunConfig:
        """System and stage; raises CheckpointError for a checkpoint that no stage wrote."""
        tree = self.config()
        if "stage" not in tree:
            raise CheckpointError(f"{self.folder}: holds a model but no stage of training")
        with self._naming():
            return configs.parse_run(tree, str(self.folder / "config.yaml"), warn=False)

    def config(self) -> dict[str, Any]:
        """What config.yaml says, as plain data; `llm.weights` in the folder becomes its path."""
        with self._naming():
            tree = configs.read_yaml(self.folder / "config.yaml")
            if self.holds_llm:
                tree["system"]["llm"]["weights"] = str(self.folder / "llm")
            return tree

    def _naming(self) -> AbstractContextManager[None]:
        return wrap_errors(CheckpointError, self.folder / "config.yaml")

    @property
    def holds_llm(self) -> bool:
        """Whether the language model lies in the checkpoint."""
        return (self.folder / "llm").is_dir()


def save(
    folder: Path,
    model: AnyToAny,
    *,
    step: int,
    stage: Any = None,
    training: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Tensor] | None = None,
    resolved_settings: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    with_llm: bool = False,
) -> Path:
    """Write a checkpoint to `folder`. `training` (JSON) and `tensors` go to training/;
    `resolved_settings` are the settings that were chosen by measurement; `dtype` converts the
    weights (None: as they are); `with_llm` writes the frozen language model too.

    A card (README.md) that lies in the folder stays. Raises CheckpointError when the disk does not
    take it; what was there before is then untouched.
    """
    folder = Path(folder)
    with _written(folder), files.atomic_folder(folder) as draft:
        require_free_space(folder, _bytes_needed(model, tensors or {}, with_llm=with_llm))
        _write(draft, model, step, stage, training, tensors, resolved_settings, dtype, with_llm)
        card = files.current_folder(folder) / "README.md"
        if card.is_file():
            shutil.copy2(card, draft)
    return folder


def require_free_space(folder: Path, needed: int) -> None:
    """Raises CheckpointError unless `needed` bytes are free where `folder` is, or will be."""
    free = files.free_bytes(folder)
    if free < needed:
        raise CheckpointError(
            f"{folder}: a checkpoint takes {needed / 2**20:.0f} MiB but {free / 2**20:.0f} MiB are "
            "free; free some space and resume from the previous checkpoint"
        )


def assemble(
    folder: Path,
    system: SystemConfig,
    tensors: Mapping[str, Mapping[str, Tensor]],
    write_more: Callable[[Path], None],
) -> Path:
    """A checkpoint of weights that were trained elsewhere, without building the model: `tensors` by
    file and name; `write_more` adds other files to the folder it is given.

    Nothing is known of the frozen parts they were trained with, so there are no fingerprints; the
    shapes are checked when the checkpoint is loaded. Raises CheckpointError if `folder` exists or
    cannot be written.
    """
    if folder.exists():
        raise CheckpointError(f"{folder}: exists already; name a new folder")
    with _written(folder), files.atomic_folder(folder) as draft:
        tree = configs.dump(system)
        _keep_template(draft, tree["llm"], None)
        text = literals.dump({"system": tree})
        (draft / "config.yaml").write_text(text, encoding="utf-8")
        for name, own in tensors.items():
            save_tensors(own, draft / name)
        write_more(draft)
        _write_manifest(draft, step=0, system=system.name, stage=None, fingerprints={}, chosen={})
    return folder


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """A model by name ("mini"), a checkpoint folder, or a run folder (then its newest whole
    checkpoint)."""
    if str(folder) == "mini" and not Path(folder).exists():
        from mmllm.mini import locate

        return open_checkpoint(locate("checkpoint"))
    with wrap_errors(CheckpointError, quoted(str(folder))):
        folder = files.current_folder(Path(folder).expanduser())
        alone = (folder / "manifest.json").is_file()
    if alone:
        return _open(folder)
    newest = latest(folder)
    if newest is None:
        meant = "" if folder.exists() else did_you_mean(folder, MODELS)
        raise CheckpointError(
            f"{folder}: no checkpoint there{meant}; expected a folder with manifest.json, a run "
            f"folder with checkpoints/, or the name of a model ({', '.join(MODELS)})"
        )
    return newest


def latest(run_folder: str | Path) -> Checkpoint | None:
    """The newest whole checkpoint of a run, its files compared with their hashes; damaged ones are
    passed over, saying so. None for a run without checkpoints. Raises CheckpointError where all of
    them are damaged."""
    candidates = _steps(Path(run_folder))
    for candidate in reversed(candidates):
        try:
            found = _open(candidate)
            verify(found)
            return found
        except MmllmError as error:
            logger.warning("passing over a damaged checkpoint: %s", error)
    if candidates:
        raise CheckpointError(
            f"{run_folder}: {len(candidates)} checkpoint(s), none of them whole (see the log); "
            "put a whole one back, or delete the folder to begin again"
        )
    return None


def prune(run_folder: Path, keep: int, step: int) -> None:
    """Delete all checkpoints of a run up to `step` but the newest `keep`. Later ones were damaged
    when the run went on, or it would have gone on from them: they keep no place of a whole one."""
    folders = sorted((run_folder / "checkpoints").glob("step-*"))
    for old in [path for path in folders if path.name <= _step_name(step)][:-keep]:
        doomed = files.draft_path(old)  # under its own name it is whole or absent
        old.rename(doomed)
        files.remove(doomed)


def step_folder(run_folder: Path, step: int) -> Path:
    """Where a run keeps its checkpoint of a step."""
    return run_folder / "checkpoints" / _step_name(step)


def load_model(
    source: Checkpoint, *, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> AnyToAny:
    """Build the checkpoint's system and load what was trained."""
    from mmllm import model as models

    with wrap_errors(CheckpointError, source.folder):
        sizes = _sizes(source)
        model = models.build(source.system(), dtype=dtype, device=device, sizes=sizes)
        load_weights(model, source)
        return model.eval()


def export(source: Checkpoint, folder: Path, *, dtype: torch.dtype | None = None) -> Path:
    """The model of a checkpoint alone, its weights in `dtype`, to be used or given away."""
    stage = source.run().stage if "stage" in source.config() else None
    model = load_model(source)
    if source.holds_llm and dtype:
        model.llm.model.to(dtype)
    return save(
        folder,
        model,
        step=source.step,
        stage=stage,
        resolved_settings=source.manifest["chosen"],
        dtype=dtype,
        with_llm=source.holds_llm,
    )


def merge(source: Checkpoint, folder: Path, *, dtype: torch.dtype) -> Path:
    """A checkpoint whose language model lies inside it, in `dtype`, with the LoRA merged into it
    (in float32, from whole weights even where it was trained on quantised ones)."""
    model = _load_whole(source)
    merge_lora(model.llm)
    model.llm.model.to(dtype)  # as its files will be, so that its fingerprint is theirs
    model.config = source.system()
    stage = source.run().stage if "stage" in source.config() else None
    settings = source.manifest["chosen"]
    return save(
        folder, model, step=source.step, stage=stage, resolved_settings=settings, with_llm=True
    )


def export_transformers(source: Checkpoint, folder: Path, *, dtype: torch.dtype) -> Path:
    """The language model of a checkpoint alone, LoRA merged and signal tokens added, as a plain
    transformers folder (mmllm.llm.export)."""
    model = _load_whole(source)
    merge_lora(model.llm)
    model.llm.model.to(dtype)
    with _written(folder):  # what else lies there stays, a repository's own files say
        with files.atomic_folder(folder / "transformers") as draft:
            save_transformers(model.llm, draft, signals=True)
        files.move_files(folder / "transformers", folder)
    return folder


def _load_whole(source: Checkpoint) -> AnyToAny:
    """The model of a checkpoint in float32 on the CPU, whatever its config says of the weights."""
    from mmllm import model as models

    system = source.system()
    llm = replace(system.llm, quantization=None, device_map=None, dtype=None)
    with wrap_errors(CheckpointError, source.folder):
        model = models.build(replace(system, llm=llm), sizes=_sizes(source))
        load_weights(model, source)
        return model.eval()


def _sizes(source: Checkpoint) -> dict[str, int]:
    """How many numbers it holds of what a config describes, to make no more of them."""
    files = {room: source.folder / f"{room}.safetensors" for room in ("rows", *PROJECTIONS)}
    shapes = {room: tensor_shapes(file) for room, file in files.items()}
    shapes["rows"].pop("head_rows", None)
    return {room: sum(map(math.prod, of.values())) for room, of in shapes.items()}


def load_weights(model: AnyToAny, source: Checkpoint) -> None:
    """Into a model that was built already. Strict: raises CheckpointError naming what differs."""
    saved = source.manifest["fingerprints"]
    for part, own in fingerprints(model).items():
        if part in saved and saved[part] != own:
            raise CheckpointError(
                f"{source.folder}: {part} differs: the checkpoint was trained with "
                f"{quoted(saved[part])}, this system has {own}; use the same weights and "
                "preprocessing"
            )
    for file, parameters in _parameters(model).items():
        copy_tensors(parameters, source.folder / file, remedy=_OTHER_PARTS)
    if (source.folder / "adapter").is_dir():
        model.llm.load_lora(source.folder / "adapter")
    verify(source, without=("llm", "training"))  # last: what can be told of a tensor says more


_OTHER_PARTS = "was it trained with another LLM, encoder, decoder or projection?"


def training_state(source: Checkpoint) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `save` was given as `training` and `tensors`; raises CheckpointError if absent."""
    from safetensors.torch import load_file

    folder = source.folder / "training"
    if not folder.is_dir():
        raise CheckpointError(f"{source.folder}: holds no training state; it cannot be resumed")
    with wrap_errors(CheckpointError, folder):
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        return dict(state), load_file(folder / "optimizer.safetensors")


def verify(source: Checkpoint, *, without: Sequence[str] = ()) -> None:
    """Compare every file with its hash in the manifest, but those in the folders `without`; raises
    CheckpointError."""
    for name, entry in source.manifest["files"].items():
        if name.partition("/")[0] in without:
            continue
        file = source.folder / name
        with wrap_errors(CheckpointError, file):
            found = sha256_file(file)
        if found != entry["sha256"]:
            raise CheckpointError(
                f"{file}: damaged: its SHA-256 is {found[:12]}…, the manifest has "
                f"{quoted(entry['sha256'][:12])}; use another checkpoint, or copy this one again"
            )


def fingerprints(model: AnyToAny) -> dict[str, str]:
    """What every frozen part is, so that trained weights never meet another one silently."""
    parts = {"llm": _llm_fingerprint(model)}
    for key, encoder in model.encoders.items():
        parts[f"encoders.{key}"] = str(encoder.fingerprint)
    for key, decoder in model.decoders.items():
        parts[f"decoders.{key}"] = decoder.fingerprint
    return parts


@contextmanager
def _written(folder: Path) -> Iterator[None]:
    """Raises CheckpointError for what the disk does not take."""
    remedy = "free some space or name another folder; what was there before is untouched"
    with files.write_errors(folder, CheckpointError, remedy):
        yield


def _steps(run_folder: Path) -> list[Path]:
    """The folders of a run's checkpoints by step, whole or not."""
    names = {
        path.name.removeprefix(".").removesuffix(".replaced")
        for pattern in ("step-*", ".step-*.replaced")
        for path in (run_folder / "checkpoints").glob(pattern)
    }
    return [files.current_folder(run_folder / "checkpoints" / name) for name in sorted(names)]


def _step_name(step: int) -> str:
    return f"step-{step:08d}"


def _write(
    draft: Path,
    model: AnyToAny,
    step: int,
    stage: Any,
    training: Mapping[str, Any] | None,
    tensors: Mapping[str, Tensor] | None,
    resolved_settings: Mapping[str, Any] | None,
    dtype: torch.dtype | None,
    with_llm: bool,
) -> None:
    tree = {"system": configs.dump(model.config)}
    if with_llm:
        tree["system"]["llm"]["weights"] = "llm"  # below the checkpoint, wherever it goes
        save_transformers(model.llm, draft / "llm")
    _keep_template(draft, tree["system"]["llm"], model.llm.chat_template)
    if stage is not None:
        tree["stage"] = configs.dump(stage)
    (draft / "config.yaml").write_text(literals.dump(tree), encoding="utf-8")
    for file, parameters in _parameters(model).items():
        save_tensors(
            {
                name: value.detach().to("cpu", dtype or value.dtype)
                for name, value in parameters.items()
            },
            draft / file,
        )
    if model.llm.has_lora:
        model.llm.save_lora(draft / "adapter", dtype)
    if training is not None:
        (draft / "training").mkdir()
        (draft / "training" / "state.json").write_text(json.dumps(training), encoding="utf-8")
        save_tensors(tensors or {}, draft / "training" / "optimizer.safetensors")
    _write_manifest(
        draft,
        step=step,
        system=model.config.name,
        stage=getattr(stage, "name", None),
        fingerprints=fingerprints(model),
        chosen=dict(resolved_settings or {}),
    )


def _keep_template(draft: Path, llm: dict[str, Any], text: str | None) -> None:
    """A chat template that is a file goes along: a checkpoint reads none that lies elsewhere."""
    template = llm["chat_template"]
    if template is not None and template.endswith(".jinja"):
        text = text or Path(template).expanduser().read_text(encoding="utf-8")
        (draft / "chat_template.jinja").write_text(text, encoding="utf-8")
        llm["chat_template"] = "chat_template.jinja"


def _write_manifest(draft: Path, *, step: int, **facts: Any) -> None:
    """The last file of a draft; it lists the others."""
    manifest = {
        "format": FORMAT,
        "step": step,
        **facts,
        "versions": {"mmllm": _own_version(), **{name: version(name) for name in _PACKAGES}},
        "files": {
            str(file.relative_to(draft)): {
                "bytes": file.stat().st_size,
                "sha256": sha256_file(file),
            }
            for file in sorted(draft.rglob("*"))
            if file.is_file()
        },
    }
    (draft / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def _open(folder: Path) -> Checkpoint:
    file = folder / "manifest.json"
    with wrap_errors(CheckpointError, f"{file}: no readable manifest"):
        check_links(folder)
        manifest = json.loads(resolve_inside(folder, file.name, "manifest").read_text("utf-8"))
        _check_manifest(manifest, file)
    for name, entry in manifest["files"].items():
        file = resolve_inside(folder, name, str(folder / "manifest.json"))
        size = file.stat().st_size
        if size != entry["bytes"]:
            raise CheckpointError(f"{file}: expected {entry['bytes']} bytes, got {size}")
    return Checkpoint(folder, manifest)


_MANIFEST = {"step": int, "files": dict, "fingerprints": dict, "chosen": dict}


def _check_manifest(manifest: Any, file: Path) -> None:
    """Raises CheckpointError unless it holds what is read of it."""
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        got = manifest.get("format") if isinstance(manifest, dict) else manifest
        raise CheckpointError(f"{file}: checkpoint format {quoted(got)}, expected {FORMAT}")
    for key, kind in _MANIFEST.items():
        if not isinstance(manifest.get(key), kind):
            got = quoted(manifest.get(key))
            raise CheckpointError(f"{file}: {key}: expected {kind.__name__}, got {got}")
    for name, entry in manifest["files"].items():
        facts = entry if isinstance(entry, dict) else {}
        if not isinstance(facts.get("bytes"), int) or not isinstance(facts.get("sha256"), str):
            raise CheckpointError(
                f"{file}: files: {quoted(name)}: expected bytes and sha256, got {quoted(entry)}"
            )


def _parameters(model: AnyToAny) -> dict[str, dict[str, Tensor]]:
    """File -> name -> parameter, for all that is saved as plain safetensors."""
    return {
        "input_projections.safetensors": dict(model.input_projections.named_parameters()),
        "output_projections.safetensors": dict(model.output_projections.named_parameters()),
        "rows.safetensors": {
            "rows": model.llm.signal_embeddings,
            "head_rows": model.llm.signal_head,
        },
    }


def _llm_fingerprint(model: AnyToAny) -> str:
    """Of the table's shape and a sample of its rows, rounded so that the dtype does not matter."""
    table = model.llm.embedding.weight.detach()
    rows = table[:: max(len(table) // 64, 1)].to("cpu", torch.bfloat16).float()
    digest = hashlib.sha256(rows.numpy().tobytes()).hexdigest()[:16]
    return f"{table.shape[0]}x{table.shape[1]}:{digest}"


def _bytes_needed(model: AnyToAny, tensors: Mapping[str, Tensor], *, with_llm: bool = False) -> int:
    trained = sum(value.numel() * 4 for _, value in model.trainable_candidates())
    others = [*tensors.values(), *(model.llm.model.parameters() if with_llm else ())]
    return trained + sum(value.numel() * value.element_size() for value in others) + 2**20


def _own_version() -> str:
    try:
        return version("mmllm")
    except PackageNotFoundError:  # run from a checkout that is not installed
        import mmllm

        return mmllm.__version__
