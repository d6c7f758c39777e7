"""What a reply loads, and when."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys
import mmllm
from mmllm.inference.events import TextDelta

chat = mmllm.load("mini", device="cpu", dtype="float32")
modalities = dict.fromkeys(("image", "audio", "video"), "forbid")
reply = chat.reply("hello", seed=0, max_new_tokens=3, modalities=modalities)
assert reply.text and not any(True for e in chat.model.encoders.values() for _ in e.parameters())
print(*sys.modules, sep="\\n")
"""

UNUSED = {"bitsandbytes", "diffusers", "gradio", "matplotlib", "scipy.optimize", "timm"}


def test_a_reply_of_text_loads_no_library_of_media() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=True
    )
    loaded = set(done.stdout.splitlines())
    assert {"torch", "transformers", "peft"} <= loaded
    assert loaded & UNUSED == set()
