"""Tiny random twins of public encoders, written as upstream saves them, and upstream's own answer.

A twin knows how to write its folder, how a config names it, and what upstream says of a medium:
upstream's preprocessor and upstream's forward, with nothing of ours between.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmllm import config
from mmllm.conversation import Audio, Image, Medium, Video
from mmllm.encoders.base import ModalityEncoder

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
PICTURE = {"image_size": 32, "patch_size": 8, "num_hidden_layers": 3, **SMALL}
TEXT = {"vocab_size": 8, "num_hidden_layers": 1, **SMALL}
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


@dataclass(frozen=True)
class Twin:
    """`write(folder)`, `tokens(folder, medium)` -> float[L, C] by upstream alone."""

    type: str
    write: Callable[[Path], None]
    tokens: Callable[[Path, Medium], Tensor]
    media: Callable[[], list[Medium]]
    options: Mapping[str, Any] = field(default_factory=dict)
    changed: Mapping[str, Any] = field(default_factory=lambda: {"image_mean": [0.4, 0.4, 0.4]})
    """Keys of the preprocessor's file that make it another one."""
    preprocessor: str = "preprocessor_config.json"

    def build(self, folder: Path | str, **options: Any) -> ModalityEncoder:
        tree = {"type": self.type, "weights": str(folder), **self.options, **options}
        return config.build(config.parse_component("encoders", tree, "encoders.twin"))


