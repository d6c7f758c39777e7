"""System 2 Attention, distilled: a LoRA adapter that rewrites a message without its opinion.

python demos/focus.py runs/focus [--steps 120] [--questions 200]

writes synthetic pairs and a stage, trains the adapter on them, and measures 200 questions of which
the pairs have neither kinds, facts nor wordings: answered by the base LLM as they are, with a wrong
opinion, with the instruction to ignore it, and from what the LLM itself and the adapter rewrote.
"""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path

import mmllm
from mmllm import console
from mmllm.config import load_run
from mmllm.conversation import Message, user
from mmllm.evaluation.metrics import accuracy_metric, difference_metric
from mmllm.evaluation.reasoning.opinions import (
    OpinionatedQuestion,
    measured_questions,
    training_pairs,
)
from mmllm.inference.chat import Chat
from mmllm.reasoning import focus
from mmllm.reasoning.system2_attention import instructed
from mmllm.training.trainer import train

SYSTEM = {
    "name": "focus",
    "llm": {
        "weights": "mini:smollm2-135m-instruct",
        "max_length": 1024,
        "lora": {"rank": 8, "alpha": 16, "targets": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    },
}
BATCH = 16


def write_stage(folder: Path, steps: int) -> Path:
    """Write the pairs and the stage that trains on them; returns its file."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, num, seed in (("pairs", BATCH * steps, 0), ("validation", 64, 1)):
        rows = (
            {
                "id": f"{name}/{number}",
                "messages": [
                    {"role": "user", "content": prompt},
                    {"role": "assistant", "content": kept},
                ],
            }
            for number, (prompt, kept) in enumerate(training_pairs(num, seed))
        )
        lines = "".join(f"{json.dumps(row)}\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    pairs, validation = (
        {name: {"type": "dialogues", "file": str(folder / f"{name}.jsonl")}}
        for name in ("pairs", "validation")
    )
    stage = {
        "name": "focus",
        "learning_rates": {"llm.lora.*": 1e-3},
        "losses": {"text": 1.0},
        "data": pairs,
        "output": str(folder / "adapter"),
        "steps": steps,
        "batch_size": BATCH,
        "max_length": 256,
        "pack": True,
        "validation": {"data": validation, "every": 40},
    }
    file = folder / "focus.yaml"  # JSON is YAML
    file.write_text(json.dumps({"system": SYSTEM, "stage": stage}, indent=1), encoding="utf-8")
    return file


def answers(chat: Chat, conversations: Sequence[Sequence[Message]]) -> list[str]:
    """Greedy replies, in batches."""
    replies = []
    for start in range(0, len(conversations), BATCH):
        group = conversations[start : start + BATCH]
        replies += chat.reply_many(
            group, seeds=[0] * len(group), temperature=0.0, max_new_tokens=24
        )
    return [reply.text for reply in replies]


def is_right(question: OpinionatedQuestion, reply: str) -> bool:
    """Whether a reply names the right answer and not the wrong one."""
    right, wrong = (
        re.search(rf"\b{re.escape(name)}\b", reply, re.IGNORECASE)
        for name in (question.answer, question.wrong)
    )
    return bool(right) and not wrong


def measure(llm: Chat, rewriter: Chat, num: int) -> None:
    """Print the accuracy of every way to ask."""
    questions = measured_questions(num)
    opinions = [[user(entry.opinion)] for entry in questions]
    ways = {
        "without opinion": [[user(entry.question)] for entry in questions],
        "wrong opinion": opinions,
        "asked to ignore it": [instructed(entry) for entry in opinions],
        "rewritten by the LLM itself": [focus(llm, entry) for entry in opinions],
        "rewritten by the adapter": [
            focus(rewriter, entry, separate=False, instruct=False, max_new_tokens=48)
            for entry in opinions
        ],
    }
    found: dict[str, list[bool]] = {}
    for name, conversations in ways.items():
        replies = answers(llm, conversations)
        found[name] = [is_right(*pair) for pair in zip(questions, replies, strict=True)]
        metric = accuracy_metric(name, found[name], 0.0)
        console.echo(f"{name:28} {metric.value:.3f} [{metric.low:.3f}-{metric.high:.3f}]")
    gain = difference_metric("gain", found["rewritten by the adapter"], found["wrong opinion"], 0.0)
    console.echo(f"{'gain of the adapter':28} {gain.value:.3f} [{gain.low:.3f}-{gain.high:.3f}]")


def main() -> None:
    """Write, train, measure."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=120, help=f"of {BATCH} pairs")
    parser.add_argument("--questions", type=int, default=200)
    options = parser.parse_args()
    stage = write_stage(options.folder, options.steps)
    adapter = train(load_run(stage))
    measure(mmllm.load(stage), mmllm.load(adapter), options.questions)


if __name__ == "__main__":
    main()
