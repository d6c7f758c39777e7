"""The language model's own tower as an encoder: each family reads images as plain transformers
does, with its own processor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mmllm import checkpoints, config, model
from mmllm.conversation import Image, Message, Text, assistant, user
from mmllm.data.batch import collate
from mmllm.errors import ConfigError
from mmllm.features.cache import FeatureCache
from mmllm.inference.batching import generate
from mmllm.inference.prefix_cache import PrefixCache
from mmllm.inference.sampling import Sampling
from mmllm.model import AnyToAny
from tests.llm import multimodal
from tests.llm.multimodal import plain

IMAGES = {
    "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "qwen3_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "qwen3_vl_moe": "<|vision_start|><|image_pad|><|vision_end|>",
    "qwen3_5": "<|vision_start|><|image_pad|><|vision_end|>",
    "gemma3": "<start_of_image>",
    "internvl": "<IMG_CONTEXT>\n",
}
"""What the chat template of a family writes for an image."""
GRIDDED = [name for name in IMAGES if name.startswith("qwen")]
PACKED = [name for name in IMAGES if name not in ("gemma3", "qwen3_5")]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MAX_TOKENS = 24


def write(name: str, folder: Path) -> Path:
    """A model, its tokenizer and its processor."""
    import transformers
    from transformers import AutoTokenizer

    multimodal.write(name, folder)
    template = TEMPLATE.replace("IMAGE", IMAGES[name].replace("\n", "{{ '\n' }}"))
    names = {
        "image_token": "<image_soft_token>",
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<|video_pad|>",
    }
    if name.startswith("qwen"):
        names = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    tokenizer = AutoTokenizer.from_pretrained(folder, extra_special_tokens=names)
    tokenizer.chat_template = template
    if name.startswith("qwen"):
        sizes = {
            "patch_size": multimodal.PATCH,
            "merge_size": 2,
            "temporal_patch_size": 2,
            "size": {"shortest_edge": 8 * 8 * 2, "longest_edge": 8 * 8 * MAX_TOKENS},
        }
        kind = "Qwen2_5_VLProcessor" if name == "qwen2_5_vl" else "Qwen3VLProcessor"
        processor = getattr(transformers, kind)(
            transformers.Qwen2VLImageProcessor(**sizes),
            tokenizer,
            transformers.Qwen2VLVideoProcessor(**sizes),
            chat_template=template,
        )
    elif name == "gemma3":
        images = transformers.Gemma3ImageProcessor(size={"height": 16, "width": 16})
        processor = transformers.Gemma3Processor(
            images, tokenizer, chat_template=template, image_seq_length=4
        )
    else:
        images = transformers.GotOcr2ImageProcessor(
            size={"height": 16, "width": 16}, crop_to_patches=True, max_patches=4
        )
        processor = transformers.InternVLProcessor(
            images,
            tokenizer,
            transformers.InternVLVideoProcessor(),
            image_seq_length=4,
            chat_template=template,
        )
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("backbones")

    def folder(name: str) -> Path:
        return root / name if (root / name).exists() else write(name, root / name)

    return folder


def joined(folder: Path, **changes: Any) -> AnyToAny:
    """An untrained system that reads images by its language model's own tower."""
    tree = {
        "name": "tiny",
        "llm": {"weights": str(folder), "max_length": 512},
        "encoders": {"image": {"type": "backbone", "max_tokens": MAX_TOKENS}},
        "input_projections": {"image": {"type": "identity"}},
        **changes,
    }
    return model.build(config.parse_system(tree)).eval()


def image_of(height: int, width: int, seed: int = 0) -> Image:
    random = np.random.default_rng(seed)
    return Image.from_numpy(random.integers(0, 256, (height, width, 3), dtype=np.uint8))


def talks() -> list[list[Message]]:
    """Images of several sizes: first, in the middle, side by side, and in two turns."""
    wide, high, large = image_of(16, 40), image_of(33, 17, 1), image_of(90, 70, 2)
    return [
        [user(wide, "What is this?")],
        [user("one two ", high, " three")],
        [user("Here", wide, large), assistant("ten"), user(high, "What is this?")],
    ]


