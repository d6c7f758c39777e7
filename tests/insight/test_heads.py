"""Scores and ablation of attention heads, against transformers and against known patterns."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from mmllm import insight
from mmllm.errors import ConfigError
from mmllm.insight import heads, learning
from mmllm.insight.heads import Head
from mmllm.insight.learning import Example
from mmllm.model import AnyToAny
from tests.samples import picture, sound


@pytest.fixture
def llama(tiny_model: AnyToAny) -> Any:
    """transformers' own model of the same weights, with eager attention."""
    folder = tiny_model.config.llm.weights  # pyright: ignore
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


@torch.no_grad()
def test_patterns_and_losses_are_those_of_transformers(tiny_model: AnyToAny, llama: Any) -> None:
    ids = heads.repeated_tokens(tiny_model, 3, length=6)
    assert ids.shape == (3, 13)
    assert ids[:, 1:7].equal(ids[:, 7:])
    before = tiny_model.llm.base_model.config._attn_implementation
    patterns = insight.attention_patterns(tiny_model, ids)
    assert tiny_model.llm.base_model.config._attn_implementation == before
    output = llama(ids, output_attentions=True)
    for layer, pattern in enumerate(output.attentions):
        torch.testing.assert_close(patterns[layer], pattern, atol=1e-5, rtol=1e-4)
    logits = output.logits[:, :-1]
    expected = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    losses = heads.token_losses(tiny_model, ids)
    # The logits of signal tokens are part of the softmax of mmllm.
    assert (losses - expected.view(3, -1)).abs().max() < 0.2
    again = heads.repeat_losses(tiny_model, 3, length=6)
    torch.testing.assert_close(again, losses[:, 6:].mean(1))
    scores = heads.in_context_scores(losses, (8, 12), (0, 4))
    torch.testing.assert_close(scores, losses[:, 8:12].mean(1) - losses[:, 0:4].mean(1))


def test_known_patterns_get_the_scores_that_they_should(
    tiny_model: AnyToAny, monkeypatch: pytest.MonkeyPatch
) -> None:
    length, repeats = 5, 3
    width = 1 + length * repeats
    induction, previous, start = (torch.zeros(width, width) for _ in range(3))
    for at in range(width):
        start[at, 0] = 1
        previous[at, max(at - 1, 0)] = 1
        induction[at, at - length + 1 if at > length else 0] = 1
    pattern = torch.stack([start, induction, previous, 0.5 * (induction + start)])[None]
    monkeypatch.setattr(heads, "attention_patterns", lambda *_: {0: pattern, 1: pattern.flip(1)})
    table = insight.head_table(tiny_model, examples=2, length=length, repeats=repeats)
    assert [score.name for score in table.scores] == heads.all_heads(tiny_model)
    matching = [score.prefix_matching for score in table.scores]
    assert matching == pytest.approx([0, 1, 0, 0.5, 0.5, 0, 1, 0])
    shifted = [score.previous_token for score in table.scores]
    assert shifted[2] == shifted[5] == pytest.approx(1)
    assert max(shifted[0], shifted[1]) < 0.2
    assert set(table.top(2)) == {Head(0, 1), Head(1, 2)}
    assert table.top(1, by="previous_token") in ([Head(0, 2)], [Head(1, 1)])
    controls = table.controls([Head(0, 1), Head(1, 2)], seed=1)
    assert [layer for layer, _ in controls] == [0, 1]
    assert not {Head(0, 1), Head(1, 2)} & set(controls)
    with pytest.raises(ConfigError, match=r"layers.0 has no other heads"):
        table.controls([Head(0, number) for number in range(3)])


@torch.no_grad()
def test_direct_effects_add_up_to_the_logit(tiny_model: AnyToAny) -> None:
    """Without MLPs the residual state is the embedding and the heads' outputs, nothing else."""
    for layer in tiny_model.llm.backbone.layers:
        layer.mlp.down_proj.weight.zero_()
    table = insight.head_table(tiny_model, examples=1, length=5, repeats=3)
    ids = heads.repeated_tokens(tiny_model, 1, length=5, repeats=3)
    llm = tiny_model.llm
    with insight.look(tiny_model, "embeddings", "layers.1", "hidden") as seen:
        logits = llm.head(llm(llm.embed(ids))[0])[6:-1, : llm.tokens.vocab_size]
    rows, targets = slice(6, -1), ids[0, 7:]
    own = logits.gather(1, targets[:, None])[:, 0] - logits.mean(1)
    scale = seen["hidden"][rows] / seen["layers.1"][rows]
    weight = llm.base_model.get_output_embeddings().weight
    weight = weight[: llm.tokens.vocab_size]
    towards = weight[targets] - weight.mean(0)
    embedding = (seen["embeddings"][rows] * scale * towards).sum(-1)
    total = sum(score.direct_effect for score in table.scores) + embedding.mean().item()
    assert total == pytest.approx(own.mean().item(), abs=1e-3)


