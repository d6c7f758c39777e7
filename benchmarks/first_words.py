"""Time from a command to the first words of its reply: `mmllm chat PROMPT`, in a new process.

    python benchmarks/first_words.py                      # three runs of two prompts
    python benchmarks/first_words.py --runs 9 "hello"

Prints the median of wall clock and CPU time for each step of a new process: `import` (mmllm and
torch), `load` (as `mmllm.load`), `first word` (of `stream`). Wall clock needs an idle machine;
CPU time in units of `import torch`, the last column, hardly depends on it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

PROMPTS = ("hello", "draw a cat")
STEPS = ("import", "load", "first word")
TORCH = "import os, torch; times = os.times(); print(times.user + times.system)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("prompts", nargs="*", default=PROMPTS)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--child", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        reply(options.prompts[0], options.child)
        return
    write(f"{'prompt':12} {'step':12} {'wall s':>7} {'CPU s':>7} {'x import torch':>15}")
    for prompt in options.prompts:
        unit = statistics.median(float(run("-c", TORCH)) for _ in range(options.runs))
        runs = [measure(prompt) for _ in range(options.runs)]
        for step in (*STEPS, "all"):
            wall, cpu = (statistics.median(times[step][i] for times in runs) for i in range(2))
            write(f"{prompt:12} {step:12} {wall:7.2f} {cpu:7.2f} {cpu / unit:15.2f}")


def write(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def measure(prompt: str) -> dict[str, list[float]]:
    """Step -> seconds of wall clock and of CPU, in a new process."""
    return json.loads(run(__file__, "--child", str(time.time()), prompt))


def run(*arguments: str) -> str:
    """What a new Python prints on its last line."""
    command = [sys.executable, *arguments]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    return result.stdout.splitlines()[-1]


def reply(prompt: str, start: float) -> None:
    """Print the times of this process up to the first word of a reply, and end it."""
    marks = [(start, 0.0)]

    def mark() -> None:
        times = os.times()
        marks.append((time.time(), times.user + times.system))

    from mmllm.utils.garbage import no_collection

    with no_collection():  # as `mmllm.load` does
        from mmllm.inference.events import TextDelta
        from mmllm.inference.loading import load

        mark()
        chat = load("mini")
    mark()
    for event in chat.stream(prompt, seed=0):
        if isinstance(event, TextDelta):
            break
    mark()
    pairs = [*zip(STEPS, marks[:-1], marks[1:], strict=True), ("all", marks[0], marks[-1])]
    steps = {name: [now[i] - before[i] for i in range(2)] for name, before, now in pairs}
    write(json.dumps(steps))
    os._exit(0)


if __name__ == "__main__":
    main()
