"""NExT-GPT's checkpoints: what is imported computes what it computed there; the rest is listed."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from mmllm import checkpoints
from mmllm.cli import FAILED, main
from mmllm.convert.nextgpt import convert, summary
from mmllm.data.batch import InputMedia
from mmllm.errors import CheckpointError
from tests import parts
from tests.decoders import tiny

D, INNER, CHANNELS = 32, 16, 6
COUNTS = {"image": 4, "video": 5, "audio": 3}
NAMES = {"image": "Img", "video": "Vid", "audio": "Aud"}
DECODERS = {"image": "stable_diffusion", "video": "text_to_video", "audio": "audioldm"}


class TextFcLayer(nn.Module):
    """The projection as NExT-GPT's `layers.py` has it, by torch's own transformer."""

    def __init__(self, names: tuple[str, str], queries: int, width: int):
        super().__init__()
        self.names = names
        self.add_module(names[0], nn.Linear(D, INNER))
        self.tfm = nn.Transformer(INNER, 4, 2, 1, INNER * 4, 0.0, batch_first=True, norm_first=True)
        self.add_module(names[1], nn.Linear(INNER, width))
        self.query_embs = nn.Parameter(torch.randn(1, queries, INNER))

    def forward(self, states: Tensor, embeddings: Tensor) -> Tensor:
        inward, outward = (getattr(self, name) for name in self.names)
        memory = inward(states + embeddings)
        return outward(self.tfm(memory, self.query_embs.repeat(len(states), 1, 1)))


class Theirs(nn.Module):
    """The parts of NExT-GPT that its checkpoints hold, under the names that they have there."""

    def __init__(self, llm: Path, shapes: dict[str, tuple[int, ...]]):
        super().__init__()
        base = AutoModelForCausalLM.from_pretrained(llm)
        self.vocabulary = len(base.get_input_embeddings().weight)
        base.resize_token_embeddings(self.vocabulary + sum(COUNTS.values()) + 2 * len(COUNTS))
        lora = peft.LoraConfig(
            r=4,
            lora_alpha=32,
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
            init_lora_weights=False,
            task_type="CAUSAL_LM",
        )
        self.llama_model = peft.get_peft_model(base, lora)
        self.llama_proj = nn.Linear(CHANNELS, D)
        self.layers = {
            key: TextFcLayer(("fc", "model"), len_of(shape), shape[-1])
            for key, shape in shapes.items()
        }
        self.gen_text_hidden_fcs = nn.ModuleList([self.layers["image"]])
        self.gen_text_hidden_fcs_video = nn.ModuleList([self.layers["video"]])
        self.gen_text_hidden_fcs_audio = nn.ModuleList([self.layers["audio"]])

    def save(self, folder: Path) -> None:
        """As its DeepSpeedAgent.save_model does."""
        folder.mkdir()
        kept = ("lora_", "gen_text_hidden_fcs", "llama_proj", "embed_tokens", "lm_head")
        state = OrderedDict(
            (name, value)
            for name, value in self.named_parameters()
            if any(part in name for part in kept) and not name.startswith("layers")
        )
        torch.save(state, folder / "pytorch_model.pt")
        (folder / "added_tokens.json").write_text(json.dumps(self.tokens))
        self.llama_model.config.save_pretrained(folder)

    @property
    def tokens(self) -> dict[str, int]:
        """In the order in which it adds them: <Img> </Img> [IMG0] …"""
        added: dict[str, int] = {}
        for key, name in NAMES.items():
            for text in (f"<{name}>", f"</{name}>"):
                added[text] = self.vocabulary + len(added)
            for number in range(COUNTS[key]):
                added[f"[{name.upper()}{number}]"] = self.vocabulary + len(added)
        return added

    def run(self, key: str) -> list[int]:
        return [self.tokens[f"[{NAMES[key].upper()}{n}]"] for n in range(COUNTS[key])]


def len_of(shape: tuple[int, ...]) -> int:
    return shape[0] if len(shape) == 2 else 1


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its LLM and decoders, tiny, and an encoder that a user brings, as a system's YAML."""
    folder = tmp_path_factory.mktemp("parts")
    decoders = {}
    for key, family in DECODERS.items():
        path = tiny.save(family, folder / family)
        kind, _, settings = tiny.FAMILIES[family]
        decoders[key] = {"type": kind, "weights": str(path), "steps": 2, **settings}
    tree = {
        "name": "own",
        "llm": {"weights": str(parts.write_llm(folder / "llm", tied=False))},
        "encoders": {"image": {"type": "tests.parts:ColourConfig", "channels": CHANNELS}},
        "input_projections": {"image": {"type": "grouping", "num_tokens": 2, "width": 16}},
        "decoders": decoders,
        "output_projections": {key: {"type": "transformer"} for key in decoders},
    }
    file = folder / "system.yaml"
    file.write_text(yaml.safe_dump(tree, sort_keys=False))
    return file


