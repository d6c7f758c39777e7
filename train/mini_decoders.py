"""Trains the decoders that ship with mini: captions -> pictures, clips and sounds.

    python train/mini_codec.py --out runs/decoders/codec
    python train/mini_decoders.py image --words FOLDER --codec runs/decoders/codec \\
        --minutes 60 --run runs/decoders/image
    python train/mini_decoders.py image --resume --run runs/decoders/image
    python train/mini_decoders.py image --ship mmllm/mini/decoders/image --run runs/decoders/image

Each decoder is a standard diffusers pipeline: a small DiT denoises latents (of an autoencoder of
pictures, or stacked log-mel frames), and a small T5 trained with it reads the caption. Targets are
clean samples (Li & He 2025, "Back to basics") on the straight path x_s = (1 - s) x_0 + s n (Lipman
et al. 2023), with the error weighted as a velocity; the sampler is DPM-Solver++ (Lu et al. 2022).

Word vectors start from those of a sentence encoder (`--words`: an unpacked all-MiniLM-L6-v2),
reduced to the width of the T5. They learn five times faster than the rest: frozen, they left the
caption without effect for thousands of steps.

Dimensions: B samples, T caption tokens, E width of the text encoder, N items, S latent shape.
"""

import argparse
import functools
import json
import logging
import math
import random
import re
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import soundfile
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    StableAudioDiTModel,
    StableAudioPipeline,
    StableAudioProjectionModel,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from mini_codec import frames_of
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertTokenizer,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from mmllm.data.sources import read_text
from mmllm.mini.codecs import ClipAutoencoder, MelAutoencoder

logger = logging.getLogger("mini_decoders")

DATA = Path(__file__).parents[1] / "mmllm" / "mini" / "data"
TEXT_LENGTH = 24  # tokens of a caption; Wan and Stable Audio read the padding too, so it is fixed
TEXT_WIDTH = 128
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


# ---------------------------------------------------------------------------- captions and words


@dataclass(frozen=True)
class Captions:
    """What concepts are called: phrasings with slots, and per concept what fills them.

    Slots are {caption}, and for sounds also {label} and {thing}; a concept has one filling for its
    canonical name and one for each training synonym.
    """

    train: list[str]
    heldout: list[str]
    names: list[list[dict[str, str]]]

    def draw(self, concept: int, rng: random.Random) -> str:
        """One training caption: often plain, and under the canonical name."""
        names = self.names[concept]
        name = names[0] if rng.random() < 0.5 else rng.choice(names)
        phrasing = self.train[0] if rng.random() < 0.4 else rng.choice(self.train)
        if rng.random() < 0.35:  # words that it does not know, which must do no harm
            words = [
                "[UNK]" if "{" not in word and rng.random() < 0.5 else word
                for word in phrasing.split()
            ]
            around = ["[UNK]"] * rng.randrange(3), ["[UNK]"] * rng.randrange(4)
            phrasing = " ".join([*around[0], *words, *around[1]])
        return phrasing.format(**name)

    def test(self, concept: int, index: int) -> str:
        """The canonical name in one of the phrasings that training never sees."""
        return self.heldout[index % len(self.heldout)].format(**self.names[concept][0])

    def texts(self) -> list[str]:
        """Everything that a training caption is made of."""
        return self.train + [
            text for names in self.names for name in names for text in name.values()
        ]


def with_article(name: str, like: str) -> str:
    """A synonym as a noun phrase like the canonical one: 'puppy', 'a dog' -> 'a puppy'."""
    first = like.split()[0]
    if first == "the":
        return f"the {name}"
    if first not in ("a", "an", "some"):
        return name
    if first == "some" and name.endswith("s"):
        return f"some {name}"
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def names_of(concept: dict) -> list[dict[str, str]]:
    """The fillings of a row of concepts.json or sounds.json."""
    thing = concept.get("thing", concept["caption"])
    things = [thing] + [with_article(name, thing) for name in concept["synonyms"]]
    labels = [concept["label"], *concept["synonyms"]]
    return [
        {"label": label, "thing": other, "caption": concept["caption"].replace(thing, other)}
        for label, other in zip(labels, things, strict=True)
    ]


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


# ------------------------------------------------------------------- the table of three decoders


TEXT_PATH = r"caption_projection|text_embedder|cross_attention_proj|attn2\.(to_v|to_out)"


