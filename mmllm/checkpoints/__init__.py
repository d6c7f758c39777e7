"""Checkpoints: a folder with the config, a manifest, and what trains as safetensors.

    config.yaml                       system and stage, as they were
    manifest.json                     step, versions, fingerprints of frozen parts, files' hashes
    input_projections.safetensors     output_projections.safetensors
    rows.safetensors                  signal embeddings and signal head
    adapter/                          LoRA, in peft's own format (absent before it is trained)
    llm/                              the language model itself, where LoRA was merged into it
    training/                         optimizer and counters (absent in a model that is only used)

A checkpoint is written next to its place, synced and renamed, the manifest last
(mmllm.utils.files): what carries its name is complete. Before it is trained on, its files are
compared with the manifest's hashes. No pickle is written or read.

A checkpoint may come from others. It runs no code and names no file outside its folder unless the
user allows it by name (mmllm.config.trust); whatever is wrong with it is a CheckpointError or
ConfigError that says where. (Weights of frozen parts are opened where its config says.)

Files: `manifest` (the Checkpoint and its hashes), `contents` (what is saved of a model),
`discovery` (finding one), `saving`, `loading`, `exporting`.
"""

from mmllm.checkpoints.contents import fingerprints, saved_names
from mmllm.checkpoints.discovery import MODELS, latest, open_checkpoint, prune, step_folder
from mmllm.checkpoints.exporting import export, export_transformers, merge
from mmllm.checkpoints.loading import load_model, load_weights, training_state
from mmllm.checkpoints.manifest import FORMAT, Checkpoint, verify
from mmllm.checkpoints.saving import assemble, require_free_space, save

__all__ = [
    "FORMAT",
    "MODELS",
    "Checkpoint",
    "assemble",
    "export",
    "export_transformers",
    "fingerprints",
    "latest",
    "load_model",
    "load_weights",
    "merge",
    "open_checkpoint",
    "prune",
    "require_free_space",
    "save",
    "saved_names",
    "step_folder",
    "training_state",
    "verify",
]
