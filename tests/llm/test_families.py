"""Families of language models, each against plain transformers on the same tiny weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmllm import config, model
from mmllm.conversation import system
from mmllm.data.rendering import UNSUPERVISED
from mmllm.errors import ConfigError
from mmllm.features.cache import FeatureCache
from mmllm.inference.batching import generate
from mmllm.inference.sampling import Sampling
from mmllm.kernels.inference_layer import matmul
from mmllm.llm.templates import TEMPLATES
from mmllm.model import AnyToAny
from tests.llm.families import FAMILIES
from tests.llm.helpers import (
    OUTPUTS,
    TALK,
    assert_rows_have_the_same_states,
    ids_of,
    plain,
    with_outputs,
)


def joined(name: str, folder: Path, **changes: Any) -> AnyToAny:
    """A system of a language model alone."""
    tree = {"weights": str(folder), "max_length": 256, **FAMILIES[name].llm, **changes}
    return model.build(config.parse_system({"name": name, "llm": tree})).eval()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_logits_are_those_of_plain_transformers_with_lora_at_zero(name, tied, folders) -> None:
    folder = folders(name, tied)
    llm, reference = with_outputs(folder), plain(folder)
    llm.attach_lora()
    ids = ids_of(folder)
    wanted = reference(ids).logits
    found = llm.head(llm(llm.embed(ids)))
    assert found.shape[-1] == llm.tokens.vocab_size + len(OUTPUTS) == wanted.shape[-1] + 2
    torch.testing.assert_close(found[..., :-2], wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_signal_rows_are_as_large_as_embedded_words_and_have_their_logit(name, folders) -> None:
    folder = folders(name)
    llm, reference = with_outputs(folder), plain(folder)
    words = reference.get_input_embeddings()(ids_of(folder))
    assert llm.signal_embeddings.std() == pytest.approx(words.std().item(), rel=0.3)
    run = llm.tokens.signal_ids("audio")
    embeds = llm.embed(torch.tensor([[5, *run, llm.tokens.placeholder_id]]))[0]
    assert torch.equal(embeds[1:3], llm.signal_embeddings[3:5])
    assert torch.equal(embeds[3], torch.zeros(llm.width))
    # The logit of a row is that of a word whose row in the head is the same.
    hidden = llm(llm.embed(ids_of(folder)))
    llm.signal_head[1] = reference.get_output_embeddings().weight[7]
    logits = llm.head(hidden)
    torch.testing.assert_close(logits[..., llm.tokens.logit_index("audio")], logits[..., 7])


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_packed_padded_shared_and_single_rows_have_the_same_states(name, folders) -> None:
    whole = joined(name, folders(name))
    assert_rows_have_the_same_states(whole, {False, whole.llm.supports_prefix_packing})


@pytest.mark.parametrize("name", FAMILIES)
def test_generation_gives_the_ids_of_transformers(name, folders) -> None:
    whole, reference = joined(name, folders(name)), plain(folders(name))
    prompts = [
        whole.renderer.render(talk, add_generation_prompt=True) for talk in (TALK[:3], TALK[:1])
    ]
    sampling = Sampling(max_new_tokens=12)
    answers = generate(whole, prompts, FeatureCache(whole), sampling=sampling)
    for prompt, answer in zip(prompts, answers, strict=True):
        wanted = reference.generate(
            torch.tensor([prompt.ids]),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=sorted(whole.llm.end_ids),
            pad_token_id=0,
        )[0, len(prompt.ids) :].tolist()
        assert answer.ids == [token for token in wanted if token not in whole.llm.end_ids]


@pytest.mark.parametrize("name", FAMILIES)
def test_rendered_ids_are_those_of_the_whole_text(name, folders) -> None:
    """Pieces put together give what the tokenizer makes of the template's text in one go, and
    only replies with their end are learned."""
    whole = joined(name, folders(name))
    tokenizer, family = whole.llm.tokenizer, FAMILIES[name]
    for talk, add_generation_prompt in ((TALK, False), (TALK[:3], True), (TALK[:1], True)):
        rendered = whole.renderer.render(talk, add_generation_prompt=add_generation_prompt)
        text = tokenizer.apply_chat_template(
            [{"role": message.role, "content": message.text} for message in talk],
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            chat_template=family.template or TEMPLATES["vicuna"],
            **family.llm.get("template_options", {}),
        )
        wanted = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert rendered.ids == wanted, tokenizer.convert_ids_to_tokens(rendered.ids)
    labels = whole.renderer.render(TALK).labels
    learned = tokenizer.decode([label for label in labels if label != UNSUPERVISED])
    assert [part.strip() for part in learned.split(family.end)] == ["a red apple", "ten", ""]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_prompt_is_a_prefix_of_the_training_text(name, folders) -> None:
    """What the model reads before a reply is what stood before it in training."""
    renderer = joined(name, folders(name)).renderer
    prompt = renderer.render(TALK[:1], add_generation_prompt=True)
    assert renderer.render(TALK[:2]).ids[: len(prompt)] == prompt.ids


@pytest.mark.parametrize("name", FAMILIES)
def test_a_system_message_is_rendered_in_every_family(name, folders) -> None:
    """Mistral's template refuses the role: the words then open the first turn."""
    whole = joined(name, folders(name))
    rendered = whole.renderer.render([system("Be brief."), *TALK[:1]], add_generation_prompt=True)
    text = whole.llm.tokenizer.decode(rendered.ids)
    assert text.index("Be brief.") < text.index("What is this?")