def pictures() -> list[Medium]:
    random = np.random.default_rng(0)
    sizes = ((40, 56), (64, 48), (32, 32))
    return [Image.from_numpy(random.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]


def sounds() -> list[Medium]:
    """Of 0.3, 1 and 2.5 seconds: shorter and longer than the twins listen; one in stereo."""
    random = np.random.default_rng(0)
    made: list[Medium] = []
    for seconds, rate, channels in ((0.3, 16_000, 1), (1.0, 48_000, 2), (2.5, 16_000, 1)):
        time = np.arange(round(seconds * rate)) / rate
        wave = 0.3 * np.sin(2 * np.pi * 440 * time) + 0.1 * random.standard_normal(len(time))
        made.append(Audio.from_numpy(np.tile(wave.astype("f4"), (channels, 1)), rate))
    return made


def clips() -> list[Medium]:
    random = np.random.default_rng(0)
    return [
        Video.from_numpy(random.integers(0, 256, (frames, 40, 48, 3), dtype=np.uint8), 8.0)
        for frames in (9, 4, 3)
    ]


def _save(folder: Path, model: Any, processor: Any) -> None:
    """Weights of a visible size in every layer, so that no layer is nearly the identity."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter) + (parameter == 1).float())
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _picture_tokens(prefix: int) -> Callable[[Path, Medium], Tensor]:
    """AutoModel's vision tower on AutoImageProcessor's pixels, without its first tokens."""

    def tokens(folder: Path, medium: Medium) -> Tensor:
        from transformers import AutoImageProcessor, AutoModel

        model = AutoModel.from_pretrained(folder).eval()
        model = getattr(model, "vision_model", model)
        inputs = AutoImageProcessor.from_pretrained(folder)(medium.to_pil(), return_tensors="pt")
        return model(**inputs).last_hidden_state[0, prefix:]

    return tokens


def _write_pictures(kind: str, **more: Any) -> Callable[[Path], None]:
    """A tiny vision model of transformers, by the prefix of its classes' names."""

    def write(folder: Path) -> None:
        import transformers as t

        torch.manual_seed(0)
        edge, square = {"shortest_edge": 36}, {"height": 32, "width": 32}
        if kind in ("CLIP", "Siglip", "Siglip2"):
            made = getattr(t, f"{kind}Config")(
                vision_config={**PICTURE, **more}, text_config={**TEXT, **IDS}
            )
        else:
            made = getattr(t, f"{kind}Config")(**{**PICTURE, **more})
        processor = {
            "CLIP": lambda: t.CLIPImageProcessor(size=edge, crop_size=square),
            "Siglip": lambda: t.SiglipImageProcessor(size=square),
            "Radio": lambda: t.CLIPImageProcessor(size=edge, crop_size=square, do_normalize=False),
            "Siglip2": lambda: t.Siglip2ImageProcessor(patch_size=8, max_num_patches=20),
            "DINOv3ViT": lambda: t.DINOv3ViTImageProcessor(size=square),
            "DINOv3ConvNext": lambda: t.DINOv3ViTImageProcessor(size={"height": 64, "width": 64}),
        }.get(kind, lambda: t.BitImageProcessor(size=edge, crop_size=square))()
        _save(folder, getattr(t, f"{kind}Model")(made), processor)

    return write


def _vision(kind: str, prefix: int, **more: Any) -> Twin:
    return Twin(
        "transformers_vision", _write_pictures(kind, **more), _picture_tokens(prefix), pictures
    )


def write_open_clip(folder: Path, *, quick_gelu: bool = False, **vision: Any) -> None:
    """A model of open_clip as its `push_to_hf_hub` lays it out."""
    import open_clip
    from safetensors.torch import save_file

    text = {"context_length": 4, "vocab_size": 8, "width": 16, "heads": 2, "layers": 1}
    model = {"embed_dim": 12, "vision_cfg": vision, "text_cfg": text, "quick_gelu": quick_gelu}
    preprocess = {"mean": [0.5, 0.4, 0.3], "interpolation": "bilinear", "resize_mode": "longest"}
    written = {"model_cfg": model, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(written))
    torch.manual_seed(0)
    state = open_clip.create_model(f"local-dir:{folder}").state_dict()
    state = {
        key: value + 0.1 * torch.rand_like(value) if value.is_floating_point() else value
        for key, value in state.items()
    }
    save_file(state, folder / "open_clip_model.safetensors")


def _open_clip_tokens(run: Callable[[Any, Tensor], Tensor]) -> Callable[[Path, Medium], Tensor]:
    """`run(visual, samples)` -> [1, L, C], on the whole model as open_clip creates it."""

    def tokens(folder: Path, medium: Medium) -> Tensor:
        import open_clip

        model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
        return run(model.eval().visual, transform(medium.to_pil())[None])[0]

    return tokens


def _vit_tokens(visual: Any, samples: Tensor) -> Tensor:
    visual.output_tokens = True
    return visual(samples)[1]


def _stage_tokens(visual: Any, samples: Tensor) -> Tensor:
    for stage in (visual.stem, visual.layer1, visual.layer2, visual.layer3, visual.layer4):
        samples = stage(samples)
    return samples.flatten(2).transpose(1, 2)


def _open_clip(run: Callable[[Any, Tensor], Tensor], **vision: Any) -> Twin:
    changed = {"preprocess_cfg": {"mean": [0.1, 0.1, 0.1]}}
    return Twin(
        "open_clip",
        lambda folder: write_open_clip(folder, **vision),
        _open_clip_tokens(run),
        pictures,
        changed=changed,
        preprocessor="open_clip_config.json",
    )


def _wave(medium: Medium, rate: int) -> np.ndarray:
    """float32[S], mixed and resampled with torchaudio alone."""
    from torchaudio.functional import resample

    assert isinstance(medium, Audio)
    mixed = torch.from_numpy(medium.to_numpy()).mean(dim=0)
    return resample(mixed, medium.sample_rate, rate).clamp(-1, 1).numpy()  # pyright: ignore


def _write_clap(*, fusion: bool) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        import transformers as t

        torch.manual_seed(0)
        tower = {
            "spec_size": 128,
            "num_mel_bins": 64,
            "depths": [1, 1],
            "num_attention_heads": [2, 2],
            "patch_embeds_hidden_size": 8,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "window_size": 4,
            "enable_fusion": fusion,
            "fusion_type": "aff_2d" if fusion else None,
            "patch_embed_input_channels": 1,
            "projection_dim": 8,
        }
        text = {**TEXT, **IDS, "projection_dim": 8}
        made = t.ClapConfig(audio_config=tower, text_config=text, projection_dim=8)
        truncation = "fusion" if fusion else "rand_trunc"
        extractor = t.ClapFeatureExtractor(max_length_s=1, truncation=truncation)
        _save(folder, t.ClapModel(made), extractor)

    return write


def _clap_tokens(folder: Path, medium: Medium) -> Tensor:
    """From the whole model; upstream's draws are repeated by numpy's seed."""
    from transformers import ClapFeatureExtractor, ClapModel

    extractor = ClapFeatureExtractor.from_pretrained(folder)
    np.random.seed(0)
    inputs = extractor(_wave(medium, 48_000), sampling_rate=48_000, return_tensors="pt")
    model = ClapModel.from_pretrained(folder).eval()
    return model.audio_model(**inputs).last_hidden_state[0].flatten(1).T


def _write_whisper(folder: Path) -> None:
    import transformers as t

    torch.manual_seed(0)
    sizes = {"encoder_layers": 3, "decoder_layers": 1, "d_model": 16, "num_mel_bins": 80}
    sizes |= {f"{side}_attention_heads": 2 for side in ("encoder", "decoder")}
    sizes |= {f"{side}_ffn_dim": 24 for side in ("encoder", "decoder")}
    made = t.WhisperConfig(
        **sizes, **IDS, vocab_size=8, decoder_start_token_id=1, max_source_positions=50
    )
    extractor = t.WhisperFeatureExtractor(chunk_length=1)
    _save(folder, t.WhisperModel(made), extractor)


def _whisper_tokens(folder: Path, medium: Medium) -> Tensor:
    from transformers import WhisperFeatureExtractor, WhisperModel

    extractor = WhisperFeatureExtractor.from_pretrained(folder)
    inputs = extractor(_wave(medium, 16_000), sampling_rate=16_000, return_tensors="pt")
    model = WhisperModel.from_pretrained(folder).eval()
    return model.encoder(inputs["input_features"]).last_hidden_state[0]


def _write_ast(folder: Path) -> None:
    import transformers as t

    torch.manual_seed(0)
    made = t.ASTConfig(
        **SMALL,
        num_hidden_layers=3,
        patch_size=8,
        max_length=98,
        num_mel_bins=32,
        frequency_stride=8,
        time_stride=10,
    )
    _save(folder, t.ASTModel(made), t.ASTFeatureExtractor(max_length=98, num_mel_bins=32))


def _ast_tokens(folder: Path, medium: Medium) -> Tensor:
    from transformers import AutoFeatureExtractor, AutoModel

    extractor = AutoFeatureExtractor.from_pretrained(folder)
    inputs = extractor(_wave(medium, 16_000), sampling_rate=16_000, return_tensors="pt")
    return AutoModel.from_pretrained(folder).eval()(**inputs).last_hidden_state[0, 2:]


def _write_videomae(folder: Path) -> None:
    import transformers as t

    torch.manual_seed(0)
    made = t.VideoMAEConfig(
        **PICTURE,
        num_frames=4,
        tubelet_size=2,
        decoder_hidden_size=8,
        use_mean_pooling=False,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=8,
    )
    sizes = {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}}
    _save(folder, t.VideoMAEForPreTraining(made), t.VideoMAEImageProcessor(**sizes))


