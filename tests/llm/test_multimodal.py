"""Vision-language, audio and omni models as the language model, on text: each against plain
transformers on the same tiny weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmllm import config, model, weights
from mmllm.conversation import assistant
from mmllm.data.batch import collate
from mmllm.errors import CheckpointError, ConfigError
from mmllm.features.cache import FeatureCache
from mmllm.inference.batching import generate
from mmllm.inference.sampling import Sampling
from mmllm.llm.export import merge_lora, save_transformers
from mmllm.model import AnyToAny
from tests.llm.helpers import (
    TALK,
    adapted,
    assert_rows_have_the_same_states,
    ids_of,
    logits_of,
    with_outputs,
)
from tests.llm.multimodal import FAMILIES, plain, write

HYBRIDS = [name for name, family in FAMILIES.items() if family.recurrent]
ATTENTION = [name for name in FAMILIES if name not in HYBRIDS]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("multimodal")

    def folder(name: str) -> Path:
        return root / name if (root / name).exists() else write(name, root / name)

    return folder


def joined(folder: Path, **changes: Any) -> AnyToAny:
    """A system of a language model alone."""
    tree = {"weights": str(folder), "max_length": 256, **changes}
    return model.build(config.parse_system({"name": "tiny", "llm": tree})).eval()


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_logits_are_those_of_plain_transformers_with_lora_at_zero(name, folders) -> None:
    llm, reference = with_outputs(folders(name)), plain(folders(name))
    llm.attach_lora()
    ids = ids_of(folders(name))
    wanted = reference(input_ids=ids).logits
    assert wanted.std() > 0.1
    torch.testing.assert_close(logits_of(llm, ids)[..., :-2], wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "o_proj"]], ids=["all", "some"])
def test_adapters_are_in_the_language_part_alone(name, targets, folders) -> None:
    llm = with_outputs(folders(name), lora={"rank": 2, "targets": targets})
    inside = {id(module) for module in llm.backbone.modules()}
    linear = {
        name
        for name, module in llm.base_model.named_modules()
        if isinstance(module, torch.nn.Linear) and id(module) in inside
    }
    if targets != "all-linear":
        linear = {name for name in linear if name.endswith(tuple(f".{t}" for t in targets))}
    llm.attach_lora()
    found = {
        name.removeprefix("base_model.model.").partition(".lora_")[0]
        for name, _ in llm.lora_parameters()
    }
    assert found == linear
    assert found


@pytest.mark.parametrize("name", ["qwen3_vl", "qwen3_vl_moe"])
def test_excluded_modules_of_the_config_stay_excluded(name, folders) -> None:
    for excluded in (["k_proj"], r".*\.k_proj"):
        options = {"exclude_modules": excluded}
        llm = with_outputs(folders(name), lora={"rank": 2, "options": options})
        llm.attach_lora()
        names = [name for name, _ in llm.lora_parameters()]
        assert any("q_proj" in name for name in names)
        assert not any("k_proj" in name or "visual" in name for name in names)


@pytest.mark.parametrize("name", ATTENTION)
@torch.no_grad()
def test_packed_padded_shared_and_single_rows_have_the_same_states(name, folders) -> None:
    whole = joined(folders(name))
    assert_rows_have_the_same_states(whole, (False, True))


@pytest.mark.parametrize("name", HYBRIDS)
@torch.no_grad()
def test_hybrids_are_padded_and_refuse_packs(name, folders) -> None:
    whole = joined(folders(name))
    items = [whole.renderer.render(talk) for talk in ([*TALK], [TALK[0], assistant("two")])]

    def states(batch: Any) -> Tensor:
        return whole.hidden(batch).flatten(0, 1)[batch.target_indices]

    layout = whole.batch_layout
    assert not layout.supports_prefix_packing
    single = torch.cat([states(collate([item], None, layout)) for item in items])
    padded = collate(items, None, layout)
    assert padded.prefix_len > 0
    torch.testing.assert_close(states(padded), single, atol=1e-4, rtol=1e-4)
    with pytest.raises(ConfigError, match=r"linear_attention.*stage\.pack to false"):
        states(collate(items, None, layout, pack=True, share=False))
    assert not whole.llm.supports_cache_crop
    windows = torch.randint(300, (3, 6))
    embeds = whole.llm.embed(windows)
    alone = torch.cat([whole.llm(row[None])[0] for row in embeds])
    torch.testing.assert_close(whole.llm.forward_windows(embeds), alone, atol=1e-4, rtol=1e-4)


def test_packs_without_sdpa_are_refused_for_models_with_towers(folders) -> None:
    whole = joined(folders("qwen2_5_vl"), attention="eager")
    items = [whole.renderer.render(TALK[:2])] * 2
    batch = collate(items, None, whole.batch_layout, pack=True, share=False)
    with pytest.raises(ConfigError, match=r"with llm\.attention sdpa only, got eager"):
        whole.hidden(batch)


@pytest.mark.parametrize("name", FAMILIES)
def test_generation_gives_the_ids_of_transformers(name, folders) -> None:
    whole, reference = joined(folders(name)), plain(folders(name))
    prompts = [
        whole.renderer.render(talk, add_generation_prompt=True) for talk in (TALK[:3], TALK[:1])
    ]
    sampling = Sampling(max_new_tokens=8)
    answers = generate(whole, prompts, FeatureCache(whole), sampling=sampling)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt.ids])
        wanted = reference.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=8,
            do_sample=False,
            pad_token_id=0,
        )[0, len(prompt.ids) :].tolist()
        assert answer.ids == [token for token in wanted if token not in whole.llm.end_ids]


@pytest.mark.usefixtures("auto_kernels")
@pytest.mark.parametrize("name", FAMILIES)
@torch.inference_mode()
def test_states_in_a_cache_are_those_without_one(name, folders) -> None:
    """Prefill, single steps and steps of several tokens; of rows of unequal length at first."""
    llm = adapted(with_outputs(folders(name))).eval()
    ids, short = ids_of(folders(name)), 5  # positions that the second row lacks
    length = ids.shape[1]
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[1, :short] = False
    positions = torch.stack([torch.arange(length), torch.arange(length) - short]).clamp_min(0)
    cache = llm.new_cache()
    family = FAMILIES[name]
    assert cache.croppable == llm.supports_cache_crop == (not family.recurrent | family.sliding)
    embeds = llm.embed(ids)
    found, start = [], 0
    for end in (length - 6, length - 5, length - 1, length):
        step = slice(start, end)
        found.append(
            llm(embeds[:, step], mask=mask[:, :end], positions=positions[:, step], cache=cache)
        )
        start = end
    states = torch.cat(found, dim=1)
    whole, rest = llm(embeds[:1])[0], llm(embeds[1:, short:])[0]
    torch.testing.assert_close(states[0], whole, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(states[1, short:], rest, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_an_export_is_the_whole_model_with_its_towers(name, folders, tmp_path) -> None:
    llm = adapted(with_outputs(folders(name)))
    ids = ids_of(folders(name))
    wanted = logits_of(llm, ids)[..., :-2]
    merge_lora(llm)
    save_transformers(llm, tmp_path)
    found = plain(tmp_path)
    torch.testing.assert_close(found(input_ids=ids).logits, wanted, atol=1e-3, rtol=1e-3)
    before, inside = plain(folders(name)), {id(p) for p in found.get_decoder().parameters()}
    towers = 0
    for (key, weight), old in zip(found.named_parameters(), before.parameters(), strict=True):
        if id(weight) not in inside and "lm_head" not in key:
            assert weight.equal(old), key
            towers += 1
    assert towers


@pytest.mark.parametrize("name", FAMILIES)
def test_shapes_are_read_from_the_config_alone(name, folders) -> None:
    tree = {"weights": str(folders(name))}
    tree = config.parse_component("llm", tree, "llm", default="causal_lm")
    with weights.skip_weights():
        described = config.build(tree)
    read = with_outputs(folders(name))
    assert described.embedding.weight.is_meta
    shapes = {name: p.shape for name, p in described.base_model.named_parameters()}
    assert shapes == {name: p.shape for name, p in read.base_model.named_parameters()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "clip"}, "it holds a model of type 'clip': expected a causal language"),
        ({"model_type": "t5gemma2"}, "an encoder and a decoder"),
        (
            {"model_type": "gemma3n"},
            r"layers read token ids besides embeddings \(per-layer embeddings\)",
        ),
    ],
)
def test_what_cannot_be_a_language_model_is_refused_by_name(changes, message, tmp_path) -> None:
    import json

    (tmp_path / "config.json").write_text(json.dumps(changes))
    tree = {"weights": str(tmp_path)}
    with (
        weights.skip_weights(),
        pytest.raises(CheckpointError, match=message),
    ):
        config.build(config.parse_component("llm", tree, "llm", default="causal_lm"))