@pytest.fixture(scope="module")
def theirs(system: Path) -> Theirs:
    from mmllm import config

    tree = config.parse_system(yaml.safe_load(system.read_text()))
    shapes = {
        key: config.build(entry).condition_shapes["prompt_embeds"]
        for key, entry in tree.decoders.items()
    }
    torch.manual_seed(3)
    return Theirs(Path(tree.llm.weights), shapes).eval()


@torch.no_grad()
def test_imported_parts_compute_what_nextgpt_computes(
    theirs: Theirs, system: Path, tmp_path: Path
) -> None:
    theirs.save(tmp_path / "7b_tiva_v0")
    done = convert(tmp_path / "7b_tiva_v0", tmp_path / "out", system=system)
    checkpoint = checkpoints.open_checkpoint(tmp_path / "out")
    checkpoints.verify(checkpoint)
    model = checkpoints.load_model(checkpoint)

    for key, layer in theirs.layers.items():
        states, rows = torch.randn(2, 1, COUNTS[key], D)
        ours = model.output_projections[key](states + rows)["prompt_embeds"]
        there = layer(states, rows)
        torch.testing.assert_close(ours.view_as(there), there, rtol=1e-5, atol=1e-5)

    # The same sentence with a whole run of each signal in it, through table, LoRA and head.
    ids, own = [5, 7, 11], [5, 7, 11]
    for key in DECODERS:
        ids += theirs.run(key)
        own += model.llm.tokens.signal_ids(key)
    there = theirs.llama_model(torch.tensor([ids]), output_hidden_states=True)
    hidden = model.llm(model.llm.embed(torch.tensor([own])))
    torch.testing.assert_close(hidden, there.hidden_states[-1], rtol=1e-4, atol=1e-5)
    logits = model.llm.head(hidden[0])
    for key in DECODERS:
        begin = there.logits[0, :, theirs.run(key)[0]]
        row = model.llm.tokens.logit_index(key)
        torch.testing.assert_close(logits[:, row], begin, rtol=1e-4, atol=1e-5)
    signals = model.add_signal_embeddings("audio", hidden[:, -3:])
    rows = theirs.llama_model.get_input_embeddings()(torch.tensor([theirs.run("audio")]))
    torch.testing.assert_close(signals, hidden[:, -3:] + rows)

    features = torch.randn(2, 4, CHANNELS)
    placed = model.project("image", InputMedia(token_indices=torch.arange(8), features=features))
    torch.testing.assert_close(placed, theirs.llama_proj(features))

    listed = {*done.taken, *done.left}
    saved = torch.load(tmp_path / "7b_tiva_v0" / "pytorch_model.pt", weights_only=True)
    for name in saved:
        plain = name.removeprefix("llama_model.").removeprefix("base_model.model.")
        assert any(entry.startswith(plain) for entry in listed), f"{name} was dropped silently"
    lines = "\n".join(summary(done))
    assert "model.embed_tokens.weight (rows before" in lines
    assert "LoRA: no file tells its alpha" in lines


