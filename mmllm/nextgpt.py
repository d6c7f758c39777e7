"""`mmllm convert nextgpt DIR`: the checkpoints that NExT-GPT publishes -> a checkpoint of ours.

Two layouts (Wu et al. 2023; `code/` and `nextgpt/` of its repository):

    7b_tiva_v0   pytorch_model.pt, config.json, the tokenizer's files
    later        non_lora_trainables.bin, adapter_model.*, adapter_config.json, config.json;
                 of its first stages mm_input_projector.bin, mm_output_projector.bin

The output projections, LoRA, the rows of the signal tokens and linear or MLP input projections are
taken; all else is listed with the reason. The .pt and .bin files are pickles. They are read here
and nowhere else, by `torch.load(weights_only=True)`, which makes tensors and refuses the rest.

Legend: K signal tokens, D LLM width, d inner width, P x E the condition, R rows of new tokens.
"""

from __future__ import annotations

import json
import logging
import pickle
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmllm import checkpoints
from mmllm import config as configs
from mmllm.config import SystemConfig
from mmllm.errors import CheckpointError, ConfigError

logger = logging.getLogger(__name__)

FILES = (
    "pytorch_model.pt",
    "non_lora_trainables.bin",
    "adapter_model.safetensors",
    "adapter_model.bin",
    "mm_output_projector.bin",
    "mm_input_projector.bin",
)
"""Files of weights, in the order in which they count: what an earlier one has, later ones lose."""

OUTPUTS = {
    "image": ("gen_text_hidden_fcs.0.", "mm_output_img_projector."),
    "video": ("gen_text_hidden_fcs_video.0.", "mm_output_vid_projector."),
    "audio": ("gen_text_hidden_fcs_audio.0.", "mm_output_aud_projector."),
}
"""Modality -> where its output projection stands in either layout; also the order of the tokens."""

INPUTS = ("llama_proj.", "mm_input_projector.")

SIGNALS = {
    "image": (r"\[IMG(\d+)\]", r"<image_(\d+)>"),
    "video": (r"\[VID(\d+)\]", r"<video_(\d+)>"),
    "audio": (r"\[AUD(\d+)\]", r"<audio_(\d+)>"),
}
"""What the signal tokens are called in either layout's tokenizer."""

COUNTS = {"image": "n_img_tokens", "video": "n_vid_tokens", "audio": "n_aud_tokens"}
"""Their numbers in the later layout's config.json."""

DECODERS: dict[str, tuple[str, str]] = {
    "image": ("stable_diffusion", "runwayml/stable-diffusion-v1-5"),
    "video": ("text_to_video", "cerspense/zeroscope_v2_576w"),
    "audio": ("audioldm", "cvssp/audioldm-l-full"),
}
"""The first layout's decoders (its config/base.yaml); the later one's config.json names its own."""

HEADS = 4
"""Of the output projections' attention, in its code; weights do not tell."""

LORA_ALPHA = 32.0
"""The paper's, where no adapter_config.json tells."""

_TABLE, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_LORA = re.compile(r"(model\.layers\.\d+\..*\.(\w+))\.lora_([AB])(\.default)?\.weight")


