"""Encoders of public libraries, each against upstream's own preprocessing and forward."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from mmllm import config
from mmllm.conversation import Audio, Image
from mmllm.encoders import pooling
from mmllm.errors import AssetError, ConfigError, MediaError
from mmllm.features.cache import FeatureCache
from mmllm.features.store import FeatureStore
from tests import processes
from tests.encoders import twins
from tests.encoders.twins import TWINS

names = pytest.mark.parametrize("name", TWINS)


@pytest.fixture(scope="module")
def built(folders):
    """The encoder of a twin, with options; built once."""
    made: dict[tuple, object] = {}

    def build(name: str, **options):
        key = (name, *sorted(options.items()))
        if key not in made:
            made[key] = TWINS[name].build(folders(name), **options)
        return made[key]

    return build


@pytest.fixture
def copied(folders, tmp_path):
    """A twin's folder that a test may change."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(folders(name), tmp_path / name))

    return copy


@names
@torch.no_grad()
def test_tokens_equal_upstream_and_a_batch_equals_singles(name, folders, built):
    encoder, media = built(name), TWINS[name].media()
    features = encoder.encode(media)
    assert features.tokens.shape == (len(media), *encoder.feature_shape)
    assert features.tokens.dtype == torch.float32
    for row, medium in enumerate(media):
        sample = encoder.preprocess(medium)
        assert sample.shape == encoder.sample_shape
        assert sample.dtype == torch.float32
        assert torch.allclose(encoder(sample[None]).tokens[0], features.tokens[row], atol=1e-5)
        expected = TWINS[name].tokens(folders(name), medium)
        tokens = features.tokens[row]
        if encoder.layout:  # as many as the medium needs
            assert encoder.layout[2](medium) == (len(expected), None)
            assert features.mask[row].sum() == len(expected)
            tokens = tokens[features.mask[row]]
        assert torch.allclose(tokens, expected, atol=1e-4)
    assert (features.tokens[0] - features.tokens[1]).abs().max() > 1e-2


@names
def test_nothing_trains_and_no_gradient_arrives(name, built):
    encoder = built(name)
    samples = torch.stack([encoder.preprocess(medium) for medium in TWINS[name].media()])
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not any(module.training for module in encoder.modules())
    assert not encoder(samples).tokens.requires_grad
    weight = torch.ones(encoder.feature_shape[1], requires_grad=True)
    (encoder(samples).tokens * weight).sum().backward()
    assert all(parameter.grad is None for parameter in encoder.parameters())


@names
def test_the_fingerprint_tells_what_changes_features(name, built, copied):
    twin, folder = TWINS[name], copied(name)
    before = built(name).fingerprint
    assert twin.build(folder).fingerprint == before
    prints = {before, twin.build(folder, dtype="bfloat16").fingerprint}
    twins.rewrite(folder, twin.preprocessor, **twin.changed)
    prints.add(twin.build(folder).fingerprint)
    file = next(folder.glob("*.safetensors"))
    weights = load_file(file)
    key = next(key for key, value in weights.items() if value.ndim > 1)
    weights[key] = weights[key] + 1e-3
    save_file(weights, file, {"format": "pt"})
    prints.add(twin.build(folder).fingerprint)
    assert len(prints) == 4


def test_fingerprints_are_the_same_in_another_process(folders, built):
    program = (
        "from tests.encoders.twins import TWINS; import sys; from pathlib import Path;"
        "print(*(TWINS[n].build(Path(f)).fingerprint for n, f in zip(*[iter(sys.argv[1:])] * 2)))"
    )
    some = ["clip", "whisper"]
    arguments = [word for name in some for word in (name, str(folders(name)))]
    done = processes.run(["-c", program, *arguments])
    assert done.stdout.split() == [built(name).fingerprint for name in some]


# --- pictures -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["clip", "siglip", "dinov2", "dinov3_vit", "radio"])
@torch.no_grad()
def test_a_layer_is_the_hidden_state_of_its_number(name, folders, built):
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folders(name)).eval()
    model = getattr(model, "vision_model", model)
    samples = torch.stack([built(name).preprocess(medium) for medium in twins.pictures()])
    states = model(samples, output_hidden_states=True).hidden_states
    for layer, index in ((-2, 2), (2, 2), (1, 1), (-3, 1)):
        tokens = built(name, layer=layer)(samples).tokens
        assert torch.allclose(tokens, states[index][:, -16:], atol=1e-5)
    assert torch.equal(built(name, layer=3)(samples).tokens, built(name)(samples).tokens)
    assert built(name, layer=3).fingerprint == built(name).fingerprint
    assert built(name, layer=-2).fingerprint != built(name).fingerprint


