"""Input projections that spell: tokens of the LLM, read off by CTC."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from mmllm import config
from mmllm import model as models
from mmllm.config import PrealignConfig
from mmllm.errors import ConfigError
from mmllm.features.cache import FeatureCache
from mmllm.projections.ctc import CTCConfig, CTCProjection, build, places
from mmllm.training import trainer
from mmllm.training.feed import open_sources, render_all_items
from mmllm.training.prealign import prealign
from mmllm.training.trainable import choose_trainable

SMALL = {"num_tokens": 4, "steps": 6, "vocabulary": 5, "width": 8, "heads": 2, "layers": 1}


def projection() -> CTCProjection:
    torch.manual_seed(0)
    return build(CTCConfig(**SMALL), feature_shape=(3, 8), width=6, scale=0.5)


def test_what_repeats_counts_once_and_nothing_separates():
    path = torch.tensor([[0, 3, 3, 0, 3, 2], [1, 2, 3, 4, 5, 1], [0, 0, 0, 0, 0, 0]])
    assert places(path, 4).tolist() == [
        [4, 0, 4, 4, 1, 2],
        [0, 1, 2, 3, 4, 4],  # the last two are cut
        [4, 4, 4, 4, 4, 4],
    ]


def test_the_embeddings_are_those_of_what_is_spelled_then_the_rest(monkeypatch):
    found, embeddings = projection(), torch.randn(5, 6)
    found.set_vocabulary([11, 12, 13, 14, 15], embeddings)
    with torch.no_grad():
        found.rest.fill_(0.25)
    path = torch.tensor([[0, 3, 3, 0, 3, 2]])
    scores = 1e4 * torch.nn.functional.one_hot(path, 6).float()
    monkeypatch.setattr(found, "scores", lambda *_: scores)
    features = torch.randn(1, 3, 8)
    assert found.spell(features) == [(13, 13, 12)]
    tokens = found(features)[0]
    torch.testing.assert_close(tokens[:3], embeddings[[2, 2, 1]])
    torch.testing.assert_close(tokens[3], torch.full((6,), 0.25 * 0.5))


def test_the_classifier_has_a_gradient():
    found = projection()
    with torch.no_grad():
        found.classifier.bias[0] = -10.0  # something is spelled
    found(torch.randn(2, 3, 8)).square().sum().backward()
    assert found.classifier.weight.grad is not None
    assert found.classifier.weight.grad.abs().sum() > 0
    assert found.table.grad is not None


def test_one_by_one_is_as_in_a_batch_and_hidden_tokens_do_not_count():
    found, features = projection().eval(), torch.randn(3, 3, 8)
    alone = torch.cat([found(features[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(found(features), alone, rtol=0, atol=1e-4)
    mask = torch.tensor([[True, True, False]]).expand(3, -1)
    other = torch.where(mask[..., None], features, torch.randn(3, 3, 8))
    torch.testing.assert_close(found.scores(features, mask), found.scores(other, mask))


def test_the_loss_is_the_likelihood_of_all_ways_to_say_it():
    found, features = projection(), torch.randn(1, 3, 8)
    logs = found.scores(features).log_softmax(-1)[0].detach()
    paths = torch.cartesian_prod(*[torch.arange(3)] * 6)  # 0 is nothing, tokens 1 and 2
    spots = places(paths, 4)
    paths_of_it = [
        path for path, at in zip(paths, spots, strict=True) if path[at < 4].tolist() == [2, 1]
    ]
    total = torch.stack([logs[range(6), path].sum() for path in paths_of_it]).logsumexp(0)
    torch.testing.assert_close(found.loss(features, None, [[1, 0]]).detach(), -total / 2)


def with_ctc(tree: dict[str, Any], **options: Any) -> Any:
    kind = {"type": "ctc", **SMALL, "num_tokens": 8, "steps": 12, "vocabulary": 60, **options}
    return config.parse_system(
        {**tree, "input_projections": {**tree["input_projections"], "image": kind}}
    )


def aligned(
    make_run: Any, system: Any, trained: str = "input_projections.image.*", **options: Any
) -> tuple[Any, dict[str, float]]:
    run = make_run()
    model = models.build(system, seed=0)
    choose_trainable(model, {trained: 1e-2})
    items = list(render_all_items(model.renderer, open_sources(run.stage.data, "data")))
    fit = PrealignConfig(batch_size=4, learning_rate=1e-2, **options)
    return model, prealign(model, items, FeatureCache(model), run.stage, fit, progress=False)


def test_prealignment_learns_to_spell_the_replies(make_run, system_tree):
    model, scores = aligned(make_run, with_ctc(system_tree, width=32), steps=150)
    assert scores == {"input_projections.image": 1.0}
    ids = model.input_projections["image"].ids
    assert (ids >= 0).sum() > 2
    table = model.llm.embedding.weight[ids[:2].long()]
    own = model.input_projections["image"]
    torch.testing.assert_close(own.table[:2] * own.gain, table, rtol=0.5, atol=0.5)


def test_too_small_a_vocabulary_is_refused(make_run, system_tree):
    with pytest.raises(ConfigError, match=r"input_projections.image: .* need vocabulary=\d+"):
        aligned(make_run, with_ctc(system_tree, vocabulary=1), steps=1)


def test_prealignment_of_parameters_that_do_not_train_is_refused(make_run, system_tree):
    with pytest.raises(ConfigError, match=r"than table, .* name input_projections.image.\*"):
        aligned(make_run, with_ctc(system_tree), steps=1, trained="input_projections.image.table")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"heads": 3}, "not a multiple of heads"), ({"steps": 2}, "expected at least num_tokens")],
)
def test_settings_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        build(CTCConfig(**{**SMALL, **options}), feature_shape=(3, 8), width=6)


@pytest.mark.parametrize("prealign", [None, {"steps": 1}])
def test_without_prealignment_it_is_warned_of(make_run, system_tree, caplog, prealign):
    run = make_run(steps=1, prealign=prealign, losses={"text": 1.0})
    trainer.train(replace(run, system=with_ctc(system_tree)))
    warned = [record for record in caplog.records if "without pre-alignment" in record.getMessage()]
    assert len(warned) == (0 if prealign else 1)
