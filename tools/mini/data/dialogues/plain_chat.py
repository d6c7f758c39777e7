"""Plain chat, answered by the base language model."""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tools.mini.data.dialogues.speaker import SYSTEM, Speaker
from tools.mini.data.dialogues.world import World

log = logging.getLogger(__name__)

MAX_NEW_TOKENS = 48


def plain_prompts(world: World, prompts: dict) -> dict[str, list[str]]:
    """What users say in rows without media: chat, and words about things that could be drawn."""
    texts_by_kind = {}
    for split, things, sounds in (("train", 1020, 540), ("validation", 9, 3)):
        speaker = Speaker(world, prompts, split, "describe")
        texts_by_kind[f"chat {split}"] = prompts["chat"][split]
        texts = [speaker.say("describe", speaker.pick("image")) for _ in range(things)]
        texts += [speaker.say("describe_sound", speaker.pick("audio")) for _ in range(sounds)]
        texts_by_kind[f"describe {split}"] = list(dict.fromkeys(texts))
    return texts_by_kind


def replies(texts: list[str], path: Path) -> dict[str, str]:
    """Text -> reply of the language model; those that `path` lacks are generated and added."""
    known = json.loads(path.read_text("utf-8")) if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    missing = sorted((text for text in set(texts) if text not in known), key=lambda t: (len(t), t))
    if missing:
        reply = _language_model()
        for start in range(0, len(missing), 128):
            batch = missing[start : start + 128]
            known |= dict(zip(batch, reply(batch), strict=True))
            path.write_text(json.dumps(known, ensure_ascii=False, indent=1), "utf-8")
            log.info("%d of %d replies", start + len(batch), len(missing))
    return known


def _language_model() -> Callable[[list[str]], list[str]]:
    """Texts -> greedy replies, cut at the last full sentence where they are too long."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from mmllm.mini.assets import fetch

    folder = fetch("smollm2-135m-instruct")
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")

    @torch.inference_mode()
    def reply(texts: list[str]) -> list[str]:
        turns = [
            [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]
            for text in texts
        ]
        batch = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        ids = model.generate(
            **batch,
            do_sample=False,
            max_new_tokens=MAX_NEW_TOKENS,
            eos_token_id=end,
            pad_token_id=tokenizer.pad_token_id,
        )[:, batch["input_ids"].shape[1] :]
        replies_ = tokenizer.batch_decode(ids, skip_special_tokens=True)
        ended = (ids == end).any(1).tolist()
        return [
            whole(text.strip(), complete) for text, complete in zip(replies_, ended, strict=True)
        ]

    return reply


def whole(text: str, complete: bool) -> str:
    """The text up to its last full sentence (all of it if the model came to an end)."""
    if complete:
        return text
    stops = list(re.finditer(r'(?<=[^\d\s])[.!?]["”)]?(?=\s|$)', text))
    return text[: stops[-1].end()] if stops else ""


def fit(reply: str, unseen: Callable[[str], list[str]]) -> bool:
    """Whether a reply may train: not empty, no loop, no held-out name, not like a medium's."""
    words = reply.lower().split()
    loops = repeats(words, 3) > 2 or repeats(words, 6) > 1
    lead = reply.startswith(("Here is", "Here are", "First ", "I drew", "I played", "I animated"))
    odd = "\ufffd" in reply or "<|" in reply
    return bool(words) and not (loops or lead or odd) and not unseen(reply)


def repeats(words: list[str], length: int) -> int:
    """How often the most frequent run of so many words occurs."""
    runs = Counter(tuple(words[i : i + length]) for i in range(len(words) - length + 1))
    return max(runs.values(), default=0)
