"""Input projections of words: embeddings that a classifier chooses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mmllm import config
from mmllm import model as models
from mmllm.config import PrealignConfig
from mmllm.errors import ConfigError
from mmllm.features.cache import FeatureCache
from mmllm.projections.input import WordsConfig, WordsProjection
from mmllm.training import trainer
from mmllm.training.feed import open_sources, render_all_items
from mmllm.training.prealign import prealign, spell_replies
from mmllm.training.trainable import choose_trainable


def projection(words: int = 5) -> WordsProjection:
    torch.manual_seed(0)
    return WordsProjection(WordsConfig(words=words, num_tokens=2), (3, 8), 6, scale=0.5)


def test_a_certain_medium_is_its_word():
    found, spelled = projection(), torch.randn(4, 2, 6)
    found.set_words(spelled)
    with torch.no_grad():
        found.classifier.bias[2] = 1e4
    tokens = found(torch.randn(7, 3, 8))
    torch.testing.assert_close(tokens, spelled[2].expand(7, 2, 6))


def test_an_uncertain_medium_is_its_likeliest_word_and_the_others_have_a_gradient():
    found, features = projection(), torch.randn(2, 3, 8)
    scores = found.classifier(found.prepare(features)).mean(1)
    tokens = found(features)
    torch.testing.assert_close(tokens, found.table[scores.argmax(1)] * 0.5)
    tokens[0].sum().backward()
    slope = found.classifier.bias.grad
    mixed = torch.einsum("mk,knd->mnd", scores[:1].softmax(-1), found.table) * 0.5
    (wanted,) = torch.autograd.grad(mixed.sum(), found.classifier.bias)
    torch.testing.assert_close(slope, wanted)


def test_hidden_encoder_tokens_do_not_count():
    found, features = projection(), torch.randn(2, 3, 8)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    other = torch.where(mask[..., None], features, torch.randn(2, 3, 8))
    torch.testing.assert_close(found(features, mask), found(other, mask))
    assert not torch.allclose(found.scores(features), found.scores(other))


def test_replies_are_spelled_by_what_is_their_own(system_tree):
    model = models.build(_with_words(system_tree, 8))
    encode, table = model.renderer.encode_text, model.llm.embedding.weight
    replies = [tuple(encode(f"This is {thing}.")) for thing in ("one", "two", "three")]
    spelled = spell_replies(model, replies, 2)
    for reply, rows in zip(replies, spelled, strict=True):
        own = [token for token in reply if sum(token in other for other in replies) == 1][:2]
        wanted = own + [reply[-1]] * (2 - len(own))
        torch.testing.assert_close(rows, table[torch.tensor(wanted)])


def test_prealignment_gives_every_reply_its_word(make_run, system_tree):
    run = make_run()
    model = models.build(_with_words(system_tree, 8), seed=0)
    choose_trainable(model, {"input_projections.image.classifier.*": 1e-3})
    items = list(render_all_items(model.renderer, open_sources(run.stage.data, "data")))
    options = PrealignConfig(steps=100, batch_size=4, learning_rate=1e-1)
    scores = prealign(model, items, FeatureCache(model), run.stage, options, progress=False)
    assert scores == {"input_projections.image": 1.0}


def test_too_few_words_are_refused(make_run, system_tree):
    run = make_run()
    model = models.build(_with_words(system_tree, 1), seed=0)
    choose_trainable(model, {"input_projections.image.*": 1e-3})
    items = list(render_all_items(model.renderer, open_sources(run.stage.data, "data")))
    with pytest.raises(ConfigError, match="words=1; raise it"):
        prealign(
            model, items, FeatureCache(model), run.stage, PrealignConfig(steps=1), progress=False
        )


def _with_words(tree: dict, words: int):
    kind = {"type": "words", "words": words, "num_tokens": 2}
    return config.parse_system(
        {**tree, "input_projections": {**tree["input_projections"], "image": kind}}
    )


@pytest.mark.parametrize("prealign", [None, {"steps": 1}])
def test_words_without_prealignment_are_warned_of(make_run, system_tree, caplog, prealign):
    run = make_run(steps=1, prealign=prealign, losses={"text": 1.0})
    trainer.train(replace(run, system=_with_words(system_tree, 64)))
    warned = [record for record in caplog.records if "without pre-alignment" in record.getMessage()]
    assert len(warned) == (0 if prealign else 1)