def reference_inputs(folder: Path, talk: Sequence[Message]) -> Any:
    """What transformers' own processor makes of a conversation, ready for a reply."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    messages = [
        {
            "role": message.role,
            "content": [
                {"type": "text", "text": part.text} if isinstance(part, Text) else {"type": "image"}
                for part in message.parts
            ],
        }
        for message in talk
    ]
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    images = [medium.to_pil() for message in talk for medium in message.media]
    return processor(text=[text], images=[images], return_tensors="pt")


def prompts_of(whole: AnyToAny) -> list[Any]:
    return [whole.renderer.render(talk, add_generation_prompt=True) for talk in talks()]


def states(whole: AnyToAny, items: Sequence[Any], **options: Any) -> list[Tensor]:
    """The hidden states float[T, D] of each item, of one batch."""
    features = FeatureCache(whole)
    batch = collate(items, features, whole.batch_layout, targets=False, **options)
    hidden = whole.hidden(batch)
    if not batch.seq_lens:
        return [hidden[row, : len(item)] for row, item in enumerate(items)]
    prefix, *parts = hidden[0].split([batch.prefix_len, *batch.seq_lens])
    return [torch.cat([prefix, part]) for part in parts[: len(items)]]


@pytest.mark.parametrize("name", IMAGES)
@torch.no_grad()
def test_an_image_is_read_as_by_plain_transformers(name, folders) -> None:
    whole, reference = joined(folders(name)), plain(folders(name))
    vocabulary = whole.llm.tokens.vocab_size
    for talk, prompt in zip(talks(), prompts_of(whole), strict=True):
        inputs = reference_inputs(folders(name), talk)
        ids = torch.tensor(prompt.ids)
        is_text = ids < vocabulary
        assert ids.shape == inputs["input_ids"][0].shape
        assert ids[is_text].equal(inputs["input_ids"][0][is_text])
        assert (~is_text).sum() > 0
        wanted = reference(**inputs).logits[0]
        found = whole.llm.head(states(whole, [prompt])[0])
        torch.testing.assert_close(found[:, :vocabulary], wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", GRIDDED)
def test_positions_are_those_of_the_models_own_rope_index(name, folders) -> None:
    whole, reference = joined(folders(name)), plain(folders(name))
    for talk, prompt in zip(talks(), prompts_of(whole), strict=True):
        inputs = reference_inputs(folders(name), talk)
        options = {key: value for key, value in inputs.items() if "pixel" not in key}
        wanted, _ = reference.model.get_rope_index(**options)
        batch = collate([prompt], FeatureCache(whole), whole.batch_layout, targets=False)
        assert batch.positions[0].T.equal(wanted[:, 0])


def test_positions_of_text_alone_have_one_axis(folders) -> None:
    whole = joined(folders("qwen3_vl"))
    prompt = whole.renderer.render([user("What is this?")], add_generation_prompt=True)
    batch = collate([prompt], FeatureCache(whole), whole.batch_layout, targets=False)
    assert batch.positions.equal(torch.arange(len(prompt))[None])


@pytest.mark.parametrize("name", IMAGES)
def test_replies_are_those_of_plain_transformers(name, folders) -> None:
    """In one batch, and a later turn behind what the prefix cache holds."""
    whole, reference = joined(folders(name)), plain(folders(name))
    prompts, features = prompts_of(whole), FeatureCache(whole)
    prefixes = PrefixCache()
    sampling = Sampling(max_new_tokens=6)
    wanted = []
    for talk in talks():
        inputs = reference_inputs(folders(name), talk)
        ids = reference.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=0)
        ids = ids[0, inputs["input_ids"].shape[1] :].tolist()
        wanted.append([token for token in ids if token not in whole.llm.end_ids])
    answers = generate(whole, prompts, features, sampling=sampling)
    assert [answer.ids for answer in answers] == wanted
    first = talks()[2][:1]
    generate(
        whole,
        [whole.renderer.render(first, add_generation_prompt=True)],
        features,
        sampling=sampling,
        prefix_cache=prefixes,
    )
    (answer,) = generate(whole, prompts[2:], features, sampling=sampling, prefix_cache=prefixes)
    assert answer.ids == wanted[2]
    is_kept = whole.llm.supports_cache_crop
    assert (answer.num_cached > len(whole.renderer.prefix_ids)) == is_kept


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("name", IMAGES)
@torch.no_grad()
def test_padded_and_packed_rows_have_the_states_of_single_ones(name, kernels, folders) -> None:
    whole = joined(folders(name), kernels=kernels)
    items = prompts_of(whole)
    single = [states(whole, [item])[0] for item in items]
    for found in states(whole, items), states(whole, items, share=False):
        for one, other in zip(found, single, strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    if name in PACKED:
        for share in (False, True):
            found = states(whole, items, pack=True, share=share)
            for one, other in zip(found, single, strict=True):
                torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    else:
        with pytest.raises(ConfigError, match=r"set stage\.pack to false"):
            states(whole, items, pack=True, share=False)


@pytest.mark.parametrize("name", ["qwen3_vl", "internvl"])
def test_the_weights_are_there_once_and_cached_features_are_the_same(name, folders) -> None:
    whole = joined(folders(name))
    alone = plain(folders(name))
    assert len({p.data_ptr() for p in whole.parameters() if p.numel()}) == len(
        {p.data_ptr() for p in alone.parameters()}
    )
    assert not list(whole.encoders.parameters())
    other = joined(folders(name))
    assert whole.encoders["image"].fingerprint == other.encoders["image"].fingerprint
    changed = joined(folders(name), encoders={"image": {"type": "backbone", "max_tokens": 20}})
    prints = {each.encoders["image"].fingerprint for each in (whole, changed)}
    assert len(prints) == 2


@pytest.mark.parametrize("name", ["qwen3_vl", "gemma3", "internvl"])
@torch.no_grad()
def test_a_checkpoint_reads_images_as_before_it_was_saved(name, folders, tmp_path) -> None:
    whole = joined(folders(name))
    whole.llm.attach_lora()
    for _, weight in whole.llm.lora_parameters():
        weight.normal_(std=0.1)
    (prompt,) = prompts_of(whole)[2:]
    wanted = states(whole, [prompt])[0]
    checkpoints.save(tmp_path / "saved", whole, step=1)
    saved = checkpoints.open_checkpoint(tmp_path / "saved")
    again = checkpoints.load_model(saved)
    torch.testing.assert_close(states(again, [prompt])[0], wanted, atol=1e-5, rtol=1e-5)
    checkpoints.merge(saved, tmp_path / "merged", dtype=torch.float32)
    moved = (tmp_path / "merged").rename(tmp_path / "moved")
    merged = checkpoints.load_model(checkpoints.open_checkpoint(moved))
    torch.testing.assert_close(states(merged, [prompt])[0], wanted, atol=1e-3, rtol=1e-3)


def test_trained_projections_read_its_features_too(folders) -> None:
    """One embedding for each token, or a fixed number without the template's text around them."""
    projections = ({"type": "linear"}, {"type": "resampler", "num_tokens": 3, "width": 32})
    for projection, is_framed in zip(projections, (True, False), strict=True):
        whole = joined(folders("internvl"), input_projections={"image": projection})
        (prompt,) = prompts_of(whole)[:1]
        words = [token for token in prompt.ids if token < whole.llm.tokens.vocab_size]
        text = whole.llm.tokenizer.decode(words)
        assert ("<img>" in text) == is_framed
        (span,) = prompt.inputs
        assert span.length == (4 * 4 if is_framed else 3)  # three tiles and the thumbnail
        hidden = states(whole, [prompt])[0]
        assert hidden.isfinite().all()