def open_text_path(transformer: nn.Module, gain: float) -> nn.Module:
    """Lets the caption be heard from the first step on.

    As diffusers initialises them, these layers pass on a thousandth of what two captions differ in:
    after 1,400 steps of 32 pictures the caption still made no difference.
    """
    for name, layer in transformer.named_modules():
        if isinstance(layer, nn.Linear) and re.search(TEXT_PATH, name):
            nn.init.normal_(layer.weight, std=gain / math.sqrt(layer.in_features))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return transformer


def scheduler(shift: float) -> DPMSolverMultistepScheduler:
    return DPMSolverMultistepScheduler(
        prediction_type="sample", use_flow_sigmas=True, flow_shift=shift, final_sigmas_type="zero"
    )


def picture_pipeline(texts: list[str], folder: Path, codec: Path) -> PixArtAlphaPipeline:
    vae = AutoencoderKL.from_pretrained(codec)
    tokenizer, encoder = text_encoder(T5EncoderModel, T5Config, texts, folder, 2600)
    transformer = PixArtTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=48,
        in_channels=vae.config.latent_channels,
        out_channels=vae.config.latent_channels,
        num_layers=5,
        cross_attention_dim=192,
        sample_size=8,
        patch_size=2,
        caption_channels=TEXT_WIDTH,
    )
    return PixArtAlphaPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=vae,
        transformer=open_text_path(transformer, 1.0),
        scheduler=scheduler(1.0),
    )


def clip_pipeline(texts: list[str], folder: Path, codec: Path) -> WanPipeline:
    vae = ClipAutoencoder.around(AutoencoderKL.from_pretrained(codec))
    tokenizer, encoder = text_encoder(UMT5EncoderModel, UMT5Config, texts, folder, 1600)
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=6,
        attention_head_dim=32,
        in_channels=vae.config.z_dim,
        out_channels=vae.config.z_dim,
        text_dim=TEXT_WIDTH,
        ffn_dim=576,
        num_layers=5,
        rope_max_seq_len=32,
    )
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=vae,
        transformer=open_text_path(transformer, 1.2),
        scheduler=scheduler(2.0),
    )


def sound_pipeline(texts: list[str], folder: Path, _: Path | None) -> StableAudioPipeline:
    tokenizer, encoder = text_encoder(T5EncoderModel, T5Config, texts, folder, 1600)
    codec = MelAutoencoder()
    channels = codec.config.n_mels * codec.config.frames_per_token
    transformer = StableAudioDiTModel(
        sample_size=64,
        in_channels=channels,
        out_channels=channels,
        num_layers=4,
        attention_head_dim=32,
        num_attention_heads=5,
        num_key_value_attention_heads=5,
        cross_attention_dim=160,
        cross_attention_input_dim=TEXT_WIDTH,
        global_states_input_dim=2 * TEXT_WIDTH,
        time_proj_dim=128,
    )
    # The class expects times of 0..1; this pipeline's scheduler counts to 1000.
    frequencies = torch.logspace(-1, 1.2, 64) / 1000
    transformer.time_proj.weight.data.copy_(frequencies.half())  # as it is shipped
    return StableAudioPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        projection_model=StableAudioProjectionModel(TEXT_WIDTH, TEXT_WIDTH, 0, 4),
        vae=codec,
        transformer=open_text_path(transformer, 1.2),
        scheduler=scheduler(1.0),
    )


def denoise_picture(pipe, noisy: Tensor, times: Tensor, text: "Text") -> Tensor:
    return pipe.transformer(
        noisy,
        encoder_hidden_states=text.states,
        encoder_attention_mask=text.mask,
        timestep=times,
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        return_dict=False,
    )[0]


def denoise_clip(pipe, noisy: Tensor, times: Tensor, text: "Text") -> Tensor:
    states = text.states * text.mask[..., None]  # Wan pads with zeros and masks nothing
    return pipe.transformer(noisy, times, states, return_dict=False)[0]


def denoise_sound(pipe, noisy: Tensor, times: Tensor, text: "Text") -> Tensor:
    size = len(noisy)
    seconds = noisy.shape[-1] * pipe.vae.hop_length / pipe.vae.sampling_rate
    projected = pipe.projection_model(text.states, torch.zeros(size), torch.full((size,), seconds))
    start, end = projected.seconds_start_hidden_states, projected.seconds_end_hidden_states
    words = projected.text_hidden_states * text.mask[..., None]
    # Without a caption this pipeline zeroes the whole sequence, durations included.
    condition = torch.cat([words, start, end], dim=1) * ~text.empty[:, None, None]
    rotary = get_1d_rotary_pos_embed(
        pipe.rotary_embed_dim, noisy.shape[-1] + 1, use_real=True, repeat_interleave_real=False
    )
    return pipe.transformer(
        noisy,
        times,
        encoder_hidden_states=condition,
        global_hidden_states=torch.cat([start, end], dim=2),
        rotary_embedding=rotary,
        return_dict=False,
    )[0]


