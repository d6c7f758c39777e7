"""The loss that holds the adapted language model to the base model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mmllm import checkpoints
from mmllm import model as models
from mmllm.data.mixture import Mixture
from mmllm.data.text_corpus import TextCorpus
from mmllm.errors import ConfigError
from mmllm.features.cache import FeatureCache
from mmllm.training import setup
from mmllm.training.feed import TrainingStepDataset, open_sources
from mmllm.training.trainable import choose_trainable
from mmllm.training.trainer import train


@pytest.fixture
def plain(tmp_path: Path) -> str:
    sentences = [f"{word} three four five six seven eight nine ten " for word in ("one", "two")]
    rows = [{"text": sentence * 6} for sentence in sentences]
    path = tmp_path / "plain.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def test_windows_are_a_function_of_the_step(make_run, plain):
    run = make_run()
    encode = models.build(run.system).renderer.encode_text
    options = {"length": 8, "batch_size": 4, "seed": 1}
    text = TextCorpus(plain, encode, **options)
    assert text.windows.shape[1] == 8
    assert torch.equal(text.batch(3), TextCorpus(plain, encode, **options).batch(3))
    steps = range(len(text.windows))  # four epochs, four windows a step
    drawn = sorted(row for step in steps for row in text.batch(step).tolist())
    assert drawn == sorted(text.windows.tolist() * 4)


def test_processes_share_the_windows_of_a_step(make_run, plain):
    run = make_run(kl={"file": plain, "length": 8, "batch_size": 4}, losses={"kl": 1.0})
    model = models.build(run.system)
    mixture = Mixture(open_sources(run.stage.data, "data"), 0)
    text = setup.text_corpus(model, run.stage)
    parts = [
        TrainingStepDataset(
            model.renderer,
            model.batch_layout,
            mixture,
            FeatureCache(model),
            run.stage,
            rank=rank,
            world_size=2,
            text_corpus=text,
        )[5]
        for rank in range(2)
    ]
    order = [
        parts[rank].microbatches[micro].text_windows for micro in range(2) for rank in range(2)
    ]
    assert torch.equal(torch.cat(order), text.batch(5))


def test_fresh_adapters_differ_by_the_new_rows_alone(make_run, plain):
    model = models.build(make_run().system)
    choose_trainable(model, {"llm.lora.*": 1e-3})
    ids = torch.randint(5, 200, (2, 9))
    kl_to_base = model.kl_to_base(ids)
    assert kl_to_base.requires_grad
    assert all(p.requires_grad for name, p in model.llm.lora_parameters())
    logits = model.llm.head(model.llm(model.llm.embed(ids)).flatten(0, 1))
    rows = logits.float().softmax(-1)[:, model.llm.tokens.vocab_size :].sum(-1)
    wanted = -(1 - rows).log()  # all that is missing is what the new rows took
    torch.testing.assert_close(kl_to_base, wanted, atol=1e-5, rtol=1e-4)
    assert len(kl_to_base) == 18


def test_what_adapters_change_is_the_divergence_of_whole_logits(make_run):
    """Each window by itself, forward and gradient."""
    model = models.build(make_run().system)
    choose_trainable(model, {"llm.lora.*": 1e-3, "llm.signal_head": 1e-3})
    weights = [*dict(model.llm.lora_parameters()).values(), model.llm.signal_head]
    torch.manual_seed(0)
    for weight in weights:
        weight.data.normal_(std=0.1)
    ids = torch.randint(5, 200, (2, 9))

    def logits(row: Tensor) -> Tensor:
        return model.llm.head(model.llm(model.llm.embed(row[None]))[0])

    wanted = []
    for row in ids:
        with torch.no_grad(), model.llm.adapters_disabled():
            base = logits(row)[:, : model.llm.tokens.vocab_size].log_softmax(-1)
        adapted = logits(row).log_softmax(-1)[:, : model.llm.tokens.vocab_size]
        wanted.append((base.exp() * (base - adapted)).sum(-1))
    found, wanted = model.kl_to_base(ids), torch.cat(wanted)
    assert wanted.max() > 0.01
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    for one, other in zip(
        torch.autograd.grad(found.sum(), weights),
        torch.autograd.grad(wanted.sum(), weights),
        strict=True,
    ):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_the_kl_loss_keeps_plain_text_near_the_base_model(make_run, plain, tmp_path):
    kl_to_base = {}
    train(make_run(output="first", steps=1), progress=False)
    for weight in (0.0, 10.0):
        run = make_run(
            output=f"run-{weight}",
            init_from=str(tmp_path / "first"),
            learning_rates={"llm.lora.*": 1e-2, "llm.signal_head": 1e-2},
            steps=15,
            losses={"text": 1.0, "kl": weight},
            kl={"file": plain, "length": 16, "batch_size": 4},
        )
        train(run, progress=False)
        model = checkpoints.load_model(checkpoints.open_checkpoint(tmp_path / f"run-{weight}"))
        windows = setup.text_corpus(model, run.stage).windows
        with torch.no_grad():
            kl_to_base[weight] = model.kl_to_base(windows).mean().item()
    assert kl_to_base[10.0] < 0.5 * kl_to_base[0.0]


def test_a_weight_without_text_is_refused(make_run):
    with pytest.raises(ConfigError, match="both or neither"):
        make_run(losses={"text": 1.0, "kl": 1.0})


def test_texts_that_are_too_short_are_refused(make_run, plain):
    encode = models.build(make_run().system).renderer.encode_text
    with pytest.raises(ConfigError, match=r"no text of .* has 9999 tokens"):
        TextCorpus(plain, encode, length=9999, batch_size=1, seed=0)
