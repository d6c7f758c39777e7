"""A trained language model as others load it: merged, with signal tokens, as plain transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from mmllm import checkpoints
from mmllm.checkpoints import Checkpoint
from mmllm.cli import FAILED, main
from mmllm.llm.export import merge_lora, save_transformers
from mmllm.model import AnyToAny
from tests import parts
from tests.llm.families import FAMILIES
from tests.llm.helpers import adapted, ids_of, logits_of, plain, with_outputs


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_plain_folder_has_the_logits_of_the_adapted_model(name, tied, folders, tmp_path):
    """With signal tokens in the text too; loaded by nothing but transformers."""
    llm = adapted(with_outputs(folders(name, tied)))
    count = len(llm.tokenizer)
    ids = ids_of(folders(name, tied))
    run = llm.tokens.signal_ids("image")
    spoken = torch.cat([ids[:1], torch.tensor([run]), ids[1:]], dim=1)
    wanted = logits_of(llm, spoken)[0]
    merge_lora(llm)
    assert not llm.has_lora
    save_transformers(llm, tmp_path, signals=True)

    tokenizer, reference = AutoTokenizer.from_pretrained(tmp_path), plain(tmp_path)
    names = ["<|image_0|>", "<|image_1|>", "<|image_2|>", "<|audio_0|>", "<|audio_1|>"]
    assert tokenizer.convert_tokens_to_ids(names) == list(range(count, count + 5))
    assert tokenizer("".join(names), add_special_tokens=False)["input_ids"][-5:] == list(
        range(count, count + 5)
    )
    spoken = torch.where(
        spoken < llm.tokens.vocab_size, spoken, spoken - llm.tokens.vocab_size + count
    )
    found = reference(spoken).logits[0]
    torch.testing.assert_close(found[:, :count], wanted[:, :count], atol=1e-3, rtol=1e-3)
    begins = wanted[:, llm.tokens.vocab_size :]
    torch.testing.assert_close(found[:, [count, count + 3]], begins, atol=1e-3, rtol=1e-3)
    others = found[:, [count + 1, count + 2, count + 4]]
    assert (others.amax(-1) < found[:, :count].amax(-1)).all()


@pytest.fixture
def trained(make_model: Callable[..., AnyToAny], tmp_path: Path) -> Checkpoint:
    model = make_model()
    adapted(model.llm)
    checkpoints.save(tmp_path / "trained", model, step=3)
    return checkpoints.open_checkpoint(tmp_path / "trained")


def test_a_merged_model_answers_as_before_and_lies_in_one_folder(trained, tmp_path, capsys):
    folder = tmp_path / "merged"
    arguments = ["merge", str(trained.folder), str(folder), "--dtype", "float32"]
    assert main(arguments) == 0
    assert "step 3" in capsys.readouterr().out
    moved = folder.rename(tmp_path / "moved")  # nothing in it knows where it was
    merged = checkpoints.load_model(checkpoints.open_checkpoint(moved))
    before = checkpoints.load_model(trained)
    assert before.llm.has_lora
    assert not merged.llm.has_lora
    ids = torch.tensor([[5, 6, *before.llm.tokens.signal_ids("audio"), 7]])
    torch.testing.assert_close(
        logits_of(merged.llm, ids), logits_of(before.llm, ids), atol=1e-4, rtol=1e-4
    )
    checkpoints.verify(checkpoints.open_checkpoint(moved))
    assert main(["export", str(moved), str(tmp_path / "given")]) == 0  # with its language model
    given = checkpoints.load_model(checkpoints.open_checkpoint(tmp_path / "given"))
    torch.testing.assert_close(
        logits_of(given.llm, ids), logits_of(before.llm, ids), atol=0.05, rtol=0.05
    )
    assert main([*arguments[:2], str(tmp_path)]) == FAILED


def test_a_trained_model_is_exported_to_plain_transformers(trained, tmp_path, capsys):
    folder = tmp_path / "plain"
    arguments = ["export", str(trained.folder), str(folder), "--transformers"]
    assert main([*arguments, "--dtype", "float32"]) == 0
    own = checkpoints.load_model(trained).llm
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        found = plain(folder)(ids).logits
    vocabulary = own.tokens.vocab_size
    torch.testing.assert_close(
        found[..., :vocabulary], logits_of(own, ids)[..., :vocabulary], atol=1e-4, rtol=1e-4
    )
    assert AutoTokenizer.from_pretrained(folder).chat_template == parts.TEMPLATE
    assert main(["export", str(trained.folder), str(tmp_path), "--transformers"]) == FAILED