def read_picture(path: Path) -> Tensor:
    """uint8[3, 64, 64]."""
    return frames_of(path)[:, 0]


def read_sound(path: Path) -> Tensor:
    """float[1, 32768] at 16 kHz, cut or padded with silence."""
    wave, rate = soundfile.read(path, dtype="float32", always_2d=True)
    if rate != 16_000:
        raise ValueError(f"{path} is sampled at {rate} Hz; 16,000 expected: resample it first")
    wave = torch.from_numpy(wave.mean(axis=1))[None, :32_768]
    return functional.pad(wave, (0, 32_768 - wave.shape[-1]))


def vary_sounds(samples: Tensor, generator: torch.Generator) -> Tensor:
    """float[B, 1, N] -> the same, up to 20 ms later and 3 dB louder or softer."""
    draw = torch.rand(len(samples), 2, generator=generator)
    gains = 10 ** ((draw[:, 0] * 6 - 3) / 20)
    moved = [
        functional.pad(wave, (int(delay * 320), 0))[..., : wave.shape[-1]]
        for wave, delay in zip(samples, draw[:, 1], strict=True)
    ]
    return torch.stack(moved) * gains[:, None, None]


@dataclass(frozen=True)
class Decoder:
    """One row of the table: all that differs between the three trainings."""

    build: Callable[[list[str], Path, Path | None], DiffusionPipeline]
    denoise: Callable[..., Tensor]  # (pipe, noisy, times, text) -> clean
    read: Callable[[Path], Tensor]
    scale: Callable[[nn.Module], float]  # of latents, from the codec's config
    output: str  # the field of the pipeline's result
    call: dict  # what the pipeline is called with beside the captions
    vary: Callable[[Tensor, torch.Generator], Tensor] | None = None
    batch: int = 32
    steps: int = 100_000
    learning_rate: float = 1e-3
    # Mean of logit(s) at the start and at the end, and its spread: what is drawn is decided at high
    # noise, by the caption alone, so that is learned first.
    noise: tuple[float, float, float] = (1.0, 0.2, 1.2)


DECODERS = {
    "image": Decoder(
        build=picture_pipeline,
        denoise=denoise_picture,
        read=read_picture,
        scale=lambda vae: vae.config.scaling_factor,
        output="images",
        call={
            "height": 64,
            "width": 64,
            "num_inference_steps": 20,
            "guidance_scale": 3.0,
            "use_resolution_binning": False,
            "clean_caption": False,
            "max_sequence_length": TEXT_LENGTH,
        },
        batch=64,
    ),
    "video": Decoder(
        build=clip_pipeline,
        denoise=denoise_clip,
        read=frames_of,
        scale=lambda vae: 1 / vae.config.latents_std[0],
        output="frames",
        call={
            "height": 64,
            "width": 64,
            "num_frames": 9,
            "num_inference_steps": 20,
            "guidance_scale": 3.0,
            "max_sequence_length": TEXT_LENGTH,
        },
        noise=(1.5, 0.6, 1.2),  # nine alike frames hide noise from each other
    ),
    "audio": Decoder(
        build=sound_pipeline,
        denoise=denoise_sound,
        read=read_sound,
        scale=lambda vae: 1.0,
        vary=vary_sounds,
        output="audios",
        call={"num_inference_steps": 20, "guidance_scale": 3.0},
        noise=(2.0, 0.9, 1.2),
    ),
}


# -------------------------------------------------------------------------------- data and steps


@dataclass(frozen=True)
class Items:
    """Training items of one modality, decoded, in memory."""

    samples: Tensor  # [N, ...] as `read` gives them
    concepts: list[int]  # per item: its index among `labels`
    labels: list[str]
    captions: Captions