@dataclass
class Conversion:
    """What became of each tensor: `taken` theirs -> ours, `left` theirs -> why not; `notes` on the
    whole."""

    folder: Path
    taken: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def convert(
    source: Path, out: Path, *, system: Path | None = None, llm: str | None = None
) -> Conversion:
    """Write what `source` holds to the new folder `out`, as a checkpoint.

    `system`: a YAML whose llm, encoders and decoders are used, under the keys image, audio and
    video; else the decoders are those that NExT-GPT names, and there are no encoders, for it has
    ImageBind. `llm`: the language model that it was trained on, where neither says it.

    Raises CheckpointError if a file is missing, holds more than tensors, or has other shapes than
    NExT-GPT's code gives.
    """
    tensors, facts = _read(source)
    done = Conversion(out)
    left = dict(tensors)  # what nobody has taken yet
    tree = _system(source, facts, system, llm)

    signals = _signals(source, facts)
    projections: dict[str, Tensor] = {}
    found = {key: _output(key, tensors) for key in OUTPUTS}
    present = [key for key in OUTPUTS if found[key]]
    if not present:
        raise CheckpointError(
            f"{source}: no output projection ({OUTPUTS['image'][0]}… or {OUTPUTS['image'][1]}… and "
            "so on); expected NExT-GPT's checkpoint of its second or third stage"
        )
    for key in tree["decoders"].keys() - set(present):
        done.notes.append(f"decoder {key}: left out, the checkpoint has no projection to it")
    tree["decoders"] = {key: entry for key, entry in tree["decoders"].items() if key in present}
    if missing := set(present) - tree["decoders"].keys():
        raise ConfigError(
            f"{system}: the checkpoint makes {', '.join(present)}; system.decoders has no key "
            f"{sorted(missing)[0]!r}"
        )
    keys = list(tree["decoders"])
    tree["output_projections"] = {}
    for key in keys:
        entry, moved = _as_ours(key, found[key], len(signals[key]))
        tree["output_projections"][key] = entry
        for name, (theirs, value) in moved.items():
            projections[name] = value
            done.taken[theirs] = f"output_projections.{name}"
            left.pop(theirs)

    rows = _rows(tensors, signals, keys, source)
    for name in (_TABLE, _HEAD):
        left.pop(name)
    first = min(token for ids in signals.values() for token in ids)
    count = sum(len(signals[key]) for key in keys)
    done.taken[f"{_TABLE} ({count} rows)"] = "llm.signal_embeddings"
    done.taken[f"{_HEAD} ({len(keys)} rows)"] = "llm.signal_head"
    done.left[f"{_TABLE} (rows before {first})"] = (
        "NExT-GPT trains the whole table; here the LLM keeps its own, so replies differ as far as "
        "it had moved"
    )
    done.left[f"{_HEAD} (all other rows)"] = (
        "the same; and of a signal run only the beginning is predicted, it completes by itself"
    )

    adapter = _lora(tensors, facts)
    for theirs, name in adapter.names.items():
        done.taken[theirs] = f"adapter/{name}"
        left.pop(theirs)
    if adapter.tensors:
        tree["llm"]["lora"] = adapter.options()
        if not facts.get("adapter"):
            done.notes.append(f"LoRA: no file tells its alpha; {LORA_ALPHA:g} is the paper's")
    else:
        tree["llm"]["lora"] = None

    inputs = _inputs(tree, tensors, left, done)
    for name in left:
        done.left[name] = _why(name)
    if len(facts["duplicates"]):
        done.notes.append(f"in several files, the first counts: {', '.join(facts['duplicates'])}")
    done.notes.append(
        "prompts: NExT-GPT wrote '### Human: <Img>…</Img>', here the LLM's chat template is used"
    )
    if "later" in facts["layout"]:
        done.notes.append(
            "signal runs: its training put a space between any two signal tokens and read the "
            "states of both; here a run is the signal tokens alone. Train the second stage again "
            "before you rely on what it draws"
        )

    files = {
        "input_projections.safetensors": inputs,
        "output_projections.safetensors": projections,
        "rows.safetensors": rows,
    }

    def write_more(draft: Path) -> None:
        if adapter.tensors:
            adapter.save(draft / "adapter", tree["llm"]["weights"])
        report = {"taken": done.taken, "left": done.left, "notes": done.notes}
        (draft / "conversion.json").write_text(json.dumps(report, indent=1), encoding="utf-8")

    checkpoints.assemble(out, configs.parse_system(tree), files, write_more)
    return done


def summary(done: Conversion) -> Iterator[str]:
    """What became of each part; the tensors of a module that share their fate are one line."""
    for what, entries in (("taken", done.taken), ("left", done.left)):
        groups: dict[tuple[str, str], int] = {}
        for theirs, other in entries.items():
            part = re.sub(r"\.(\d+)(?=\.)", ".*", theirs)
            key = (_module(part), _module(other) if what == "taken" else other)
            groups[key] = groups.get(key, 0) + 1
        for (theirs, other), count in groups.items():
            many = f" ({count} tensors)" if count > 1 else ""
            yield f"{what:6} {theirs}{many} {'->' if what == 'taken' else '-'} {other}"
    for note in done.notes:
        yield f"note   {note}"
    yield f"{done.folder}: {len(done.taken)} taken, {len(done.left)} left; conversion.json has all"


def _module(name: str) -> str:
    """The first names of a parameter: of `mm_output_img_projector.tfm.…` the projector."""
    head = name.split(" ")[0].split(".")
    return name if " " in name or len(head) < 3 else ".".join(head[:2]) + ".…"


# --- reading ------------------------------------------------------------------------------------