def _write_vjepa2(folder: Path) -> None:
    import transformers as t

    torch.manual_seed(0)
    made = t.VJEPA2Config(
        hidden_size=24,
        num_attention_heads=2,
        num_hidden_layers=3,
        mlp_ratio=1.5,
        patch_size=8,
        crop_size=32,
        frames_per_clip=4,
        pred_hidden_size=24,
        pred_num_attention_heads=2,
        pred_num_hidden_layers=1,
        num_pooler_layers=1,
    )
    _save(folder, t.VJEPA2Model(made), t.VJEPA2VideoProcessor(crop_size=32))


PE = {**SMALL, "num_hidden_layers": 2, "head_dim": 8, "attention_bias": False}


def pe_frames() -> dict[str, Any]:
    """The tower of Perception Encoder's frames, a tiny timm."""
    return {
        "architecture": "vit_pe_core_tiny_patch16_384",
        "num_classes": 12,
        "global_pool": "map",
        "do_pooling": True,
        "model_args": {"img_size": 32, "embed_dim": 24, "depth": 1, "num_heads": 2},
    }


def pe_wave() -> dict[str, Any]:
    """The codec of Perception Encoder's audio: 40 samples a token."""
    return {
        "downsampling_ratios": [2, 4, 5],
        "encoder_hidden_size": 4,
        "hidden_size": 16,
        "codebook_dim": 8,
    }