def read_items(data: Path, modality: str, read: Callable[[Path], Tensor]) -> Items:
    """The training split of one modality; pictures in the 3-D style only."""
    concepts = json.loads((data / "concepts.json").read_text(encoding="utf-8"))
    items = json.loads(read_text(data / "items.json.gz"))
    phrasings = json.loads((data / "captions.json").read_text(encoding="utf-8"))
    if modality == "audio":
        sounds = json.loads(read_text(data / "sounds.json.gz"))
        concepts, items = sounds["concepts"], sounds["items"]
        phrasings = {"audio": sounds["captions"]}
    by_id = {concept["id"]: concept for concept in concepts}
    chosen = [
        item
        for item in items
        if item.get("modality", "audio") == modality
        and item["split"] == "train"
        and (modality != "image" or item["style"] == "fluent-3d")
        and by_id[item["concept"]].get("split", "train") == "train"
    ]
    if not chosen:
        raise ValueError(f"{data} lists no training item of modality {modality}")
    order = list(dict.fromkeys(item["concept"] for item in chosen))
    names = [names_of(by_id[name]) for name in order]
    captions = Captions(phrasings[modality]["train"], phrasings[modality]["heldout"], names)
    samples = torch.stack([read(data / item["file"]) for item in tqdm(chosen, desc="reading")])
    index = {name: position for position, name in enumerate(order)}
    labels = [by_id[name]["label"] for name in order]
    return Items(samples, [index[item["concept"]] for item in chosen], labels, captions)


@dataclass(frozen=True)
class Text:
    """Captions as a denoiser reads them."""

    states: Tensor  # float[B, T, E]
    mask: Tensor  # [B, T], 1 at words
    empty: Tensor  # bool[B], captions left out for guidance


def read_captions(pipe: DiffusionPipeline, captions: list[str]) -> Text:
    inputs = pipe.tokenizer(
        captions,
        padding="max_length",
        max_length=TEXT_LENGTH,
        truncation=True,
        return_tensors="pt",
    )
    states = pipe.text_encoder(inputs.input_ids, attention_mask=inputs.attention_mask)[0]
    empty = torch.tensor([not caption for caption in captions])
    return Text(states, inputs.attention_mask.to(states.dtype), empty)


def training_batch(
    row: Decoder, items: Items, step: int, seed: int
) -> tuple[list[int], list[str], torch.Generator]:
    """Positions of B items and their captions for one step: a pure function of (seed, step)."""
    rng = random.Random(f"{seed}/{step}")
    generator = torch.Generator().manual_seed(rng.getrandbits(60))
    takes: dict[int, list[int]] = {}
    for position, concept in enumerate(items.concepts):
        takes.setdefault(concept, []).append(position)
    # Every concept equally often, in a new order for each epoch; a take of it at random.
    concepts = []
    for position in range(step * row.batch, (step + 1) * row.batch):
        epoch, place = divmod(position, len(takes))
        concepts.append(epoch_order(len(takes), epoch, seed)[place])
    chosen = [rng.choice(takes[concept]) for concept in concepts]
    captions = [
        "" if rng.random() < 0.12 else items.captions.draw(concept, rng) for concept in concepts
    ]
    return chosen, captions, generator


@functools.lru_cache(maxsize=2)
def epoch_order(count: int, epoch: int, seed: int) -> list[int]:
    return random.Random(f"{seed}/epoch {epoch}").sample(range(count), count)


def denoising_loss(
    row: Decoder,
    pipe: DiffusionPipeline,
    clean: Tensor,
    captions: list[str],
    generator: torch.Generator,
    share: float,
) -> Tensor:
    """Squared error of the clean sample / s^2, the error of the velocity; s from a logit normal."""
    first, last, spread = row.noise
    mean = first + (last - first) * share
    # One draw from each slice of the distribution: less noise in the gradient than free draws.
    place = torch.randperm(len(clean), generator=generator) + torch.rand(1, generator=generator)
    level = torch.sigmoid(mean + spread * torch.special.ndtri(place.clamp(min=1e-3) / len(clean)))
    noise = torch.randn(clean.shape, generator=generator)
    wide = level.view(-1, *[1] * (clean.ndim - 1))
    noisy = (1 - wide) * clean + wide * noise
    predicted = row.denoise(pipe, noisy, 1000 * level, read_captions(pipe, captions))
    error = (predicted.float() - clean).square().flatten(1).mean(1)
    return (error / level.clamp(min=0.1).square()).mean()


# ------------------------------------------------------------------- weights, state, the one loop


@torch.no_grad()
def latents_of(row: Decoder, pipe: DiffusionPipeline, samples: Tensor) -> Tensor:
    """What the denoiser sees of samples as `read` gives them: float[B, *S]."""
    samples = samples if samples.is_floating_point() else samples / 127.5 - 1
    parts = [pipe.vae.encode(part).latent_dist.mode() for part in samples.split(64)]
    return torch.cat(parts) * row.scale(pipe.vae)