@torch.no_grad()
def test_ablated_heads_are_those_whose_columns_of_the_projection_are_zero(
    tiny_model: AnyToAny,
) -> None:
    ids = heads.repeated_tokens(tiny_model, 2, length=6)
    plain = heads.token_losses(tiny_model, ids)
    with insight.ablated(tiny_model, [Head(0, 1), Head(1, 0), Head(1, 3)]):
        ablated = heads.token_losses(tiny_model, ids)
    torch.testing.assert_close(heads.token_losses(tiny_model, ids), plain)
    first, second = (layer.self_attn.o_proj.weight for layer in tiny_model.llm.backbone.layers)
    first[:, 8:16] = 0
    second[:, :8] = 0
    second[:, 24:] = 0
    torch.testing.assert_close(ablated, heads.token_losses(tiny_model, ids), atol=1e-4, rtol=1e-4)
    assert not ablated.allclose(plain, atol=1e-3)


@pytest.fixture
def short_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny tokenizer has no words of four letters."""
    monkeypatch.setattr(learning, "LABEL", re.compile("[a-z]+"))


# --- in-context learning ------------------------------------------------------------------------


def test_a_sequence_is_text_and_media_behind_a_start_token(tiny_model: AnyToAny) -> None:
    rendered = learning.sequence(tiny_model, [picture(1), ": one\n", sound(0.1), ":"])
    tokens, encode = tiny_model.llm.tokens, tiny_model.renderer.encode_text
    assert rendered.ids == [
        tiny_model.llm.tokenizer.bos_token_id,
        *[tokens.placeholder_id] * 4,
        *encode(": one\n"),
        *[tokens.placeholder_id] * 2,
        *encode(":"),
    ]
    assert [(span.key, span.start) for span in rendered.inputs] == [
        ("image", 1),
        ("audio", 5 + len(encode(": one\n"))),
    ]
    tiny_model.renderer.input_keys.pop("audio")
    with pytest.raises(ConfigError, match="no encoder for audio"):
        learning.sequence(tiny_model, [sound(0.1)])


@pytest.mark.usefixtures("short_labels")
@pytest.mark.parametrize("answers", ["right", "wrong"])
def test_a_model_that_reads_the_lines_copies_their_labels(
    tiny_model: AnyToAny, monkeypatch: pytest.MonkeyPatch, answers: str
) -> None:
    """The model is replaced by a rule over the text that it is given."""
    llm, seen = tiny_model.llm, []

    def hidden(batch: Any) -> Tensor:
        seen[:] = batch.ids.flatten().tolist()
        return torch.arange(batch.ids.numel())[None, :, None].float().expand(-1, -1, llm.width)

    def head(states: Tensor) -> Tensor:
        logits = torch.zeros(len(states), llm.tokens.vocab_size)
        for row, at in enumerate(states[:, 0].int().tolist()):
            start = max(i for i in range(at) if seen[i] == llm.tokenizer.bos_token_id)
            text = str(llm.tokenizer.decode(seen[start + 1 : at + 1]))
            labels = dict(re.findall(r"(\w+): (\w+)\n", text))
            asked = text.rpartition("\n")[2].rstrip(":")
            is_wanted = {name: (name == asked) == (answers == "right") for name in labels}
            label = next(labels[name] for name in labels if is_wanted[name])
            logits[row, llm.tokenizer(f" {label}", add_special_tokens=False)["input_ids"][0]] = 1
        return logits

    monkeypatch.setattr(tiny_model, "hidden", hidden)
    monkeypatch.setattr(llm, "head", head)
    examples = [Example(name, name, name) for name in ("Ann", "Bob", "Cid", "Dan", "Eve")]
    found = insight.copying(tiny_model, examples, num=11, shots=3)
    assert found == [answers == "right"] * 11


@pytest.mark.usefixtures("short_labels")
def test_copying_is_the_same_in_batches_and_depends_on_the_seed_alone(
    tiny_model: AnyToAny,
) -> None:
    examples = [Example(str(n), picture(40 * n), sound(n / 9)) for n in range(5)]
    first = insight.copying(tiny_model, examples, num=9, shots=3, seed=4)
    assert len(first) == 9
    assert insight.copying(tiny_model, examples, num=9, shots=3, seed=4) == first
    assert insight.copying(tiny_model, examples, num=4, shots=3, seed=4) == first[:4]
    with pytest.raises(ConfigError, match="9 shots need as many examples, got 5"):
        insight.copying(tiny_model, examples, shots=9)


def test_attention_that_is_everywhere_the_same_has_the_share_of_chance(
    tiny_model: AnyToAny, monkeypatch: pytest.MonkeyPatch
) -> None:
    def even(_model: Any, ids: Tensor) -> dict[int, Tensor]:
        width = ids.shape[1]
        pattern = torch.ones(width, width).tril()
        return {layer: (pattern / pattern.sum(1)).expand(1, 4, -1, -1) for layer in range(2)}

    monkeypatch.setattr(learning, "attention_patterns", even)
    result = insight.template_task(tiny_model, num_texts=2, num_lines=8)
    assert len(result.correct) == 16
    shares = result.shares[result.best()]
    assert len(shares) == 2
    assert sum(shares) / 2 == pytest.approx(result.chance, abs=0.1)