def _write_pe_video(folder: Path) -> None:
    import transformers as t

    torch.manual_seed(0)
    made = t.PeVideoConfig(
        video_config={**PE, "vision_config": pe_frames()}, text_config={**TEXT, **IDS}
    )
    square = {"height": 32, "width": 32}
    processor = t.PeVideoVideoProcessor(size=square, do_resize=True, do_rescale=True)
    _save(folder, t.PeVideoModel(made), processor)


def _write_pe_audio_video(folder: Path) -> None:
    import transformers as t

    torch.manual_seed(0)
    both = {
        **PE,
        "video_config": {**PE, "model_type": "pe_video_encoder", "vision_config": pe_frames()},
        "audio_config": {**PE, "model_type": "pe_audio_encoder", "dac_config": pe_wave()},
    }
    made = t.PeAudioVideoConfig(audio_video_config=both, text_config={**TEXT, **IDS})
    t.PeAudioFeatureExtractor(sampling_rate=8_000, hop_length=40).save_pretrained(folder)
    square = {"height": 32, "width": 32}
    processor = t.PeVideoVideoProcessor(size=square, do_resize=True, do_rescale=True)
    _save(folder, t.PeAudioVideoModel(made), processor)


def films() -> list[Medium]:
    """Clips of 9/8, 4/8 and 3/8 seconds with a track each, but for the last."""
    made: list[Medium] = []
    for clip, sound in zip(clips(), (2, 1, None), strict=True):
        assert isinstance(clip, Video)
        track = None if sound is None else sounds()[sound]
        made.append(Video.from_numpy(clip.to_numpy(), 8.0, audio=track))
    return made


def _film_tokens(folder: Path, medium: Medium) -> Tensor:
    """The joint encoder of the whole model, on four frames and the track as far as these last.
    Upstream's from_pretrained fails to tie the weights that the file holds once (transformers
    5.23 with timm's `bands`), so that they are put into the model here."""
    from safetensors.torch import load_file
    from transformers import (
        AutoFeatureExtractor,
        AutoVideoProcessor,
        PeAudioVideoConfig,
        PeAudioVideoModel,
    )

    assert isinstance(medium, Video)
    frames = medium.to_numpy()
    count = round(len(frames) / 8.0 * 8_000)
    wave = np.zeros(count, "f4") if medium.audio is None else _wave(medium.audio, 8_000)[:count]
    frames = frames[[int((i + 0.5) * len(frames) / 4) for i in range(4)]]
    pixels = AutoVideoProcessor.from_pretrained(folder)(
        list(frames), return_tensors="pt", do_sample_frames=False
    )
    extractor = AutoFeatureExtractor.from_pretrained(folder)
    track = extractor(wave, sampling_rate=8_000, return_tensors="pt")["input_values"]
    model = PeAudioVideoModel(PeAudioVideoConfig.from_pretrained(folder)).eval()
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    encoder = model.audio_video_encoder
    for name in ("audio", "video"):
        own = getattr(getattr(model, f"{name}_model"), f"{name}_encoder")
        getattr(encoder.embedder, f"{name}_encoder").load_state_dict(own.state_dict())
    return encoder(track.view(1, 1, -1), pixels["pixel_values_videos"]).last_hidden_state[0]


def _write_videoprism(folder: Path) -> None:
    import transformers as t

    torch.manual_seed(0)
    tower = {
        **SMALL,
        "image_size": 32,
        "num_frames": 4,
        "tubelet_size": [1, 8, 8],
        "num_spatial_layers": 2,
        "num_temporal_layers": 1,
        "num_auxiliary_layers": 1,
    }
    made = t.VideoPrismConfig(vision_config=tower, text_config={**TEXT, **IDS})
    processor = t.LlavaOnevisionVideoProcessor(size={"height": 32, "width": 32})
    _save(folder, t.VideoPrismClipModel(made), processor)


def _whole_clip_tokens(encoder: Callable[[Any], Any]) -> Callable[[Path, Medium], Tensor]:
    """The video encoder of the whole model, on the middles of four equal parts."""

    def tokens(folder: Path, medium: Medium) -> Tensor:
        from transformers import AutoModel, AutoVideoProcessor

        frames = medium.to_numpy()
        frames = frames[[int((i + 0.5) * len(frames) / 4) for i in range(4)]]
        processor = AutoVideoProcessor.from_pretrained(folder)
        inputs = processor(list(frames), return_tensors="pt", do_sample_frames=False)
        network = encoder(AutoModel.from_pretrained(folder).eval())
        return network(inputs["pixel_values_videos"]).last_hidden_state[0]

    return tokens