def modules(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    parts = {name: getattr(pipe, name) for name in pipe.components}
    return {name: part for name, part in parts.items() if isinstance(part, nn.Module)}


def parameters(pipe: DiffusionPipeline) -> dict[str, int]:
    return {
        name: sum(parameter.numel() for parameter in part.parameters())
        for name, part in modules(pipe).items()
    }


def trained(pipe: DiffusionPipeline) -> dict[str, nn.Parameter]:
    """What the loop trains: all but the codec and the time frequencies of the audio decoder."""
    weights = {}
    for name, part in modules(pipe).items():
        for key, parameter in part.named_parameters():
            frozen = name == "vae" or f"{name}.{key}" == "transformer.time_proj.weight"
            parameter.requires_grad_(not frozen)
            if parameter.requires_grad:
                weights[f"{name}.{key}"] = parameter
    return weights


# First pattern that fits a parameter's name -> its share of the learning rate.
PACES = {
    r"text_encoder\.shared": 5.0,
    r"text_encoder\.": 0.3,
    rf"transformer\..*({TEXT_PATH})": 2.0,
    "": 1.0,
}


@dataclass
class Progress:
    """Where a run stands: goes into progress.json."""

    decoder: str
    seed: int
    steps: int
    minutes: float | None
    step: int = 0
    seconds: float = 0.0
    earlier: int = 0  # steps of the run whose transformer this one began with
    losses: list[float] = field(default_factory=list)  # means over 50 steps

    def share(self) -> float:
        """0 at the start, 1 when the steps or the minutes are used up."""
        minutes = self.seconds / 60 / self.minutes if self.minutes else 0.0
        return min(1.0, max(self.step / self.steps, minutes))


class Run:
    """Pipeline, averaged weights and optimizer of a training, on disk without pickle."""

    def __init__(self, folder: Path, pipe: DiffusionPipeline, progress: Progress):
        self.folder, self.pipe, self.progress = folder, pipe, progress
        self.row = DECODERS[progress.decoder]
        self.latents: Tensor | None = None  # of all items, where nothing varies them
        self.weights = trained(pipe)
        self.averages = {name: weight.detach().clone() for name, weight in self.weights.items()}
        groups: dict[float, list[nn.Parameter]] = {}
        for name, weight in self.weights.items():
            pace = next(pace for pattern, pace in PACES.items() if re.match(pattern, name))
            groups.setdefault(pace, []).append(weight)
        self.optimizer = torch.optim.AdamW(
            [{"params": weights, "pace": pace} for pace, weights in groups.items()],
            lr=self.row.learning_rate,
            betas=(0.9, 0.98),
            weight_decay=0.01,
        )

    @classmethod
    def start(
        cls,
        folder: Path,
        items: Items,
        words: Path,
        codec: Path | None,
        progress: Progress,
        after: Path | None,
    ) -> "Run":
        """A new run; `after`: an earlier one whose transformer it takes, but for the text path."""
        torch.manual_seed(progress.seed)
        pipe = DECODERS[progress.decoder].build(items.captions.texts(), words, codec)
        if after:
            done = json.loads((after / "progress.json").read_text(encoding="utf-8"))
            state = load_file(after / f"state-{done['step']}.safetensors")
            progress.earlier = done["step"]
            for name, weight in pipe.transformer.named_parameters():
                if f"average/transformer.{name}" in state and not re.search(TEXT_PATH, name):
                    weight.data.copy_(state[f"average/transformer.{name}"])
        pipe.save_pretrained(folder / "start")
        return cls(folder, pipe, progress)

    @classmethod
    def resume(cls, folder: Path) -> "Run":
        progress = Progress(**json.loads((folder / "progress.json").read_text(encoding="utf-8")))
        run = cls(folder, DiffusionPipeline.from_pretrained(folder / "start"), progress)
        state = load_file(folder / f"state-{progress.step}.safetensors")
        for name, weight in run.weights.items():
            weight.data.copy_(state[f"weight/{name}"])
            run.averages[name].copy_(state[f"average/{name}"])
            run.optimizer.state[weight] = {
                key: state[f"{key}/{name}"] for key in ("step", "exp_avg", "exp_avg_sq")
            }
        return run

    def save(self) -> None:
        """The state of a step beside the previous one, then the JSON that names it."""
        state = {}
        for name, weight in self.weights.items():
            state[f"weight/{name}"] = weight.detach()
            state[f"average/{name}"] = self.averages[name]
            state |= {f"{k}/{name}": v for k, v in self.optimizer.state[weight].items()}
        current = self.folder / f"state-{self.progress.step}.safetensors"
        save_file(state, current)
        fresh = self.folder / "progress.json.new"
        fresh.write_text(json.dumps(asdict(self.progress), indent=1), encoding="utf-8")
        fresh.replace(self.folder / "progress.json")
        for old in self.folder.glob("state-*.safetensors"):
            if old != current:
                old.unlink()

    def rate(self) -> float:
        """Warm-up over 200 steps, then a cosine to 2 % of the full learning rate."""
        cosine = 0.02 + 0.98 * (1 + math.cos(math.pi * self.progress.share())) / 2
        return self.row.learning_rate * min(1.0, (self.progress.step + 1) / 200) * cosine

    def take_step(self, items: Items) -> float:
        """One optimizer step; float32 weights, bfloat16 products."""
        progress = self.progress
        torch.manual_seed(hash((progress.seed, progress.step)))  # dropout in the text encoder
        chosen, captions, generator = training_batch(self.row, items, progress.step, progress.seed)
        if self.row.vary:
            clean = latents_of(self.row, self.pipe, self.row.vary(items.samples[chosen], generator))
        else:
            if self.latents is None:
                self.latents = latents_of(self.row, self.pipe, items.samples)
            clean = self.latents[chosen]
        with torch.autocast("cpu", torch.bfloat16):
            loss = denoising_loss(self.row, self.pipe, clean, captions, generator, progress.share())
        loss.backward()
        nn.utils.clip_grad_norm_(self.weights.values(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = group["pace"] * self.rate()
        self.optimizer.step()
        self.optimizer.zero_grad()
        progress.step += 1
        decay = min(0.999, (1 + progress.step) / (10 + progress.step))
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.averages.values()), list(self.weights.values()), 1 - decay
            )
        return loss.item()

    def averaged(self) -> DiffusionPipeline:
        """A second pipeline that carries the averaged weights, for sampling and shipping."""
        pipe = DiffusionPipeline.from_pretrained(self.folder / "start")
        for name, weight in trained(pipe).items():
            weight.data.copy_(self.averages[name])
        pipe.set_progress_bar_config(disable=True)
        return pipe


def train(run: Run, items: Items, every: float) -> None:
    """Steps until the share is used up; a checkpoint and a sheet of samples every few minutes."""
    progress = run.progress
    for part in modules(run.pipe).values():
        part.train()
    bar = tqdm(total=progress.steps, initial=progress.step, unit="step", mininterval=20)
    saved = last = time.monotonic()
    losses: list[float] = []
    stopped: list[int] = []  # Ctrl-C or a polite kill: finish the step, save, end
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda number, _: stopped.append(number))
    # The fused attention kernel is slow backward on CPUs: 1.15 against 0.77 s a step.
    with sdpa_kernel(SDPBackend.MATH):
        while progress.share() < 1 and not stopped:
            losses.append(run.take_step(items))
            now = time.monotonic()
            progress.seconds, last = progress.seconds + now - last, now
            bar.update()
            if len(losses) == 50:
                progress.losses.append(sum(losses) / 50)
                bar.set_postfix(loss=f"{progress.losses[-1]:.4f}", done=f"{progress.share():.0%}")
                losses.clear()
            if now - saved > every * 60:
                run.save()
                sheet(run, items)
                saved = last = time.monotonic()
    bar.close()
    run.save()
    sheet(run, items)