def _read(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors under plain names, and what the folder's JSON files say."""
    found = [folder / name for name in FILES if (folder / name).is_file()]
    if not found:
        raise CheckpointError(
            f"{folder}: no checkpoint of NExT-GPT there; expected one of {', '.join(FILES)}"
        )
    tensors: dict[str, Tensor] = {}
    duplicates = []
    for path in found:
        for name, value in _load(path).items():
            plain = _plain(name)
            if plain in tensors:
                duplicates.append(f"{path.name}: {plain}")
            tensors.setdefault(plain, value)
    facts: dict[str, Any] = {"duplicates": duplicates}
    for key, name in (("config", "config.json"), ("adapter", "adapter_config.json")):
        path = folder / name
        try:
            facts[key] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        except ValueError as error:
            raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    facts["layout"] = "7b_tiva_v0" if (folder / FILES[0]).is_file() else "later"
    return tensors, facts


def _load(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise CheckpointError(
            f"{path}: cannot be read as tensors alone, and nothing else is unpickled: "
            f"{str(error).splitlines()[0]}"
        ) from error
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise CheckpointError(f"{path}: expected names and tensors, got {type(state).__name__}")
    return {str(name): value.detach() for name, value in state.items()}


def _plain(name: str) -> str:
    """A parameter's name without the wrappers that it was saved through."""
    for prefix in ("module.", "llama_model.", "base_model.model."):
        name = name.removeprefix(prefix)
    return name.removeprefix("model.") if name.startswith("model.mm_") else name


def _signals(folder: Path, facts: Mapping[str, Any]) -> dict[str, list[int]]:
    """Modality -> the ids of its signal tokens: by the tokenizer's files or, without them, the
    last rows of the table in the order in which the later layout adds them."""
    added = _added_tokens(folder)
    found: dict[str, list[int]] = {}
    for key, patterns in SIGNALS.items():
        numbered = {
            int(match[1]): token
            for text, token in added.items()
            for pattern in patterns
            if (match := re.fullmatch(pattern, text))
        }
        if sorted(numbered) != list(range(len(numbered))):
            raise CheckpointError(f"{folder}: signal tokens of {key} have gaps: {sorted(numbered)}")
        found[key] = [numbered[number] for number in range(len(numbered))]
    if any(found.values()):
        return found
    config = facts["config"]
    if not all(name in config for name in (*COUNTS.values(), "vocab_size")):
        raise CheckpointError(
            f"{folder}: which rows are the signal tokens' is not said: no added_tokens.json or "
            "tokenizer_config.json with them; copy the tokenizer's files of the checkpoint there"
        )
    if any(
        config.get(f"mm_use_{part}_{kind}")
        for part in ("img", "vid", "aud")
        for kind in ("patch_token", "start_end")
    ):
        raise CheckpointError(
            f"{folder}: config.json adds patch or start tokens behind the signal tokens; copy the "
            "tokenizer's files of the checkpoint there, which say which rows are which"
        )
    end = config["vocab_size"]
    for key in reversed(COUNTS):
        found[key] = list(range(end - config[COUNTS[key]], end))
        end -= config[COUNTS[key]]
    return found


def _added_tokens(folder: Path) -> dict[str, int]:
    """Text -> id, as slow and as fast tokenizers write them."""
    added: dict[str, int] = {}
    try:
        if (path := folder / "added_tokens.json").is_file():
            added |= json.loads(path.read_text(encoding="utf-8"))
        if (path := folder / "tokenizer_config.json").is_file():
            tree = json.loads(path.read_text(encoding="utf-8"))
            for number, token in tree.get("added_tokens_decoder", {}).items():
                added[token["content"]] = int(number)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not as a tokenizer writes it: {error!r}") from error
    return added


# --- parts --------------------------------------------------------------------------------------


def _system(
    source: Path, facts: Mapping[str, Any], path: Path | None, llm: str | None
) -> dict[str, Any]:
    """The frozen parts, as a tree."""
    if path is not None:
        tree = configs.read_yaml(path)
        tree = dict(tree.get("system", tree))
        if llm:
            tree["llm"] = {**tree["llm"], "weights": llm}
        tree["llm"] = configs.dump(configs.parse_system(tree).llm)
        return tree
    config = facts["config"]
    weights = llm or facts["adapter"].get("base_model_name_or_path")
    if not weights:
        raise ConfigError(
            f"{source}: the files do not say which language model it was trained on: give --llm "
            "(a folder or hub id of that Vicuna), or --system"
        )
    decoders = {
        key: {"type": kind, "weights": config.get(f"{key}_decoder") or usual}
        for key, (kind, usual) in DECODERS.items()
    }
    return {
        "name": f"nextgpt-{source.resolve().name}",
        "llm": {"weights": weights},
        "decoders": decoders,
    }


def _output(key: str, tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, Tensor]]:
    """One output projection: name in its module -> (whole name, tensor)."""
    return {
        name.removeprefix(prefix): (name, value)
        for prefix in OUTPUTS[key]
        for name, value in tensors.items()
        if name.startswith(prefix)
    }


def _as_ours(
    key: str, found: Mapping[str, tuple[str, Tensor]], signal_tokens: int
) -> tuple[dict[str, Any], dict[str, tuple[str, Tensor]]]:
    """The config of one output projection and its parameters: our name -> (theirs, tensor)."""
    if "query_embs" not in found:
        raise CheckpointError(
            f"the output projection of {key} is no transformer (it has no query_embs); NExT-GPT's "
            "linear and Q-Former projections cannot be represented here"
        )
    if not signal_tokens:
        raise CheckpointError(f"the tokenizer's files name no signal tokens of {key}")
    condition = f"{key}.%s.prompt_embeds"
    renamed = {
        "query_embs": condition % "queries",
        **{f"{name}.weight": f"{key}.inward.weight" for name in ("fc", "in_fc")},
        **{f"{name}.bias": f"{key}.inward.bias" for name in ("fc", "in_fc")},
        **{f"{name}.weight": (condition % "outward") + ".weight" for name in ("model", "out_fc")},
        **{f"{name}.bias": (condition % "outward") + ".bias" for name in ("model", "out_fc")},
    }
    moved = {}
    for name, (theirs, value) in found.items():
        if name.startswith(("tfm.encoder.", "tfm.decoder.")):
            ours = f"{key}.{name.removeprefix('tfm.')}"
        elif name in renamed:
            ours = renamed[name]
        else:
            continue  # stays on the list of what was left
        moved[ours] = (theirs, value[0] if name == "query_embs" else value)
    layers = {
        side: 1
        + max((int(name.split(".")[3]) for name in moved if f".{side}.layers." in name), default=-1)
        for side in ("encoder", "decoder")
    }
    try:
        inward = moved[f"{key}.inward.weight"][1]
        feed_forward = moved[f"{key}.encoder.layers.0.linear1.weight"][1]
    except KeyError as error:
        raise CheckpointError(f"the output projection of {key} has no {error}") from error
    entry = {
        "type": "transformer",
        "signal_tokens": signal_tokens,
        "width": inward.shape[0],
        "encoder_layers": layers["encoder"],
        "decoder_layers": layers["decoder"],
        "heads": HEADS,
        "feed_forward": feed_forward.shape[0],
        "bare": True,
    }
    return entry, moved


def _rows(
    tensors: Mapping[str, Tensor], signals: Mapping[str, list[int]], keys: list[str], source: Path
) -> dict[str, Tensor]:
    """rows float[R, D] and head_rows float[outputs, D], in the order of the decoders' keys."""
    for name in (_TABLE, _HEAD):
        if name not in tensors:
            raise CheckpointError(
                f"{source}: no {name}: the rows of the signal tokens are not there; they stand in "
                f"{FILES[0]}, {FILES[1]} or {FILES[4]}"
            )
        last = max(token for ids in signals.values() for token in ids)
        if last >= len(tensors[name]):
            raise CheckpointError(
                f"{source}: {name} has {len(tensors[name])} rows, but the last signal token is "
                f"number {last}; do the tokenizer's files belong to these weights?"
            )
    chosen = [token for key in keys for token in signals[key]]
    return {
        "rows": tensors[_TABLE][chosen].float(),
        "head_rows": tensors[_HEAD][[signals[key][0] for key in keys]].float(),
    }


@dataclass
class _Adapter:
    """LoRA in peft's own format: `tensors` by peft's names, `names` theirs -> peft's."""

    tensors: dict[str, Tensor]
    names: dict[str, str]
    targets: tuple[str, ...]
    config: Mapping[str, Any]

    @property
    def rank(self) -> int:
        ranks = {
            value.shape[0] for name, value in self.tensors.items() if name.endswith("lora_A.weight")
        }
        if len(ranks) != 1:
            raise CheckpointError(f"LoRA of several ranks: {sorted(ranks)}")
        return ranks.pop()

    def options(self) -> dict[str, Any]:
        """As `llm.lora` of a config."""
        return {
            "rank": self.rank,
            "alpha": float(self.config.get("lora_alpha", LORA_ALPHA)),
            "dropout": float(self.config.get("lora_dropout", 0.0)),
            "targets": list(self.targets),
        }

    def save(self, folder: Path, llm: str) -> None:
        from peft import LoraConfig

        from mmllm.weights import save_tensors

        folder.mkdir()
        options = self.options()
        LoraConfig(
            r=options["rank"],
            lora_alpha=options["alpha"],
            lora_dropout=options["dropout"],
            target_modules=options["targets"],
            task_type="CAUSAL_LM",
            base_model_name_or_path=llm,
            inference_mode=True,
        ).save_pretrained(str(folder))
        tensors = {name: value.float().contiguous() for name, value in self.tensors.items()}
        save_tensors(tensors, folder / "adapter_model.safetensors")


def _lora(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> _Adapter:
    adapter = _Adapter({}, {}, (), facts["adapter"])
    targets: set[str] = set()
    for name, value in tensors.items():
        if match := _LORA.fullmatch(name):
            ours = f"base_model.model.{match[1]}.lora_{match[3]}.weight"
            adapter.tensors[ours] = value
            adapter.names[name] = ours
            targets.add(match[2])
    adapter.targets = tuple(sorted(targets))
    return adapter


def _inputs(
    tree: dict[str, Any],
    tensors: Mapping[str, Tensor],
    left: dict[str, Tensor],
    done: Conversion,
) -> dict[str, Tensor]:
    """The one input projection of NExT-GPT for every encoder of the system; an encoder that it
    does not fit gets a fresh one, as the system says, which its first stage must train."""
    own = {
        name: (whole, value)
        for prefix in INPUTS
        for whole, value in tensors.items()
        if whole.startswith(prefix)
        for name in [whole.removeprefix(prefix)]
    }
    encoders = tree.get("encoders") or {}
    if not encoders:
        tree["encoders"], tree["input_projections"] = {}, {}
        done.left |= {
            whole: "no encoder: NExT-GPT reads through ImageBind; name yours with --system"
            for whole, _ in own.values()
        }
        for whole, _ in own.values():
            left.pop(whole)
        return {}
    if own.keys() == {"weight", "bias"}:
        entry: dict[str, Any] = {"type": "linear", "bare": True}
        renamed = {"weight": "linear.weight", "bias": "linear.bias"}
    elif own.keys() == {f"layer.{n}.{kind}" for n in (0, 2) for kind in ("weight", "bias")}:
        hidden = own["layer.0.weight"][1].shape[0]
        entry = {"type": "mlp", "hidden": hidden, "bare": True}
        renamed = {
            f"layer.{theirs}.{kind}": f"layers.{ours}.{kind}"
            for theirs, ours in ((0, 0), (2, 3))
            for kind in ("weight", "bias")
        }
    else:
        return _fresh(tree, tensors, done)
    tree["input_projections"] = dict.fromkeys(encoders, entry)
    moved = {}
    for name, (whole, value) in own.items():
        left.pop(whole)
        done.taken[whole] = f"input_projections.*.{renamed[name]}"
        moved |= {f"{key}.{renamed[name]}": value.float() for key in encoders}
    return moved


def _fresh(
    tree: dict[str, Any], tensors: Mapping[str, Tensor], done: Conversion
) -> dict[str, Tensor]:
    """The input projections that the system names, as a first stage would begin with them."""
    scale = tensors[_TABLE].float().square().mean().sqrt().item()
    width = tensors[_TABLE].shape[1]
    system: SystemConfig = configs.parse_system(tree)
    fresh = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for key, entry in system.encoders.items():
            shape = configs.build(entry).feature_shape
            projection = configs.build(
                system.input_projections[key], feature_shape=shape, width=width, scale=scale
            )
            fresh |= {f"{key}.{name}": value for name, value in projection.named_parameters()}
    done.notes.append(
        "input projections: fresh, as the system names them; train the first stage before the "
        "model is shown anything"
    )
    return {name: value.detach() for name, value in fresh.items()}


def _why(name: str) -> str:
    """Why a tensor has no place here."""
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