def _write_audio(name: str) -> Callable[[Path], None]:
    """A whole model of transformers with its feature extractor."""

    def write(folder: Path) -> None:
        import transformers as t

        torch.manual_seed(0)
        qwen = {
            "num_mel_bins": 16,
            "encoder_layers": 2,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 24,
            "d_model": 16,
            "n_window": 50,
            "n_window_infer": 100,
            "downsample_hidden_size": 4,
        }
        if name == "pe_audio":
            made = t.PeAudioConfig(
                audio_config={**PE, "dac_config": pe_wave()}, text_config={**TEXT, **IDS}
            )
            model = t.PeAudioModel(made)
            extractor = t.PeAudioFeatureExtractor(sampling_rate=16_000, hop_length=40)
        elif name == "parakeet":
            sizes = {**SMALL, "num_hidden_layers": 2, "num_mel_bins": 16, "conv_kernel_size": 3}
            made = t.ParakeetCTCConfig(
                encoder_config={**sizes, "subsampling_conv_channels": 4}, vocab_size=8
            )
            model = t.ParakeetForCTC(made)
            extractor = t.ParakeetFeatureExtractor(feature_size=16)
        elif name == "qwen3_omni":
            made = t.Qwen3OmniMoeThinkerConfig(
                audio_config={**qwen, "output_dim": 12},
                vision_config={**VISION, "out_hidden_size": 16},
                text_config={**MOE, **TEXT},
            )
            model = t.Qwen3OmniMoeThinkerForConditionalGeneration(made)
            extractor = t.WhisperFeatureExtractor(feature_size=16)
        else:
            made = t.Qwen3ASRConfig(audio_config=qwen, text_config={**MOE, **TEXT})
            model = t.Qwen3ASRForConditionalGeneration(made)
            extractor = t.Qwen3ASRFeatureExtractor(feature_size=16)
        _save(folder, model, extractor)

    return write


VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2}
VISION |= {"deepstack_visual_indexes": [0]}
MOE = {"head_dim": 8, "num_key_value_heads": 2}


def _audio_tokens(name: str, rate: int = 16_000) -> Callable[[Path, Medium], Tensor]:
    """The encoder of the whole model, called as that model calls it, on the first two seconds."""

    def tokens(folder: Path, medium: Medium) -> Tensor:
        import transformers as t

        extractor = t.AutoFeatureExtractor.from_pretrained(folder)
        wave = _wave(medium, rate)[: 2 * rate]
        options = {"sampling_rate": rate, "return_tensors": "pt"}
        if name == "pe_audio":
            inputs = extractor(wave, **options)
            model = t.PeAudioModel.from_pretrained(folder).eval()
            return model.audio_encoder(**inputs).last_hidden_state[0]
        if name == "parakeet":
            model = t.ParakeetForCTC.from_pretrained(folder).eval()
            found = model.encoder(**extractor(wave, **options))
            return found.last_hidden_state[0][found.attention_mask[0].bool()]
        inputs = extractor(wave, padding=True, return_attention_mask=True, **options)
        features, mask = inputs["input_features"], inputs["attention_mask"]
        if name == "qwen3_omni":
            model = t.Qwen3OmniMoeThinkerForConditionalGeneration.from_pretrained(folder).eval()
            return model.get_audio_features(features, mask).last_hidden_state
        model = t.Qwen3ASRForConditionalGeneration.from_pretrained(folder).eval()
        return model.model.audio_tower(features, input_features_mask=mask).last_hidden_state

    return tokens


def _audio(name: str, changed: Mapping[str, Any]) -> Twin:
    return Twin(
        "transformers_audio",
        _write_audio(name),
        _audio_tokens(name),
        sounds,
        options={"seconds": 2.0},
        changed=changed,
    )


