"""The text encoder: a small T5 over whole words that starts from word vectors.

Dimensions: T caption tokens, E width of the text encoder, V words.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertTokenizer,
)

TEXT_LENGTH = 24  # tokens of a caption; Wan and Stable Audio read the padding too, so it is fixed
TEXT_WIDTH = 128
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def vocabulary(texts: list[str], folder: Path, size: int) -> tuple[list[str], Tensor]:
    """Words with their vectors float[V, E]: those of the texts, endings, the encoder's 1,000 most
    frequent words, then those nearest in meaning to the texts' words. Others become [UNK]."""
    pieces = (folder / "vocab.txt").read_text(encoding="utf-8").split("\n")
    known = [piece for piece in pieces if re.fullmatch("[a-z]{2,}", piece)]
    words = list(dict.fromkeys(re.findall("[a-z]+|[0-9]+", " ".join(texts).lower())))
    candidates = list(dict.fromkeys(words + known))
    vectors = word_vectors(candidates, folder)
    nearness = (vectors[len(words) :] @ vectors[: len(words)].T).amax(dim=1)
    order = nearness.argsort(descending=True).tolist()
    near = [candidates[len(words) + place] for place in order]
    # No pieces of single letters: with them, a "cartoon" was read as a car and drawn as one.
    endings = ["s", "es", "ed", "ing", "er", "ly", "ness"]
    other = [*SPECIAL, *".,!?'\"-:;&()", *(f"##{ending}" for ending in endings)]
    chosen = list(dict.fromkeys([*other, *words, *known[:1000], *near]))[:size]
    # Half-whitened principal axes of the words; what is no word starts small and random.
    place = {word: index for index, word in enumerate(candidates)}
    rows = [place[word] for word in chosen if word in place]
    left, values, _ = torch.linalg.svd(vectors[rows] - vectors[rows].mean(0), full_matrices=False)
    reduced = left[:, :TEXT_WIDTH] * values[:TEXT_WIDTH].sqrt()
    table = 0.5 * torch.randn(len(chosen), TEXT_WIDTH)
    table[[word in place for word in chosen]] = reduced / reduced.std()
    return chosen, table


@torch.inference_mode()
def word_vectors(words: list[str], folder: Path) -> Tensor:
    """The sentence encoder's vectors of single words, float[V, 384], each of length 1."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoder = AutoModel.from_pretrained(folder).eval()
    rows = []
    for start in tqdm(range(0, len(words), 512), desc="word vectors"):
        inputs = tokenizer(words[start : start + 512], padding=True, return_tensors="pt")
        states, mask = encoder(**inputs).last_hidden_state, inputs.attention_mask[..., None]
        rows.append((states * mask).sum(1) / mask.sum(1))
    return functional.normalize(torch.cat(rows).float(), dim=-1)


def text_encoder(kind: type, config: type, texts: list[str], folder: Path, size: int):
    """A tokenizer over words and pieces, and a T5 that starts from word vectors."""
    words, vectors = vocabulary(texts, folder, size)
    tokenizer = BertTokenizer(
        vocab={word: index for index, word in enumerate(words)}, model_max_length=TEXT_LENGTH
    )
    encoder = kind(
        config(
            vocab_size=len(words),
            d_model=TEXT_WIDTH,
            d_kv=32,
            num_heads=4,
            d_ff=256,
            num_layers=2,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            is_encoder_decoder=False,
            use_cache=False,
            pad_token_id=0,
            eos_token_id=words.index("[SEP]"),
        )
    )
    encoder.shared.weight.data.copy_(vectors)
    # The layers start as the identity: each word is seen as itself before words are combined.
    for name, weight in encoder.named_parameters():
        if name.endswith(("SelfAttention.o.weight", "DenseReluDense.wo.weight")):
            nn.init.zeros_(weight)
    return tokenizer, encoder