# --------------------------------------------------------------------- samples, scores, shipping


@torch.inference_mode()
def sample(pipe: DiffusionPipeline, row: Decoder, captions: list[str], seed: int = 0) -> Tensor:
    """What the pipeline makes of captions, in the space of `read`: [B, ...] in -1..1."""
    made = []
    for start in range(0, len(captions), 16):
        part = captions[start : start + 16]
        generators = [
            torch.Generator().manual_seed(seed + start + index) for index in range(len(part))
        ]
        made.append(pipe(part, generator=generators, output_type="pt", **row.call)[row.output])
    made = torch.cat(made).float()
    if row.output == "frames":
        made = made.transpose(1, 2)  # [B, F, 3, H, W] -> [B, 3, F, H, W]
    return made if row.output == "audios" else 2 * made - 1


def picture(sample: Tensor, codec) -> Image.Image:
    """A picture, the frames of a clip in a row, or the spectrogram of a sound."""
    if sample.ndim == 2:  # float[1, N]
        mel = codec.encode(sample[None]).latent_dist.mode()[0].T  # [K, frames * M]
        mel = mel.unflatten(1, (codec.config.frames_per_token, -1)).flatten(0, 1).T.flip(0)
        sample = ((mel + 1.5) / 2 - 1)[None].expand(3, -1, -1)
    if sample.ndim == 4:
        sample = torch.cat(list(sample.unbind(1)), dim=-1)
    pixels = ((sample.clamp(-1, 1) + 1) * 127.5).byte().permute(1, 2, 0)
    return Image.fromarray(pixels.numpy())


