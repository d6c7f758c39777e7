"""Every family of language models on the second device: states and words of the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mmllm import config, model
from mmllm.conversation import assistant, user
from mmllm.data.batch import BatchLayout, collate
from mmllm.data.rendering import Rendered
from mmllm.features.cache import FeatureCache
from mmllm.inference.batching import generate
from mmllm.inference.outputs import GenerationOutput
from mmllm.inference.sampling import Sampling
from mmllm.model import AnyToAny
from tests.llm.families import FAMILIES, write
from tests.second_device import host_waits

TALK = [user("What is this?"), assistant("a red apple"), user("one  two\n three"), assistant("ten")]
OUTPUTS = {"image": 3, "audio": 2}
LEAN = {"llama3", "vicuna", "qwen3", "smollm"}
"""Those whose caches are read by mmllm.kernels.decoder_stack."""
Pair = tuple[str, AnyToAny, AnyToAny]


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    name = request.param
    folder = write(name, tmp_path_factory.mktemp(name), tied=False)
    tree = {"weights": str(folder), "max_length": 256, **FAMILIES[name].llm}

    def build(device: str) -> AnyToAny:
        whole = model.build(config.parse_system({"name": name, "llm": tree}), device=device)
        whole.llm.attach_lora()
        generator = torch.Generator().manual_seed(1)
        for _, weight in whole.llm.lora_parameters():
            noise = torch.randn(weight.shape, generator=generator) * 0.1
            weight.data.copy_(noise.to(weight.device))
        return whole.to(device).eval()

    return name, build("cpu"), build("second")


@pytest.fixture(autouse=True)
def _device(second: torch.device) -> None:
    return


def rendered(whole: AnyToAny, **options: Any) -> list[Rendered]:
    talks = (TALK[:3], TALK[:1]) if options else (TALK, [TALK[0], assistant("two")])
    return [whole.renderer.render(talk, **options) for talk in talks]


@torch.no_grad()
def test_states_padded_shared_and_packed_are_the_cpus(pair: Pair) -> None:
    _, here, there = pair
    items = rendered(here)
    for options in ({}, {"share": False}, {"pack": True}):
        if options.get("pack"):
            options = {**options, "share": here.llm.supports_prefix_packing}
        batch = collate(items, None, BatchLayout({}, {}), **options)
        wanted = here.hidden(batch).flatten(0, 1)[batch.target_indices]
        moved = batch.to("second")
        found = there.hidden(moved).flatten(0, 1)[moved.target_indices]
        torch.testing.assert_close(found.cpu(), wanted, atol=1e-4, rtol=1e-4)
        token_nll = there.llm.token_nll(found, moved.labels)
        torch.testing.assert_close(
            token_nll.cpu(), here.llm.token_nll(wanted, batch.labels), atol=1e-4, rtol=1e-4
        )


def answered(whole: AnyToAny, prompts: list[Rendered], **options: Any) -> list[GenerationOutput]:
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
    sampling = Sampling(max_new_tokens=8, **options)
    return generate(whole, prompts, FeatureCache(whole), sampling=sampling, generators=generators)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 1.0, "top_k": 40, "top_p": 0.9, "repetition_penalty": 1.3},
    ],
    ids=["greedy", "drawn"],
)
def test_generated_ids_single_and_batched_equal_the_cpus(
    pair: Pair, options: dict[str, Any]
) -> None:
    _, here, there = pair
    prompts = rendered(here, add_generation_prompt=True)
    for asked in (prompts, prompts[:1]):
        wanted, found = (answered(whole, asked, **options) for whole in (here, there))
        assert [answer.ids for answer in found] == [answer.ids for answer in wanted]
        assert all(answer.ids or answer.finish == "end" for answer in wanted)


def waits_per_token(do: Callable[[int], list[GenerationOutput]]) -> tuple[int, int]:
    """Host waits that 12 more tokens take, and how many steps that is."""
    counts, lengths = [], []
    for length in (4, 16):
        with host_waits() as waits:
            answers = do(length)
        counts.append(waits.total())
        lengths.append(max(len(answer.ids) for answer in answers))
    return counts[1] - counts[0], lengths[1] - lengths[0]


@pytest.mark.parametrize("rows", [1, 2])
def test_a_decoding_step_synchronises_once(
    pair: Pair, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For all of its rows. Where transformers computes the layers of a padded batch, it asks the
    device about the mask besides; that is still no more than once a word."""
    name, _, there = pair
    monkeypatch.setattr("mmllm.inference.sequence.SequenceState.constrain", _endless)
    asked = rendered(there, add_generation_prompt=True)[:rows]

    def do(length: int) -> list[GenerationOutput]:
        sampling = Sampling(
            max_new_tokens=length, temperature=1.0, repetition_penalty=1.2, num_draft_tokens=0
        )
        return generate(there, asked, FeatureCache(there), sampling=sampling)

    waits, steps = waits_per_token(do)
    assert steps == 12
    is_lean = name in LEAN and there.llm.kernels == "auto"
    assert waits == steps if is_lean or rows == 1 else waits <= rows * steps


def _endless(row: Any, logits: torch.Tensor) -> torch.Tensor:
    """No reply ends before its length."""
    logits = logits.clone()
    for end in row.end_ids:
        logits[end] = -torch.inf
    return logits