def test_a_tokenizer_without_a_template_is_rendered_plainly_and_says_so(folders, caplog) -> None:
    whole = joined("vicuna", folders("vicuna"), chat_template=None)
    assert "brings no chat template: 'plain' is used" in caplog.text
    text = whole.llm.tokenizer.decode(whole.renderer.render(TALK[:2]).ids)
    assert text.replace("<s> ", "<s>") == "<s>user: What is this?\nassistant: a red apple</s>\n"


def test_a_custom_template_is_a_file(folders, tmp_path: Path) -> None:
    file = tmp_path / "own.jinja"
    file.write_text(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    )
    whole = joined("llama3", folders("llama3"), chat_template=str(file))
    ids = whole.renderer.render(TALK[:2]).ids
    assert whole.llm.tokenizer.decode(ids) == (
        "<user>What is this?<|eot_id|><assistant>a red apple<|eot_id|>"
    )
    for wrong, message in (
        ("vicunna", "expected plain, vicuna or a"),
        ("no.jinja", "cannot be read"),
    ):
        with pytest.raises(ConfigError, match=message):
            joined("llama3", folders("llama3"), chat_template=wrong)


def test_a_template_that_leaves_messages_out_is_refused(folders, tmp_path: Path) -> None:
    file = tmp_path / "last.jinja"
    file.write_text("{{ messages[-1]['content'] }}{{ eos_token }}")
    whole = joined("llama3", folders("llama3"), chat_template=str(file))
    with pytest.raises(ConfigError, match="writes 1 of 4 messages"):
        whole.renderer.render(TALK)


def test_a_family_that_treats_its_logits_unlike_others_is_refused(folders, monkeypatch) -> None:
    from transformers import LlamaForCausalLM

    forward = LlamaForCausalLM.forward

    def halved(self: Any, *arguments: Any, **options: Any) -> Any:
        output = forward(self, *arguments, **options)
        output.logits = output.logits / 2
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", halved)
    with pytest.raises(ConfigError, match="'llama' treats its logits in a way"):
        with_outputs(folders("llama3"))


