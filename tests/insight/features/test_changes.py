"""What adapters changed of features, against the whole matrix and against plain transformers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mmllm.errors import ConfigError
from mmllm.insight.dictionary.autoencoder import Origin, SparseAutoencoder
from mmllm.insight.features.changes import feature_changes
from mmllm.insight.features.page import FeatureCard, features_html
from mmllm.model import AnyToAny
from tests.insight.studies import a_study, measured


def test_the_features_that_change_most_come_first() -> None:
    activity, values = measured()
    after, dictionary = activity.acts, activity_dictionary()
    states = after.states.clone()
    states[:, 3] -= 2
    states[after.kinds == 1, 2] += 1
    before = replace(after, states=states)
    first, second = feature_changes(dictionary, before, after, num=2)
    assert (first.feature, second.feature) == (3, 2)
    own, other = values[:, 3], dictionary.encode(states)[:, 3]
    is_text = after.kinds == 0
    assert first.density["text"] == pytest.approx(
        ((other[is_text] > 0).float().mean().item(), (own[is_text] > 0).float().mean().item())
    )
    assert first.activation["text"] == pytest.approx(
        (other[is_text].mean().item(), own[is_text].mean().item())
    )
    assert second.activation["text"][0] == second.activation["text"][1]
    assert second.activation["image"][0] > second.activation["image"][1]
    assert str(second).startswith("feature 2: active at text ")


def activity_dictionary() -> SparseAutoencoder:
    dictionary = SparseAutoencoder(4, 4, Origin("m", "layers.1", "layers.1"))
    dictionary.W_enc.copy_(torch.eye(4))
    dictionary.W_dec.copy_(torch.eye(4))
    dictionary.threshold.fill_(0.3)
    return dictionary


def test_the_base_is_the_model_without_its_adapters(tiny_model: AnyToAny, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tiny has no adapters"):
        a_study(tiny_model, tmp_path).base_activations  # noqa: B018
    before = a_study(tiny_model, tmp_path).activations
    tiny_model.llm.attach_lora()
    with torch.no_grad():
        for name, parameter in tiny_model.llm.lora_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    study = a_study(tiny_model, tmp_path)
    assert torch.equal(study.base_activations.states, before.states)
    assert torch.equal(study.base_activations.positions, study.activations.positions)
    assert not torch.allclose(study.activations.states, before.states, atol=0.1)
    changes = feature_changes(study.dictionary, before, study.activations, num=48)
    sizes = [change.size for change in changes]
    assert len(sizes) == 48
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > 0


def test_a_page_shows_what_changed() -> None:
    activity, _ = measured()
    states = activity.acts.states + 1
    changes = feature_changes(
        activity_dictionary(), activity.acts, replace(activity.acts, states=states), num=1
    )
    card = FeatureCard(feature=changes[0].feature, title="a <cat>", density=0.1, by_kind={})
    page = features_html("Features", [card], changes=changes)
    assert "What the adapters changed" in page
    assert f'<a href="#f{card.feature}">a &lt;cat&gt;</a>' in page
    before, after = changes[0].density["text"]
    assert f"{100 * before:.2g} % → {100 * after:.2g} %" in page
    assert "What the adapters changed" not in features_html("Features", [card])
