"""Data that users already have: each file as it is on disk becomes the conversation it means."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmllm import media
from mmllm.data.mixture import Mixture
from mmllm.errors import (
    ConfigError,
    EmptyCaptionError,
    MediaError,
    MissingMediaError,
    OutsideRootError,
    OversizedMediaError,
    PlaceholderError,
    RowError,
)
from mmllm.media import Embedded
from tests.data.files import (
    RNG,
    clip,
    contents,
    grey,
    picture,
    sound,
    source,
    write_json,
    write_tar,
)

ASK = {"prompts": ["Tell."], "direction": "understand"}
DRAW = {"prompts": ["Make {caption}."], "direction": "generate", "replies": ["Here."]}


def only(kind: str, row: Any, tmp_path: Path, **fields: Any) -> list[tuple[str, list[str]]]:
    """The contents of the conversation of a .json file with one row."""
    file = write_json(tmp_path / "rows.json", [row])
    return contents(source(kind, file=file, **fields).conversation(0, RNG(0)))


# --- NExT-GPT -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "modality"),
    [
        ({"caption": "a lab\r\n", "id": 1299, "image_name": "7.png"}, "image"),
        ({"caption": "\na lab ", "id": 1299, "video_name": "7.mp4"}, "video"),
        ({"audio_id": 106158, "audio_name": "7.wav", "caption": "a lab"}, "audio"),
    ],
)
def test_nextgpt_pairs_lie_in_the_folder_of_their_modality(row, modality, tmp_path: Path):
    for name, make in (("images/7.png", picture), ("videos/7.mp4", clip), ("audios/7.wav", sound)):
        make(tmp_path / name)
    file = write_json(tmp_path / "pairs.json", [row])
    pairs = source("nextgpt", file=file, **DRAW)
    asked, answered = pairs.conversation(0, RNG(0))
    assert contents([asked, answered]) == [
        ("user", ["Make a lab."]),
        ("assistant", ["Here.", f"<{modality}=a lab>"]),
    ]
    assert answered.media[0].decoded().modality == modality
    with pytest.raises(ConfigError, match="how they are asked about"):
        source("nextgpt", file=file)


def test_nextgpt_comprehension_shows_the_input(tmp_path: Path):
    row = {
        "input_audio": "106158.wav",
        "conversations": [
            {"from": "human", "value": "<audio>\nWhat's the audio really about?"},
            {"from": "gpt", "value": "A train running and then a horn honking"},
        ],
    }
    assert only("nextgpt", row, tmp_path) == [
        ("user", ["<audio=None>", "What's the audio really about?"]),
        ("assistant", ["A train running and then a horn honking"]),
    ]


def test_nextgpt_generation_makes_the_output_from_its_caption(tmp_path: Path):
    sound(tmp_path / "my" / "sounds" / "106158.wav")
    row = {
        "output_audio": "106158.wav",
        "audio_captions": "A train running",
        "audio_caption_embeddings": "106158.wav.npy",
        "conversations": [
            {"from": "human", "value": "render a recording of A train running"},
            {"from": "gpt", "value": "Here is a audio for your reference <audio>"},
        ],
    }
    assert only("nextgpt", row, tmp_path)[1] == (
        "assistant",
        ["Here is a audio for your reference", "<audio=A train running>"],
    )
    file = write_json(tmp_path / "my" / "rows.json", [row])
    made = source("nextgpt", file=file, folders={"audio": "sounds"}).conversation(0, RNG(0))[1]
    assert made.media[0].to_numpy().shape == (1, 1600)


def test_nextgpt_instructions_may_have_captions_alone(tmp_path: Path):
    row = {
        "image_captions": ["a wolf", "two wolves"],
        "image_caption_embeddings": ["it_img_0.jpg.npy", "it_img_1.jpg.npy"],
        "conversations": [
            {"from": "human", "value": "A wolf, please.", "input_modality": "text"},
            {"from": "gpt", "value": "Sure. <image>", "caption": "a wolf"},
            {"from": "human", "value": "Two."},
            {"from": "gpt", "value": "<image> There."},
        ],
        "source_data": {"id": 3},
    }
    assert only("nextgpt", row, tmp_path)[1::2] == [
        ("assistant", ["Sure.", "<image=a wolf>"]),
        ("assistant", ["<image=two wolves>", "There."]),
    ]
    llava = {
        "input_image": ["1.png", "1.png"],
        "conversations": [
            {"from": "human", "value": "What?\n<image>"},
            {"from": "gpt", "value": "A cat."},
            {"from": "human", "value": "<image>\nWhere?"},
            {"from": "gpt", "value": "There."},
        ],
    }
    assert only("nextgpt", llava, tmp_path)[::2] == [
        ("user", ["What?", "<image=None>"]),
        ("user", ["<image=None>", "Where?"]),
    ]
    alpaca = {
        "conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]
    }
    assert only("nextgpt", alpaca, tmp_path) == [("user", ["2 + 2?"]), ("assistant", ["4"])]


def test_raw_mosit_finds_its_media_by_name_and_drops_descriptions(tmp_path: Path):
    row = {
        "conversation": [
            {"from": "human", "value": "Like this <Image>mosit_i_1.png</Image> but louder."},
            {
                "from": "gpt",
                "value": "Hear: <Audio>mosit_a_2.wav</Audio> and <image>a dog, maybe</image> see "
                "<Video>mosit_v_3.mp4</Video>",
            },
        ],
        "image_list": [{"image_name": "mosit_i_1.png", "data_source": "web", "caption": "a dog"}],
        "audio_list": [{"audio_name": "mosit_a_2.wav", "caption": "a bark"}],
        "video_list": [{"video_name": "mosit_v_3.mp4", "caption": "it runs"}],
    }
    assert only("nextgpt", row, tmp_path) == [
        ("user", ["Like this", "<image=a dog>", "but louder."]),
        ("assistant", ["Hear:", "<audio=a bark>", "and", "see", "<video=it runs>"]),
    ]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"input_image": []}, PlaceholderError, "<image> stands in the text"),
        ({"input_image": ["1.png", "2.png"]}, PlaceholderError, "1 image without a <image>"),
        ({"input_image": "../1.png"}, OutsideRootError, "outside the dataset's root"),
        ({"input_image": "https://a.b/1.png"}, OutsideRootError, "no local file"),
        ({"image_captions": [""], "output_image": "1.png"}, PlaceholderError, "1 image without"),
        ({"conversations": [], "input_image": None}, RowError, "the assistant says nothing"),
        ({"conversations": [{"from": "robot", "value": "x"}]}, RowError, "unknown speaker 'robot'"),
        ({"conversations": [{"from": "human", "value": None}]}, RowError, "has no text"),
        ({"conversations": ["Hi"]}, RowError, "expected a turn"),
        ({"input_image": 7}, RowError, "the name of a file, got 7"),
        ({"input_image": "a\0b"}, RowError, "the name of a file"),
        (
            {"conversations": [{"from": "gpt", "value": "Hi"}], "input_image": None},
            RowError,
            "speaks first",
        ),
    ],
)
def test_a_row_that_is_no_conversation_says_why(changes, error, message, tmp_path: Path):
    turns = [{"from": "human", "value": "<image> What?"}, {"from": "gpt", "value": "A cat."}]
    row = {"input_image": "1.png", "conversations": turns, **changes}
    with pytest.raises(error, match=message):
        only("nextgpt", row, tmp_path)


def test_what_the_assistant_makes_needs_a_caption(tmp_path: Path):
    turns = [{"from": "human", "value": "Draw."}, {"from": "gpt", "value": "<image>"}]
    with pytest.raises(EmptyCaptionError, match="needs a caption"):
        only("nextgpt", {"output_image": "1.png", "conversations": turns}, tmp_path)


def test_links_do_not_lead_out_of_the_root(tmp_path: Path):
    picture(tmp_path / "secret.png")
    (tmp_path / "data" / "images").mkdir(parents=True)
    (tmp_path / "data" / "images" / "link.png").symlink_to(tmp_path / "secret.png")
    row = {"image_name": "link.png", "caption": "a"}
    file = write_json(tmp_path / "data" / "a.json", [row])
    with pytest.raises(OutsideRootError, match=r"link\.png"):
        source("nextgpt", file=file, **ASK).conversation(0, RNG(0))
    (tmp_path / "alias").symlink_to(tmp_path / "data")  # the root itself may be a link
    picture(tmp_path / "data" / "images" / "own.png")
    write_json(tmp_path / "data" / "a.json", [{**row, "image_name": "own.png"}])
    source("nextgpt", file=str(tmp_path / "alias" / "a.json"), **ASK).conversation(0, RNG(0))


# --- LLaVA, Alpaca ------------------------------------------------------------------------------


def test_llava_fills_its_placeholders_in_order(tmp_path: Path):
    for value in (10, 20):
        picture(tmp_path / "train" / f"{value}.png", value)
    row = {
        "id": "000000033471",
        "image": ["train/10.png", "train/20.png"],
        "conversations": [
            {"from": "human", "value": "<image>\n<image>\nWhich is darker?"},
            {"from": "gpt", "value": "The first."},
        ],
    }
    file = write_json(tmp_path / "llava.jsonl", [row])
    llava = source("llava", file=file)
    asked, answered = llava.conversation(0, RNG(0))
    assert grey(asked) == [10, 20]
    assert contents([asked, answered])[0][1][2] == "Which is darker?"
    assert llava.name(0) == "000000033471"


def test_alpaca_puts_the_input_behind_the_instruction(tmp_path: Path):
    row = {"instruction": "Add.", "input": "2 and 2", "output": "4"}
    assert only("alpaca", row, tmp_path) == [("user", ["Add.\n\n2 and 2"]), ("assistant", ["4"])]
    assert only("alpaca", {**row, "input": ""}, tmp_path)[0] == ("user", ["Add."])
    with pytest.raises(RowError, match="`output` is empty"):
        only("alpaca", {**row, "output": ""}, tmp_path)


# --- chat messages ------------------------------------------------------------------------------


def encoded(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def test_messages_in_the_format_of_openai(tmp_path: Path):
    picture(tmp_path / "a.png", 30)
    data = encoded(sound(tmp_path / "a.wav"))
    content = [
        {"type": "text", "text": "What is this?"},
        {"type": "image_url", "image_url": {"url": "a.png"}},
        {
            "type": "image_url",
            "image_url": {"url": f"data:image/png;base64,{encoded(tmp_path / 'a.png')}"},
        },
        {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}},
        {"type": "video_url", "video_url": {"url": "a.mp4"}},
    ]
    clip(tmp_path / "a.mp4", 200)
    rows = [
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": content},
                {"role": "assistant", "content": "Grey."},
            ]
        }
    ]
    file = write_json(tmp_path / "rows.jsonl", rows)
    _, asked, answered = source("messages", file=file).conversation(0, RNG(0))
    assert [medium.modality for medium in asked.media] == ["image", "image", "audio", "video"]
    assert grey(asked)[:2] == [30, 30]
    assert asked.media[2].to_numpy().shape == (1, 1600)
    assert asked.media[3].to_numpy().shape == (4, 16, 16, 3)
    assert answered.text == "Grey."


def test_messages_in_the_convention_of_datasets_take_media_from_columns(tmp_path: Path):
    stored = [
        {"bytes": picture(tmp_path / f"{value}.png", value).read_bytes(), "path": None}
        for value in (10, 20)
    ]
    part = {"type": "image", "text": None}
    table = pa.table(
        {
            "images": [stored],
            "messages": [
                [
                    {"role": "user", "content": [part, {"type": "text", "text": "And?"}, part]},
                    {"role": "assistant", "content": [{"type": "text", "text": "Two."}]},
                ]
            ],
        }
    )
    pq.write_table(table, tmp_path / "rows.parquet")
    rows = source("messages", file=str(tmp_path / "rows.parquet"))
    asked, answered = rows.conversation(0, RNG(0))
    assert contents([asked, answered]) == [
        ("user", ["<image=None>", "And?", "<image=None>"]),
        ("assistant", ["Two."]),
    ]
    assert grey(asked) == [10, 20]
    assert isinstance(asked.media[0].source, Embedded), "the bytes are read when they are needed"


@pytest.mark.parametrize(
    ("part", "error"),
    [
        ({"type": "image_url", "image_url": {"url": "http://a.b/c.png"}}, OutsideRootError),
        ({"type": "image_url", "image_url": {"url": "file:///etc/hostname"}}, OutsideRootError),
        ({"type": "image_url", "image_url": {"url": "data:image/png,abc"}}, RowError),
        ({"type": "input_audio", "input_audio": {"data": "%%%"}}, RowError),
        ({"type": "smell"}, RowError),
        ({"type": "image"}, PlaceholderError),
        ({"type": "image", "image": 7}, RowError),
    ],
)
def test_unavailable_parts_are_refused(part, error, tmp_path: Path):
    messages = [{"role": "user", "content": [part]}, {"role": "assistant", "content": "x"}]
    with pytest.raises(error):
        only("messages", {"messages": messages}, tmp_path)


def test_too_many_bytes_are_refused_before_they_are_decoded(tmp_path: Path):
    url = f"data:image/png;base64,{encoded(picture(tmp_path / 'a.png'))}"
    content = [{"type": "image_url", "image_url": {"url": url}}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "x"}]
    with media.limits(bytes=20), pytest.raises(OversizedMediaError, match="limit of 20"):
        only("messages", {"messages": messages}, tmp_path)


# --- tables -------------------------------------------------------------------------------------


def test_csv_of_audiocaps_names_files_by_a_template(tmp_path: Path):
    sound(tmp_path / "wav" / "0091139.wav")
    (tmp_path / "train.csv").write_text(
        "audiocap_id,youtube_id,start_time,caption\n"
        '0091139,r1nicOVtvkQ,130,"A woman talks, nearby"\n7,x,0,"two\nlines"\n'
    )
    fields = {"file": str(tmp_path / "train.csv"), "root": str(tmp_path / "wav")}
    pairs = source("table", path="{audiocap_id}.wav", modality="audio", **fields, **ASK)
    asked, answered = pairs.conversation(0, RNG(0))
    assert len(pairs) == 2
    assert pairs.name(0) == "0091139.wav", "an id is a text, however it looks"
    assert answered.text == "A woman talks, nearby"
    assert asked.media[0].to_numpy().shape == (1, 1600)
    assert pairs.conversation(1, RNG(0))[1].text == "two\nlines"


def test_csv_of_webvid_and_tsv_of_cc3m(tmp_path: Path):
    (tmp_path / "webvid.csv").write_text(
        "videoid,contentUrl,duration,page_dir,name\n1066674784,https://x,PT00H00M10S,000001_000050,Sea\n"
    )
    clips = source(
        "table",
        file=str(tmp_path / "webvid.csv"),
        path="{page_dir}/{videoid}.mp4",
        caption="name",
        modality="video",
        **DRAW,
    )
    clip(tmp_path / "000001_000050" / "1066674784.mp4", 90)
    asked, answered = clips.conversation(0, RNG(0))
    assert asked.text == "Make Sea."
    assert answered.media[0].to_numpy().shape[0] == 4
    (tmp_path / "cc3m.tsv").write_text('a "very" typical bus\tbus.png\nsierra looked\tb.png\n')
    pictures = source(
        "table",
        file=str(tmp_path / "cc3m.tsv"),
        header=["caption", "image"],
        path="{image}",
        modality="image",
        where={"image": "bus.png"},
        **DRAW,
    )
    assert len(pictures) == 1
    assert contents(pictures.conversation(0, RNG(0)))[1] == (
        "assistant",
        ["Here.", '<image=a "very" typical bus>'],
    )


def test_parquet_holds_the_media_themselves(tmp_path: Path):
    stored = [
        {"bytes": picture(tmp_path / f"{value}.png", value).read_bytes(), "path": f"{value}.png"}
        for value in range(5)
    ]
    for number, part in enumerate((stored[:3], stored[3:])):
        captions = [[f"grey {entry['path']}", "grey"] for entry in part]
        table = pa.table({"image": part, "captions": captions, "split": ["a"] * len(part)})
        pq.write_table(table, tmp_path / f"train-{number}.parquet", row_group_size=2)
    fields = {"embedded": "image", "caption": "captions", "modality": "image"}
    pairs = source("table", file=str(tmp_path / "train-*.parquet"), **fields, **ASK)
    assert len(pairs) == 5
    assert [grey(pairs.conversation(i, RNG(0))[0]) for i in (4, 0, 3, 2, 1)] == [
        [4],
        [0],
        [3],
        [2],
        [1],
    ]
    texts = {pairs.conversation(2, RNG(seed))[1].text for seed in range(20)}
    assert texts == {"grey", "grey 2.png"}
    assert pairs.name(3) == "3 (3.png)"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"caption": "captoin"}, "no column 'captoin'; did you mean 'caption'"),
        ({"path": "{page}/{id}.png"}, "no column 'page'"),
        ({"path": None}, "`path` or `embedded`"),
        ({"modality": "smell"}, "unknown modality 'smell'"),
        ({"where": {"id": "9"}}, "no row has id = '9'"),
        ({"file": "nothing.csv"}, r"nothing\.csv does not exist"),
        ({"prompts": []}, "at least one text"),
    ],
)
def test_a_table_that_does_not_fit_its_config(changes, message, tmp_path: Path):
    (tmp_path / "a.csv").write_text("id,caption\n1,x\n")
    fields = {"file": str(tmp_path / "a.csv"), "path": "{id}.png", "modality": "image", **ASK}
    with pytest.raises(ConfigError, match=message):
        source("table", **{**fields, **changes})


def test_a_row_group_too_large_to_read_is_refused_with_the_remedy(tmp_path: Path, monkeypatch):
    pq.write_table(pa.table({"id": ["1"] * 100, "caption": ["x"] * 100}), tmp_path / "a.parquet")
    monkeypatch.setattr("mmllm.data.tables.GROUP_BYTES", 10)
    with pytest.raises(ConfigError, match="row_group_size=100"):
        source("table", file=str(tmp_path / "a.parquet"), path="{id}", modality="image", **ASK)


# --- webdataset ---------------------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path: Path) -> str:
    """Two shards, 3 + 2 samples; the grey of a picture is its number."""
    for shard, numbers in enumerate(((0, 1, 2), (3, 4))):
        files: dict[str, bytes] = {}
        for number in numbers:
            data = picture(tmp_path / "a.png", number).read_bytes()
            files |= {
                f"{number:05d}.png": data,
                f"{number:05d}.txt": f" grey {number}\n".encode(),
                f"{number:05d}.json": b'{"alt": "ALT %d", "width": 8}' % number,
            }
        write_tar(tmp_path / f"cc3m-{shard:05d}.tar", files)
    return str(tmp_path / "cc3m-{00000..00001}.tar")


def test_samples_of_shards_are_found_by_number(shards: str):
    pairs = source("webdataset", shards=shards, modality="image", **ASK)
    assert len(pairs) == 5
    for number in (4, 0, 3, 2, 1):
        asked, answered = pairs.conversation(number, RNG(0))
        assert (grey(asked), answered.text) == ([number], f"grey {number}")
    assert pairs.name(3) == "cc3m-00001.tar/00003"
    fields = {"direction": "generate", "prompts": ["{width}: {caption}"], "modality": "image"}
    pairs = source("webdataset", shards=shards, caption="json:alt", **fields)
    assert contents(pairs.conversation(2, RNG(0))) == [
        ("user", ["8: ALT 2"]),
        ("assistant", ["<image=ALT 2>"]),
    ]


def test_the_order_over_shards_resumes_at_any_step(shards: str):
    def drawn(steps: range) -> list[list[tuple[int, str]]]:
        pairs = source("webdataset", shards=shards, modality="image", **ASK)
        mixture = Mixture({"pairs": pairs}, seed=3)
        batches = [mixture.batch(step, 2) for step in steps]
        talks = [[pairs.conversation(d.index, mixture.rng(d)) for d in batch] for batch in batches]
        return [[(grey(asked)[0], answer.text) for asked, answer in batch] for batch in talks]

    whole = drawn(range(8))
    assert drawn(range(5, 8)) == whole[5:], "from the middle of the second epoch"
    first_epoch = [number for batch in whole for number, _ in batch][:5]
    assert sorted(first_epoch) == [0, 1, 2, 3, 4]
    assert first_epoch != sorted(first_epoch), "shuffled over both shards"


def test_the_index_is_made_once_and_again_for_another_tar(shards: str, tmp_path: Path, monkeypatch):
    source("webdataset", shards=shards, modality="image", **ASK)
    kept = tmp_path / "cc3m-00000.tar.index.arrow"
    assert kept.is_file()

    def never(*_: object, **__: object) -> None:
        raise AssertionError("the headers are read again")

    with monkeypatch.context() as patch:
        patch.setattr("tarfile.open", never)
        assert len(source("webdataset", shards=shards, modality="image", **ASK)) == 5
    kept.write_bytes(kept.read_bytes()[:100])
    assert len(source("webdataset", shards=shards, modality="image", **ASK)) == 5
    path = picture(tmp_path / "a.png", 99)
    write_tar(tmp_path / "cc3m-00000.tar", {"9.png": path.read_bytes(), "9.txt": b"new"})
    pairs = source("webdataset", shards=shards, modality="image", **ASK)
    assert len(pairs) == 3
    assert grey(pairs.conversation(0, RNG(0))[0]) == [99]


def test_what_shards_lack_is_reported(shards: str, tmp_path: Path):
    png = picture(tmp_path / "a.png").read_bytes()
    files = {"1.png": png, "2.txt": b"no picture", "3.png": png[:40], "3.txt": b"damaged"}
    write_tar(tmp_path / "odd.tar", files)
    odd = source("webdataset", shards=str(tmp_path / "odd.tar"), modality="image", **ASK)
    with pytest.raises(EmptyCaptionError):
        odd.conversation(0, RNG(0))
    with pytest.raises(MissingMediaError, match=r"odd\.tar/2: none of \.jpg"):
        odd.conversation(1, RNG(0))
    with pytest.raises(MediaError, match=r"odd\.tar/3\.png"):
        odd.conversation(2, RNG(0))[0].media[0].to_numpy()
    pairs = source("webdataset", shards=shards, modality="image", **ASK)
    shown = pairs.conversation(0, RNG(0))[0].media[0]
    with media.limits(bytes=20), pytest.raises(OversizedMediaError, match=r"00000\.png"):
        shown.to_numpy()


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        ("a-{0..1}.tar", r"a-0\.tar does not exist"),
        ("https://a.b/c.tar", "local files"),
        ("pipe:cat a.tar", "local files"),
        ("broken.tar", "cannot be read as an uncompressed tar"),
        ("a.tar.gz", "expected an uncompressed .tar"),
    ],
)
def test_shards_that_cannot_be_read(shards, message, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.tar").write_bytes(b"no tar" * 200)
    (tmp_path / "a.tar.gz").write_bytes(b"")
    with pytest.raises(ConfigError, match=message):
        source("webdataset", shards=shards, modality="image", **ASK)