def test_what_has_no_known_tower_or_no_place_is_refused_by_name(folders, tmp_path) -> None:
    from tests.llm.families import write as write_text

    text = write_text("llama3", tmp_path / "text", tied=True)
    with pytest.raises(ConfigError, match="of type 'llama', whose own tower mmllm cannot use"):
        joined(text)
    few = {"image": {"type": "backbone", "max_tokens": 3}}
    with pytest.raises(ConfigError, match="an image of 'gemma3' takes 4 tokens, got 3"):
        joined(folders("gemma3"), encoders=few)


def test_its_fingerprint_is_that_of_the_first_release(folders) -> None:
    """It keys feature caches. It depends on the pinned version of transformers, whose config and
    processor are a part of what is hashed."""
    whole = joined(folders("qwen3_vl"))
    with torch.no_grad():
        for weight in whole.llm.base_model.parameters():
            weight.fill_(0.5)
    assert whole.encoders["image"].fingerprint == "27fa8338e70c8e58"


@pytest.mark.parametrize("name", ["qwen3_vl", "internvl"])
def test_an_image_keeps_to_its_own_budget(name: str, folders: Callable[[str], Path]) -> None:
    encoder = joined(folders(name)).encoders["image"]
    large = Image.from_numpy(np.zeros((64, 96, 3), np.uint8))
    media = [replace(large, max_tokens=most) for most in (4, 8, 12, 24)]
    counts = [encoder.layout[2](medium)[0] for medium in media]
    assert all(0 < count <= medium.max_tokens for count, medium in zip(counts, media, strict=True))
    assert counts[0] < counts[-1] == encoder.layout[2](large)[0]
    mask = encoder.encode([*media, large]).mask
    assert mask.sum(dim=1).tolist() == [*counts, counts[-1]]