@pytest.mark.usefixtures("auto_kernels")
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("adapted", [False, True])
@torch.inference_mode()
def test_states_in_a_cache_are_those_without_one(name, adapted, folders) -> None:
    """Prefill, single steps and steps of several tokens, of rows of unequal length, by the lean
    stack where the family is one that it knows."""
    llm = with_outputs(folders(name))
    if adapted:
        llm.attach_lora()
        for parameter in dict(llm.lora_parameters()).values():
            parameter.normal_(std=0.3)
    llm.eval()
    ids, short = ids_of(folders(name)), 5  # positions that the second row lacks
    length = ids.shape[1]
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[1, :short] = False
    positions = torch.stack([torch.arange(length), torch.arange(length) - short]).clamp_min(0)
    cache = llm.new_cache()
    assert (cache.stack is not None) == (name in ("llama3", "vicuna", "qwen3", "smollm"))
    assert cache.croppable == (name not in ("mistral", "gemma3"))
    embeds = llm.embed(ids)
    found, start = [], 0
    for end in (length - 8, length - 7, length - 6, length - 2, length):
        step = slice(start, end)
        found.append(
            llm(embeds[:, step], mask=mask[:, :end], positions=positions[:, step], cache=cache)
        )
        start = end
    states = torch.cat(found, dim=1)
    whole, rest = llm(embeds[:1])[0], llm(embeds[1:, short:])[0]
    torch.testing.assert_close(states[0], whole, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(states[1, short:], rest, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rows", [1, 6, 7, 15, 16])
def test_a_product_of_any_number_of_rows_is_the_plain_one(rows) -> None:
    x, weight, onto = torch.randn(rows, 9), torch.randn(9, 5), torch.randn(rows, 5)
    before = onto.clone()
    torch.testing.assert_close(matmul(x, weight), x @ weight)
    torch.testing.assert_close(matmul(x, weight, onto), x @ weight + before)
    assert onto.equal(before)


@pytest.mark.usefixtures("auto_kernels")
@pytest.mark.parametrize("name", ["llama3", "qwen3", "smollm"])
@torch.no_grad()
def test_fused_products_follow_the_weights(name, folders) -> None:
    """Of weights that do not train, queries, keys and values are one product, adapters merged."""
    torch.manual_seed(0)
    llm = with_outputs(folders(name))
    llm.attach_lora()
    for parameter in dict(llm.lora_parameters()).values():
        parameter.normal_(std=0.3)
    llm.requires_grad_(False).eval()
    ids = ids_of(folders(name))[:1]

    def states() -> Tensor:
        """As one forward gives them, after a prefill and single steps gave the same."""
        embeds, length = llm.embed(ids), ids.shape[1]
        cache, found = llm.new_cache(), []
        for begin, end in ((0, length - 3), *((at, at + 1) for at in range(length - 3, length))):
            places = torch.arange(begin, end)[None]
            found.append(llm(embeds[:, begin:end], positions=places, cache=cache))
        assert type(cache.stack.layers[0].qkv_proj).__name__ == "InferenceLinear"
        whole = llm(embeds)
        torch.testing.assert_close(torch.cat(found, dim=1), whole, atol=1e-4, rtol=1e-4)
        return whole

    first = states()
    assert states().equal(first)
    for parameter in dict(llm.lora_parameters()).values():
        parameter.mul_(1.5)
    second = states()
    with llm.adapters_disabled():
        third = states()
    llm.backbone.layers[0].self_attn.k_proj.base_layer.weight.mul_(1.5)
    fourth = states()
    for one, other in ((first, second), (second, third), (third, fourth), (second, fourth)):
        assert not one.allclose(other, atol=1e-2)


@pytest.mark.usefixtures("auto_kernels")
@torch.inference_mode()
def test_unsupported_layers_run_unchanged(folders) -> None:
    folder = folders("smollm")
    assert with_outputs(folder, attention="eager").new_cache().stack is None
    dora = with_outputs(folder, lora={"rank": 2, "options": {"use_dora": True}})
    assert dora.new_cache().stack is not None
    dora.attach_lora()
    assert dora.new_cache().stack is None
    hooked = with_outputs(folder)
    hooked.model.model.layers[1].register_forward_hook(lambda *_: None)
    assert hooked.new_cache().stack is None