def sheet(run: Run, items: Items, count: int = 32) -> None:
    """samples-STEP.png: what the averaged weights make of unseen phrasings, with their labels."""
    pipe = run.averaged()
    stride = max(1, len(items.labels) // count)
    chosen = range(0, len(items.labels), stride)[:count]
    captions = [items.captions.test(concept, place) for place, concept in enumerate(chosen)]
    made = sample(pipe, run.row, captions)
    tiles = [picture(one, pipe.vae) for one in made]
    scale = 2 if tiles[0].width < 200 else 1
    width, height = tiles[0].width * scale, tiles[0].height * scale
    columns = 1152 // width
    rows = math.ceil(len(tiles) / columns)
    page = Image.new("RGB", (columns * width, rows * (height + 12)), "white")
    pen = ImageDraw.Draw(page)
    for place, (tile, concept) in enumerate(zip(tiles, chosen, strict=True)):
        x, y = place % columns * width, place // columns * (height + 12)
        page.paste(tile.resize((width, height)), (x, y + 12))
        pen.text((x + 2, y), items.labels[concept], fill="black")
    page.save(run.folder / f"samples-{run.progress.step}.png")
    if run.row.output == "audios":
        for one, concept in zip(made, chosen, strict=True):
            name = items.labels[concept].replace(" ", "-")
            soundfile.write(run.folder / f"{name}.wav", one[0].numpy(), 16_000)


def features(samples: Tensor, codec) -> Tensor:
    """What scores compare, float[B, n]: pixels or log-mel frames, averaged over small patches."""
    if samples.ndim == 3:  # float[B, 1, N] sounds
        mel = codec.encode(samples).latent_dist.mode().transpose(1, 2)  # [B, K, frames * M]
        mel = mel.unflatten(2, (codec.config.frames_per_token, -1)).flatten(1, 2)
        return functional.avg_pool2d(mel, (8, 2)).flatten(1)
    return functional.avg_pool2d(samples.flatten(1, -3), 4).flatten(1)


@torch.inference_mode()
def score(pipe: DiffusionPipeline, row: Decoder, items: Items, rounds: int) -> dict[str, float]:
    """Share of samples of unseen phrasings whose nearest concept is their own (top 1, top 5).

    The gallery is every training item; a concept is as near as the nearest of its items.
    """
    real = items.samples if items.samples.is_floating_point() else items.samples / 127.5 - 1
    owners = torch.tensor(items.concepts)
    concepts = list(range(len(items.labels))) * rounds
    captions = [items.captions.test(concept, place) for place, concept in enumerate(concepts)]
    made = sample(pipe, row, captions)
    distances = torch.cdist(features(made, pipe.vae), features(real, pipe.vae))  # [B, N]
    nearest = torch.full((len(made), len(items.labels)), float("inf"))
    nearest.scatter_reduce_(1, owners.expand(len(made), -1), distances, "amin")
    own = nearest.gather(1, torch.tensor(concepts)[:, None])
    rank = (nearest < own).sum(1)
    result = {
        "samples": len(made),
        "concepts": len(items.labels),
        "top1": (rank < 1).float().mean().item(),
        "top5": (rank < 5).float().mean().item(),
    }
    if row.output == "frames":
        moved = [clips.diff(dim=2).abs().mean((1, 2, 3, 4)) for clips in (made, real)]
        ratio = moved[0] / moved[1][concepts]
        result["motion_ratio_median"] = ratio.median().item()
        result["motion_ratio_in_half_to_two"] = ((ratio > 0.5) & (ratio < 2)).float().mean().item()
    return {name: round(value, 4) for name, value in result.items()}


def ship(run: Run, items: Items, folder: Path) -> None:
    """The averaged weights in float16, scored as reloaded, and their card."""
    pipe = run.averaged()
    for part in modules(pipe).values():
        part.half()
    pipe.save_pretrained(folder)
    for file in folder.rglob("*.json"):
        content = json.loads(file.read_text(encoding="utf-8"))
        content.pop("_name_or_path", None)  # diffusers notes the folder that it loaded from
        if "dtype" in content:
            content["dtype"] = "float32"  # transformers would keep float16, diffusers does not
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for file in folder.rglob("*.safetensors"):
        file.chmod(0o644)
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    scores = score(pipe, run.row, items, rounds=3 if len(items.labels) < 100 else 1)
    logger.info("scores %s", scores)
    counts = parameters(pipe)
    call = ", ".join(f"{name}={value!r}" for name, value in run.row.call.items())
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6
    lines = "".join(f"| {name.replace('_', ' ')} | {value} |\n" for name, value in scores.items())
    card = CARD.format(
        decoder=run.progress.decoder,
        pipeline=type(pipe).__name__,
        call=call,
        output=run.row.output,
        counts=", ".join(f"{name} {count:,}" for name, count in counts.items() if count),
        size=size,
        items=len(items.concepts),
        concepts=len(items.labels),
        steps=run.progress.step,
        earlier=f" after {run.progress.earlier} of an earlier run" if run.progress.earlier else "",
        batch=run.row.batch,
        classes="" if run.progress.decoder == "image" else CLASSES,
        codec="" if run.progress.decoder == "audio" else " --codec runs/decoders/codec",
        minutes=run.progress.seconds / 60,
        scores=lines,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


CLASSES = "import mmllm.mini.codecs  # the class in the VAE slot\n"
CARD = """# The {decoder} decoder of mini

A `{pipeline}` of diffusers whose every weight was trained by `train/mini_decoders.py`.

```python
{classes}from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("mmllm/mini/decoders/{decoder}")
pipe("a caption", {call}).{output}
```

- **Parameters**: {counts}; float16, {size:.1f} MB.
- **Data**: {items} items of {concepts} concepts, split `train` only, with the training phrasings
  and synonyms; credits and licences are in `mmllm/mini/data/README.md`.
- **Word vectors**: start from all-MiniLM-L6-v2 (Apache-2.0), reduced.
- **Licence** of these weights: Apache-2.0.
- **Training**: {steps} steps of {batch}{earlier}, {minutes:.0f} minutes on one busy CPU core:
  `python train/mini_decoders.py {decoder} --words FOLDER{codec} --run runs/decoders/{decoder}
  --minutes {minutes:.0f} --threads 1`; then the same with `--ship mmllm/mini/decoders/{decoder}`.

| held-out phrasings | |
|---|---|
{scores}
A sample counts if its own concept is the nearest (among the nearest five) of all concepts, by
squared distance of coarse pixels or log-mel patches to the training items. What it was not trained
on it cannot make: an unknown caption gives some mixture of known things.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("decoder", choices=DECODERS)
    parser.add_argument("--run", type=Path, required=True, help="folder of checkpoints and samples")
    parser.add_argument("--words", type=Path, help="folder of the sentence encoder (first start)")
    parser.add_argument("--codec", type=Path, help="folder of train/mini_codec.py (first start)")
    parser.add_argument(
        "--after", type=Path, help="folder of a run whose transformer to begin with"
    )
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--minutes", type=float, help="anneal and stop by then")
    parser.add_argument("--every", type=float, default=6, help="minutes between checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--ship", type=Path, metavar="FOLDER", help="write the decoder of a run")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    torch.set_num_threads(arguments.threads)
    row = DECODERS[arguments.decoder]
    items = read_items(arguments.data, arguments.decoder, row.read)
    arguments.run.mkdir(parents=True, exist_ok=True)
    if arguments.resume or arguments.ship:
        run = Run.resume(arguments.run)
    elif arguments.words:
        steps = arguments.steps or row.steps
        progress = Progress(arguments.decoder, arguments.seed, steps, arguments.minutes)
        if arguments.decoder != "audio" and not arguments.codec:
            parser.error(f"{arguments.decoder} needs --codec: what train/mini_codec.py --out wrote")
        run = Run.start(
            arguments.run, items, arguments.words, arguments.codec, progress, arguments.after
        )
    else:
        parser.error("a first start needs --words, a later one --resume")
    logger.info("%d items, %d concepts", len(items.concepts), len(items.labels))
    logger.info("parameters %s", parameters(run.pipe))
    if arguments.ship:
        ship(run, items, arguments.ship)
    else:
        train(run, items, arguments.every)


if __name__ == "__main__":
    main()