def later_layout(theirs: Theirs, folder: Path) -> Path:
    """As the repository's later train.py saves LoRA and the rest; the tokens are the last rows."""
    folder.mkdir()
    rows = len(theirs.llama_model.get_input_embeddings().weight)
    state: dict[str, Tensor] = {
        "base_model.model.model.embed_tokens.weight": torch.randn(rows, D),
        "base_model.model.lm_head.weight": torch.randn(rows, D),
        "base_model.model.model.mm_input_projector.in_fc.weight": torch.randn(INNER, CHANNELS),
        "base_model.model.model.mm_input_projector.layers.0.group_token": torch.randn(1, 8, INNER),
        "base_model.model.model.something.else": torch.zeros(1),
    }
    for short, key in (("img", "image"), ("vid", "video"), ("aud", "audio")):
        for name, value in theirs.layers[key].state_dict().items():
            name = name.replace("fc.", "in_fc.").replace("model.", "out_fc.")
            state[f"base_model.model.model.mm_output_{short}_projector.{name}"] = value
    torch.save(state, folder / "non_lora_trainables.bin")
    theirs.llama_model.save_pretrained(folder, save_embedding_layers=False)
    config: dict[str, Any] = {"vocab_size": rows, "image_decoder": "some/diffusion-2"}
    config |= {"n_img_tokens": 4, "n_vid_tokens": 5, "n_aud_tokens": 3}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_the_later_layout_without_a_system(theirs: Theirs, tmp_path: Path, capsys) -> None:
    folder = later_layout(theirs, tmp_path / "nextgpt-v1.5")
    assert main(["convert", "nextgpt", str(folder), "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "left   model.something.… - unknown" in shown
    assert "left   mm_input_projector" in shown
    assert "GroupViT" not in shown, "without an encoder the reason is the encoder"
    assert "ImageBind" in shown
    system = checkpoints.open_checkpoint(tmp_path / "out").system()
    assert system.decoders["image"].weights == "some/diffusion-2"
    assert system.llm.lora.alpha == 32
    assert system.llm.lora.rank == 4
    assert not system.encoders
    from safetensors.torch import load_file

    state = torch.load(folder / "non_lora_trainables.bin", weights_only=True)
    rows = load_file(tmp_path / "out" / "rows.safetensors")
    table = state["base_model.model.model.embed_tokens.weight"]
    head = state["base_model.model.lm_head.weight"]
    assert rows["rows"].equal(table[-12:])
    assert rows["head_rows"].equal(head[[-12, -8, -3]])
    report = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert "model.something.else" in report["left"]


def test_a_grouping_projection_is_listed_and_a_fresh_one_can_be_trained(
    theirs: Theirs, system: Path, tmp_path: Path
) -> None:
    folder = later_layout(theirs, tmp_path / "later")
    done = convert(folder, tmp_path / "out", system=system)
    reasons = {why for name, why in done.left.items() if name.startswith("mm_input_projector")}
    assert len(reasons) == 1
    assert "GroupViT" in reasons.pop()
    assert any("fresh" in note for note in done.notes)
    model = checkpoints.load_model(checkpoints.open_checkpoint(tmp_path / "out"))
    assert model.num_input_tokens == {"image": 2}


class Evil:
    def __reduce__(self) -> tuple:
        return print, ("unpickled",)


def test_what_cannot_be_converted_is_one_message(
    theirs: Theirs, system: Path, tmp_path: Path, capsys
) -> None:
    folder = later_layout(theirs, tmp_path / "later")
    out = tmp_path / "out"

    def refused(message: str, **options: Any) -> None:
        with pytest.raises(CheckpointError, match=message):
            convert(folder, out, system=system, **options)
        assert not out.exists()

    (folder / "config.json").write_text("{}")
    refused("copy the tokenizer's files")
    torch.save({"a": Evil()}, folder / "mm_output_projector.bin")
    refused("nothing else is unpickled")
    assert "unpickled" not in capsys.readouterr().out
    (folder / "mm_output_projector.bin").unlink()
    (folder / "added_tokens.json").write_text(json.dumps({"<image_00>": 3, "<image_02>": 4}))
    refused("have gaps")
    (folder / "added_tokens.json").write_text(json.dumps({"<image_00>": 10**6}))
    refused("no signal tokens of video|last signal token is number 1000000")
    with pytest.raises(CheckpointError, match="no checkpoint of NExT-GPT there"):
        convert(tmp_path, out)
    out.mkdir()
    assert main(["convert", "nextgpt", str(tmp_path / "none"), "--out", str(out)]) == FAILED