@torch.no_grad()
def test_a_grid_is_the_mean_of_its_quarters_behind_the_class_token(built):
    samples = torch.stack([built("dinov3_vit").preprocess(m) for m in twins.pictures()])
    every = built("dinov3_vit")(samples).tokens.view(3, 4, 4, 16)
    encoder = built("dinov3_vit", grid=2, class_token=True)
    tokens = encoder(samples).tokens
    assert tokens.shape[1:] == encoder.feature_shape == (5, 16)
    assert torch.allclose(tokens[:, 2], every[:, :2, 2:].mean((1, 2)), atol=1e-5)  # top right
    upstream = encoder.network(samples).last_hidden_state
    assert torch.allclose(tokens[:, 0], upstream[:, 0], atol=1e-6)


@torch.no_grad()
def test_pictures_of_any_aspect_are_masked_or_pooled_alone(built):
    encoder = built("siglip2")
    assert encoder.sample_shape == (21, 192)
    wide = Image.from_numpy(np.zeros((16, 64, 3), np.uint8))
    features = encoder.encode([wide, twins.pictures()[2]])
    assert features.mask is not None
    rows = [encoder.preprocess(wide)[0, :2].tolist(), [4.0, 4.0]]
    assert features.mask.sum(dim=1).tolist() == [height * width for height, width in rows]
    pooled = built("siglip2", grid=2).encode([wide])
    assert pooled.mask is None
    height, width = map(int, rows[0])
    every = features.tokens[0, : height * width].view(height, width, -1)
    mean = every[: height // 2, : width // 2].mean((0, 1))
    assert height % 2 == width % 2 == 0
    assert torch.allclose(pooled.tokens[0, 0], mean, atol=1e-5)


def test_half_precision_is_near(built):
    near = built("clip", dtype="bfloat16").encode(twins.pictures()).tokens
    exact = built("clip").encode(twins.pictures()).tokens
    assert near.dtype == torch.float32
    assert 0 < (near - exact).abs().mean() < 0.1 * exact.abs().mean()


@torch.no_grad()
@pytest.mark.parametrize("name", ["clip", "siglip2"])
def test_any_picture_encoder_sees_frames(name, folders, built):
    tree = {"type": "transformers_vision", "weights": str(folders(name))}
    tree = {"type": "frames", "frames": 3, "encoder": tree}
    encoder = config.build(config.parse_component("encoders", tree, "video"))
    clips = twins.clips()
    features = encoder.encode(clips)
    assert features.tokens.shape == (3, *encoder.feature_shape)
    frames = [Image.from_numpy(frame) for frame in clips[2].to_numpy()]
    alone = built(name).encode(frames)
    assert torch.allclose(features.tokens[2], alone.tokens.flatten(0, 1), atol=1e-5)
    if alone.mask is not None:
        assert torch.equal(features.mask[2], alone.mask.flatten())


# --- open_clip ----------------------------------------------------------------------------------


@torch.no_grad()
def test_open_clip_layers_class_token_and_grid(folders, built):
    import open_clip

    visual = open_clip.create_model(f"local-dir:{folders('open_clip')}").eval().visual
    samples = torch.stack([built("open_clip").preprocess(m) for m in twins.pictures()])
    states = [visual._embeds(samples)]
    for block in visual.transformer.resblocks:
        states.append(block(states[-1]))
    for layer, index in ((-2, 2), (1, 1)):
        tokens = built("open_clip", layer=layer)(samples).tokens
        assert torch.allclose(tokens, states[index][:, 1:], atol=1e-5)
    encoder = built("open_clip", grid=2, class_token=True)
    tokens, normed = encoder(samples).tokens, visual.ln_post(states[-1])
    assert tokens.shape[1:] == encoder.feature_shape == (5, 16)
    assert torch.allclose(tokens[:, 0], normed[:, 0], atol=1e-5)
    quarter = normed[:, 1:].view(3, 4, 4, 16)[:, 2:, :2].mean((1, 2))  # bottom left
    assert torch.allclose(tokens[:, 3], quarter, atol=1e-5)


@torch.no_grad()
def test_open_clip_by_name_in_its_list(monkeypatch, folders, built, tmp_path):
    """A folder of weights alone, the architecture by name; its preprocessing is open_clip's."""
    import open_clip

    folder = folders("open_clip")
    (tmp_path / "tiny-vit.json").write_text(
        json.dumps(json.loads((folder / "open_clip_config.json").read_text())["model_cfg"])
    )
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", [])
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", {})
    open_clip.add_model_config(tmp_path)
    shutil.copy(folder / "open_clip_model.safetensors", tmp_path / "model.safetensors")
    encoder = TWINS["open_clip"].build(tmp_path, architecture="tiny-vit")
    _, _, transform = open_clip.create_model_and_transforms("tiny-vit")
    picture = twins.pictures()[0]
    assert torch.equal(encoder.preprocess(picture), transform(picture.to_pil()))
    samples = built("open_clip").preprocess(picture)[None]
    assert torch.equal(encoder(samples).tokens, built("open_clip")(samples).tokens)


def test_tags_of_open_clip_are_fetched_from_their_repository(monkeypatch, tmp_path):
    asked = {}

    def snapshot_download(name, **options):
        asked.update(name=name, **options)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(AssetError, match=r"has no \*?\.safetensors"):
        TWINS["open_clip"].build("laion2b_s34b_b79k", architecture="ViT-B-32")
    assert asked["name"].count("/") == 1
    assert asked["name"] != "laion2b_s34b_b79k"
    with pytest.raises(ConfigError, match=r"another activation .* use ViT-B-32-quickgelu"):
        TWINS["open_clip"].build("openai", architecture="ViT-B-32")
    with pytest.raises(ConfigError, match=r"open_clip has no 'ViT-B32'; did you mean 'ViT-B-32'"):
        TWINS["open_clip"].build("openai", architecture="ViT-B32")


@pytest.mark.parametrize(
    ("name", "grid", "width"),
    [
        ("ViT-S-32", 7, 384),
        ("coca_ViT-B-32", 7, 768),
        ("roberta-ViT-B-32", 7, 768),
        ("RN50", 7, 2048),
        ("ViT-B-32-SigLIP2-256", 8, 768),
        ("EVA02-B-16", 14, 768),
        ("PE-Core-T-16-384", 24, 192),
        ("MobileCLIP2-S0", 8, 512),
        ("ViTamin-S", 14, 384),
        ("convnext_tiny", 7, 768),
        ("swin_base_patch4_window7_224", 7, 1024),
        ("vit_relpos_medium_patch16_cls_224", 14, 512),
    ],
)
def test_every_kind_of_tower_gives_patches(name, grid, width):
    """Of open_clip's list one of each kind, with shapes only."""
    from mmllm.encoders import open_clip as ours

    settings = ours.OpenClipConfig("somewhere", architecture=name)
    with torch.device("meta"):
        tower = ours.make_tower(ours.architecture_config(name))
    encoder = ours.OpenClipEncoder(settings, tower, {}, "none")
    assert encoder.feature_shape == (grid * grid, width)


def test_open_clip_folders_that_do_not_fit(copied, tmp_path):
    twin, folder = TWINS["open_clip"], copied("open_clip")
    with pytest.raises(AssetError, match=r"no readable open_clip_config\.json"):
        twin.build(tmp_path)
    with pytest.raises(AssetError, match=r"vision tower .* \d+ tensors differ, first .*: expected"):
        twin.build(folder, architecture="ViT-S-32-alt")
    file = folder / "open_clip_model.safetensors"
    torch.save(load_file(file), folder / "open_clip_pytorch_model.bin")
    file.unlink()
    with pytest.raises(AssetError, match=r"only open_clip_pytorch_model\.bin, a pickle"):
        twin.build(f"local-dir:{folder}")
    with pytest.raises(ConfigError, match="class_token: this tower has none"):
        TWINS["open_clip_resnet"].build(copied("open_clip_resnet"), class_token=True)


# --- sounds -------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_end_of_a_sound_is_masked_or_left_out_of_the_means(built):
    short = twins.sounds()[0]  # 0.3 of the 1 s that the twin hears
    encoder = built("whisper")
    features = encoder.encode([short, twins.sounds()[2]])
    assert features.mask is not None
    assert features.mask.sum(dim=1).tolist() == [15, 50]
    pooled = built("whisper", tokens=3).encode([short])
    assert pooled.mask is None
    thirds = features.tokens[0, :15].view(3, 5, -1).mean(dim=1)
    assert torch.allclose(pooled.tokens[0], thirds, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("name", "prefix"), [("whisper", 0), ("ast", 2)])
def test_a_layer_is_what_its_block_says(name, prefix, built):
    samples = torch.stack([built(name).preprocess(medium) for medium in twins.sounds()])
    outputs = []
    hooks = [
        block.register_forward_hook(
            lambda _, __, out: outputs.append(out[0] if isinstance(out, tuple) else out)
        )
        for block in built(name).network.layers
    ]
    built(name)(samples)
    for hook in hooks:
        hook.remove()
    for layer, index in ((-2, 1), (1, 0)):
        tokens = built(name, layer=layer)(samples).tokens
        assert torch.allclose(tokens, outputs[index][:, prefix:], atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("name", "bands", "steps"), [("clap", 8, 32), ("ast", 4, 10)])
def test_tokens_are_means_over_bands_and_equal_times(name, bands, steps, built):
    samples = torch.stack([built(name).preprocess(medium) for medium in twins.sounds()])
    every = built(name)(samples).tokens.view(3, bands, 2, steps // 2, 16)
    halves = built(name, tokens=2)(samples).tokens
    assert torch.allclose(halves, every.mean((1, 3)), atol=1e-5)
    if name == "ast":
        encoder = built(name, tokens=2, class_token=True)
        first = encoder.network(samples).last_hidden_state[:, 0]
        assert torch.allclose(encoder(samples).tokens[:, 0], first, atol=1e-6)
        assert encoder.feature_shape == (3, 16)


def test_clap_draws_the_same_part_and_leaves_the_generator_alone(built):
    long = twins.sounds()[2]
    np.random.seed(5)
    before = np.random.get_state()[1].copy()
    first = built("clap").preprocess(long)
    assert np.array_equal(np.random.get_state()[1], before)
    np.random.seed(6)
    assert torch.equal(built("clap").preprocess(long), first)


def test_invalid_settings_of_audio_encoders(built, copied):
    with pytest.raises(MediaError, match="clap: expected Audio, got Image"):
        built("clap").preprocess(twins.pictures()[0])
    click = Audio.from_numpy(np.zeros(40, np.float32), 16_000)
    with pytest.raises(MediaError, match=r"ast: Audio.*cannot be prepared \(40 samples at 16000"):
        built("ast").preprocess(click)
    with pytest.raises(ConfigError, match=r"whisper\.tokens: expected 1 to 50, got 51"):
        built("whisper", tokens=51)
    folder = copied("clap")
    twins.rewrite(folder, "preprocessor_config.json", truncation="fusion")
    with pytest.raises(AssetError, match=r"enable_fusion is False .* truncation is 'fusion'"):
        TWINS["clap"].build(folder)
    folder = copied("whisper")
    twins.rewrite(folder, "preprocessor_config.json", feature_size=128)
    with pytest.raises(AssetError, match=r"80 bands of 100 frames, but .* makes 128 of 100"):
        TWINS["whisper"].build(folder)
    folder = copied("ast")
    twins.rewrite(folder, "preprocessor_config.json", max_length=64)
    with pytest.raises(AssetError, match=r"takes 98 frames of 32 bands, .* makes 64 of 32"):
        TWINS["ast"].build(folder)
    with pytest.raises(AssetError, match="type 'clip'; did you mean 'clap'"):
        TWINS["clap"].build(copied("clip"))


# --- clips --------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", ["videomae", "vjepa2"])
def test_layers_steps_and_grid_of_clips(name, built):
    samples = torch.stack([built(name).preprocess(medium) for medium in twins.clips()])
    every = built(name)(samples).tokens
    width = every.shape[-1]
    assert every.shape == (3, 2 * 4 * 4, width)
    pooled = built(name, steps=1, grid=2)
    assert pooled.feature_shape == (4, width)
    corner = every.view(3, 2, 4, 4, width)[:, :, 2:, :2].mean((1, 2, 3))  # bottom left
    assert torch.allclose(pooled(samples).tokens[:, 2], corner, atol=1e-5)
    outputs = []
    hook = (
        built(name)
        .network.encoder.layer[1]
        .register_forward_hook(
            lambda _, __, out: outputs.append(out[0] if isinstance(out, tuple) else out)
        )
    )
    built(name)(samples)
    hook.remove()
    assert torch.allclose(built(name, layer=-2)(samples).tokens, outputs[0], atol=1e-5)


def test_invalid_settings_of_video_encoders(built):
    with pytest.raises(ConfigError, match="frames: this model takes 4, got 8"):
        built("videomae", frames=8)
    with pytest.raises(ConfigError, match="frames: expected a multiple of 2, got 5"):
        built("vjepa2", frames=5)
    assert built("vjepa2", frames=8).feature_shape[0] == 4 * 16
    with pytest.raises(ConfigError, match="steps: expected 1 to 2, got 3"):
        built("videomae", steps=3)
    with pytest.raises(MediaError, match="expected Video, got Image"):
        built("videomae").preprocess(twins.pictures()[0])


# --- in the cache, and from outside the package ---------------------------------------------------


@pytest.mark.parametrize("name", ["clip", "whisper", "siglip2", "videomae"])
def test_a_cache_holds_what_the_encoder_says(name, built, tmp_path):
    """Through mmllm.data: masks too, and read again from the disk."""
    encoder, media = built(name), TWINS[name].media()
    model = SimpleNamespace(encoders={"in": encoder}, decoders={}, device=torch.device("cpu"))
    expected = encoder.encode(media)
    for _ in range(2):
        store = FeatureStore(tmp_path)
        found = FeatureCache(model, store=store).input_media("in", media)  # pyright: ignore
        store.flush()
        assert torch.allclose(found["features"], expected.tokens, atol=1e-5)
        if expected.mask is None:
            assert found["feature_mask"] is None
        else:
            assert torch.equal(found["feature_mask"], expected.mask)
    assert FeatureStore(tmp_path, complete=True).namespace(
        "features", "encoders.in", encoder.fingerprint
    )
    assert [encoder.fingerprint in path.name for path in tmp_path.glob("features-*")] == [True]


def test_the_example_of_an_own_encoder(monkeypatch, tmp_path):
    """The file and the entry that docs/encoders.md shows, as a user would have them."""
    page = (Path(__file__).parents[2] / "docs" / "encoders.md").read_text(encoding="utf-8")
    blocks = dict(re.findall(r"^```(python|yaml)\n(.*?)^```", page, re.DOTALL | re.MULTILINE))
    (tmp_path / "my_encoder.py").write_text(blocks["python"])
    monkeypatch.syspath_prepend(tmp_path)
    entry = yaml.safe_load(blocks["yaml"])["encoders"]["image"]
    assert entry["type"] == "my_encoder:MyConfig"
    (tmp_path / entry["weights"]).mkdir(parents=True)
    network = torch.nn.Conv2d(3, 64, kernel_size=8, stride=8)
    file = tmp_path / entry["weights"] / "model.safetensors"
    save_file(network.state_dict(), file)
    monkeypatch.chdir(tmp_path)

    settings = config.parse_component("encoders", entry, "encoders.image")
    encoder = config.build(settings)
    media = twins.pictures()
    features = encoder.encode(media)
    assert features.tokens.shape == (3, *encoder.feature_shape) == (3, 16, 64)
    assert torch.allclose(
        features.tokens[1],
        network(encoder.preprocess(media[1])[None]).flatten(2)[0].T,
        atol=1e-6,
    )
    assert not features.tokens.requires_grad
    again = config.parse_component("encoders", config.dump(settings), "encoders.image")
    assert again == settings
    before = encoder.fingerprint
    assert config.build(again).fingerprint == before
    save_file({key: value + 1 for key, value in network.state_dict().items()}, file)
    assert config.build(again).fingerprint != before
    with pytest.raises(ConfigError, match=r"unknown key 'sides'; did you mean 'side'\?"):
        config.parse_component("encoders", {**entry, "sides": 4}, "encoders.image")
    with pytest.raises(MediaError, match="expected Image, got Audio"):
        encoder.preprocess(twins.sounds()[0])


def test_an_unknown_family_suggests_the_near_one():
    with pytest.raises(ConfigError, match=r"unknown type 'wisper'; did you mean 'whisper'\?"):
        config.parse_component("encoders", {"type": "wisper"}, "encoders.audio")


# --- invalid configurations ---------------------------------------------------------------------


def test_what_a_model_does_not_have(built):
    with pytest.raises(ConfigError, match=r"layer: expected 1 to 3, or -3 to -1 .*, got -4"):
        built("clip", layer=-4)
    with pytest.raises(ConfigError, match=r"grid: expected 1 to 4 .* 4 x 4 patches\), got 5"):
        built("clip", grid=5)
    with pytest.raises(ConfigError, match=r"class_token: .*'siglip' has none"):
        built("siglip", class_token=True)
    with pytest.raises(ConfigError, match=r"twin\.dtype: input should be 'float32'"):
        built("clip", dtype="int8")
    with pytest.raises(MediaError, match="expected Image, got Audio"):
        built("clip").preprocess(Audio.from_numpy(np.zeros(8, np.float32), 8))


def test_wrong_folders_say_what_is_there(copied, tmp_path):
    twin = TWINS["clip"]
    with pytest.raises(AssetError, match="does not exist"):
        twin.build(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("here")
    with pytest.raises(AssetError, match=r"no readable config\.json \(notes\.txt\)"):
        twin.build(tmp_path)
    with pytest.raises(AssetError, match="expected a folder, got the file"):
        twin.build(tmp_path / "notes.txt")
    folder = copied("siglip")
    twins.rewrite(folder, "preprocessor_config.json", size={"height": 48, "width": 40})
    with pytest.raises(AssetError, match=r"sees 32 x 32 pixels, but .* makes 48 x 40"):
        twin.build(folder)
    twins.rewrite(folder, "preprocessor_config.json", size={"shortest_edge": 32})
    with pytest.raises(AssetError, match=r"samples of different shapes \(\[3, 32, 42\] and"):
        twin.build(folder)
    folder = copied("clip")
    twins.rewrite(folder, "config.json", model_type="dinov4")
    with pytest.raises(AssetError, match=r"type 'dinov4'; did you mean 'dinov2'\?; this encoder"):
        twin.build(folder)


def test_weights_that_lack_a_part(copied):
    folder = copied("clip")
    file = folder / "model.safetensors"
    weights = load_file(file)
    del weights["vision_model.encoder.layers.1.mlp.fc1.weight"]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(AssetError, match=r"lacks 1 weights of CLIPVisionModel, .*layers\.1\.mlp"):
        TWINS["clip"].build(folder)
    file.write_bytes(b"no tensors")
    with pytest.raises(AssetError, match="cannot be loaded as CLIPVisionModel"):
        TWINS["clip"].build(folder)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(AssetError, match=r"copy preprocessor_config\.json"):
        TWINS["clip"].build(folder)


def test_a_pickle_is_refused_and_the_command_converts_it(copied, built):
    folder = copied("clip")
    file = folder / "model.safetensors"
    torch.save(load_file(file), folder / "pytorch_model.bin")
    file.unlink()
    with pytest.raises(AssetError, match=r"only pytorch_model\.bin, a pickle") as caught:
        TWINS["clip"].build(folder)
    python, option, program = shlex.split(str(caught.value).splitlines()[1])
    assert (python, option) == ("python", "-c")
    exec(program, {})
    media = twins.pictures()
    same = TWINS["clip"].build(folder).encode(media).tokens
    assert torch.equal(same, built("clip").encode(media).tokens)


def test_hub_ids_are_fetched_once_as_safetensors(monkeypatch, folders, built):
    asked = {}

    def snapshot_download(name, **options):
        asked.update(name=name, **options)
        return str(folders("clip"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    encoder = TWINS["clip"].build("someone/clip", revision="abc")
    assert asked["name"] == "someone/clip"
    assert asked["revision"] == "abc"
    assert not any(pattern.endswith(("bin", "*")) for pattern in asked["allow_patterns"])
    assert encoder.fingerprint == built("clip").fingerprint


def test_a_hub_that_does_not_answer(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(AssetError, match="'someone/nothing' is no folder here and cannot be"):
        TWINS["clip"].build("someone/nothing")


def test_pooling_over_time_means_equal_parts():
    tokens = torch.arange(24.0).view(1, 6, 2, 2)
    pooled = pooling.pool_time(tokens, 3)
    assert torch.equal(pooled, tokens.view(1, 3, 2, 2, 2).mean(2))
    assert torch.equal(pooling.pool_time(tokens[:, :, 0], 2)[0, 1], tokens[0, 3:, 0].mean(0))
