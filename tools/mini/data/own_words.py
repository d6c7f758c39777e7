"""Write `text/own_words.jsonl.gz`: plain text that the base language model makes up.

    python -m tools.mini.data.own_words    # about five minutes on two cores

The KL loss of stage 3 compares the adapted model with the base model on it: generated text needs
no other source, and cannot contain held-out text. Every text begins with one of FIRST_WORDS
and is sampled at temperature 1 from the whole vocabulary.
"""

from __future__ import annotations

import gzip
import json
import logging
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from mmllm import mini
from mmllm.mini.assets import fetch

OUT = mini.FOLDER / "data" / "text"
TOKENS = 176
SAMPLES = 4
FIRST_WORDS = """
The old house at the end of the lane
Once upon a time there was a
“Where are you going?” said
She looked at him and
It was a cold morning when
My dear friend,
He opened the door, and
In the middle of the night
“I don't know,” the boy answered,
At last they came to
The king and his daughter
Nobody in the village had ever
Call a function with
The following example shows
Returns a list of
To install the package, run
If the argument is omitted,
A class that
Changed in version
This module provides
Raises an error if
import os
def main(
The file is opened for
Note that the value
When an exception occurs,
In 1911, the city of
The river rises in
He was born in
The species is found in
According to the report,
The government announced on Monday
Scientists have discovered that
The battle began
The company was founded
Water boils at
In mathematics, a
The human heart
Light travels
Plants need
First, preheat the oven to
Cut the vegetables into
To change a tyre,
Dear Sir or Madam,
We are pleased to
The patient should
Section 3. The parties agree
Question: What is
Here are five tips for
There are several reasons why
On the other hand,
As a result,
The most important thing about
I have always thought that
We went to the market and
The train to the coast
When I was a child,
All day long the rain
Between the two mountains
For more than a hundred years
""".strip().splitlines()


@torch.inference_mode()
def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    folder = fetch("smollm2-135m-instruct")
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    torch.manual_seed(0)
    texts = []
    for start in tqdm(range(0, len(FIRST_WORDS), 10), unit="batch"):
        first_words = FIRST_WORDS[start : start + 10] * SAMPLES
        batch = tokenizer(first_words, return_tensors="pt", padding=True)
        ids = model.generate(
            **batch,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=TOKENS,
            pad_token_id=tokenizer.pad_token_id,
        )
        texts += tokenizer.batch_decode(ids, skip_special_tokens=True)
    rows = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    path = OUT / "own_words.jsonl.gz"
    path.write_bytes(gzip.compress(rows.encode(), mtime=0))
    logging.info("%d texts, %d bytes, %s", len(texts), path.stat().st_size, path)


if __name__ == "__main__":
    main()