def _clip_tokens(folder: Path, medium: Medium) -> Tensor:
    """On the middles of four equal parts, whatever the length."""
    from transformers import AutoConfig, AutoVideoProcessor, VideoMAEModel, VJEPA2Model

    frames = medium.to_numpy()
    frames = frames[[int((i + 0.5) * len(frames) / 4) for i in range(4)]]
    inputs = AutoVideoProcessor.from_pretrained(folder)(list(frames), return_tensors="pt")
    if AutoConfig.from_pretrained(folder).model_type == "vjepa2":
        model = VJEPA2Model.from_pretrained(folder).eval()
        return model.get_vision_features(inputs["pixel_values_videos"])[0]
    return VideoMAEModel.from_pretrained(folder).eval()(**inputs).last_hidden_state[0]


VIT = {"image_size": 32, "patch_size": 8, "width": 16, "layers": 3, "head_width": 8}
RESNET = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8}
TIMM = {"timm_proj": "linear", "image_size": 160}

TWINS = {
    "open_clip": _open_clip(_vit_tokens, **VIT),
    "open_clip_quick_gelu": _open_clip(_vit_tokens, quick_gelu=True, **VIT),
    "open_clip_resnet": _open_clip(_stage_tokens, **RESNET),
    "open_clip_timm_vit": _open_clip(
        lambda visual, samples: visual.trunk.forward_features(samples)[:, 1:],
        timm_model_name="test_vit",
        timm_pool="token",
        **TIMM,
    ),
    "open_clip_timm_convnext": _open_clip(
        lambda visual, samples: visual.trunk.forward_features(samples).flatten(2).transpose(1, 2),
        timm_model_name="test_convnext",
        timm_pool="avg",
        **TIMM,
    ),
    "clip": _vision("CLIP", 1),
    "siglip": _vision("Siglip", 0),
    "siglip2": _vision("Siglip2", 0, num_patches=16),
    "dinov2": _vision("Dinov2", 1),
    "dinov2_with_registers": _vision("Dinov2WithRegisters", 5),
    "dinov3_vit": _vision("DINOv3ViT", 5, num_register_tokens=4),
    "dinov3_convnext": _vision("DINOv3ConvNext", 1, hidden_sizes=[8, 8, 12, 16], depths=[1] * 4),
    "radio": _vision("Radio", 5, num_cls_tokens=2, num_registers=3, max_img_size=64),
    "pe_audio": _audio("pe_audio", {"sampling_rate": 8_000}),
    "parakeet": _audio("parakeet", {"preemphasis": 0.9}),
    "qwen3_omni": _audio("qwen3_omni", {"dither": 0.1}),
    "qwen3_asr": _audio("qwen3_asr", {"dither": 0.1}),
    "pe_video": Twin(
        "transformers_video",
        _write_pe_video,
        _whole_clip_tokens(lambda model: model.video_encoder),
        clips,
        options={"frames": 4},
        preprocessor="video_preprocessor_config.json",
    ),
    "pe_audio_video": Twin(
        "pe_audio_video",
        _write_pe_audio_video,
        _film_tokens,
        films,
        options={"frames": 4, "seconds": 2.0},
        preprocessor="video_preprocessor_config.json",
    ),
    "videoprism": Twin(
        "transformers_video",
        _write_videoprism,
        _whole_clip_tokens(lambda model: model.video_model.vision_model),
        clips,
        preprocessor="video_preprocessor_config.json",
    ),
    "clap": Twin(
        "clap",
        _write_clap(fusion=False),
        _clap_tokens,
        sounds,
        changed={"frequency_max": 12_000},
    ),
    "clap_fused": Twin(
        "clap",
        _write_clap(fusion=True),
        _clap_tokens,
        sounds,
        changed={"frequency_max": 12_000},
    ),
    "whisper": Twin("whisper", _write_whisper, _whisper_tokens, sounds, changed={"dither": 0.1}),
    "ast": Twin("ast", _write_ast, _ast_tokens, sounds, changed={"mean": -4.0}),
    "videomae": Twin("transformers_video", _write_videomae, _clip_tokens, clips),
    "vjepa2": Twin(
        "transformers_video",
        _write_vjepa2,
        _clip_tokens,
        clips,
        preprocessor="video_preprocessor_config.json",
    ),
}


def rewrite(folder: Path, name: str, **changes: Any) -> None:
    """Change keys of a JSON file in a folder."""
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
