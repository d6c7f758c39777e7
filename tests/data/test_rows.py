"""Rows as files hold them: each becomes the conversation that it means, or one clear error."""

from __future__ import annotations

import base64
import codecs
import gzip
import json
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmllm.data.sources import read_rows
from mmllm.errors import ConfigError, MediaError, RowError
from tests.data.files import RNG, contents, grey, picture, source, write_json, write_tar

HI = {"instruction": "Say hi", "input": "", "output": "hi"}
ASK = {"modality": "image", "direction": "understand", "prompts": ["What?"]}


def answers(kind: str, file: Path, **fields: Any) -> list[Any]:
    """The assistant's text of each row, or the error message."""
    rows = source(kind, file=str(file), **fields)
    return [_answer(rows, index) for index in range(len(rows))]


def _answer(rows: Any, index: int) -> Any:
    try:
        return contents(rows.conversation(index, RNG(index)))[-1][1]
    except MediaError as error:
        return str(error)


# --- files --------------------------------------------------------------------------------------


LINES = "\n".join(json.dumps({**HI, "output": word}) for word in ("a", "b"))
LIST = json.dumps([{**HI, "output": word} for word in ("a", "b")], indent=1)


@pytest.mark.parametrize("text", [LINES, LIST], ids=["lines", "list"])
@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".ndjson", ".jsonl.gz", ".JSON", ".txt"])
def test_the_content_says_whether_it_is_a_list(text: str, suffix: str, tmp_path: Path):
    file = tmp_path / f"rows{suffix}"
    data = text.encode()
    file.write_bytes(gzip.compress(data, mtime=0) if suffix.endswith("gz") else data)
    assert answers("alpaca", file) == [["a"], ["b"]]


@pytest.mark.parametrize(
    "data",
    [
        LINES.encode("utf-8-sig"),
        LIST.encode("utf-8-sig"),
        LINES.encode("utf-16"),
        codecs.BOM_UTF16_BE + LIST.encode("utf-16-be"),
        LINES.encode("utf-32"),
        LINES.replace("\n", "\r\n").encode(),
        LINES.replace("\n", "\r").encode(),
        f"\n\n{LINES}\n \n".encode(),
        gzip.compress(LINES.encode("utf-8-sig"), mtime=0),
    ],
)
def test_byte_order_marks_and_line_ends_are_no_text(data: bytes, tmp_path: Path):
    (tmp_path / "rows.jsonl").write_bytes(data)
    assert answers("alpaca", tmp_path / "rows.jsonl") == [["a"], ["b"]]


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1e"])
def test_only_line_feeds_end_a_line(mark: str, tmp_path: Path):
    text = f"first{mark}second"
    as_it_is = json.dumps({**HI, "output": text}, ensure_ascii=False)
    (tmp_path / "rows.jsonl").write_text(f"{as_it_is}\n{json.dumps(HI)}\n", encoding="utf-8")
    assert answers("alpaca", tmp_path / "rows.jsonl") == [[text], ["hi"]]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "line 2: not valid JSON: "),
        (b"[1, 2]", r"line 2: expected an object, got \[1, 2\]"),
        (b"null", "line 2: expected an object, got None"),
        (b"[" * 100_000, "line 2: not valid JSON: .*nested too deeply"),
        (b'{"instruction": "a", "output": "caf\xe9"}', "not Unicode at character 3.*not UTF-8"),
        (b'{"instruction": "a", "output": "\\ud83d"}', "not Unicode at character 0"),
        (b'{"instruction": ' + b"9" * 5000 + b', "output": "b"}', "got inf"),
        (b'{"instruction": "a"', "line 2: not valid JSON: "),
        (b"{}", "`instruction` or `output` is empty or missing"),
    ],
)
def test_a_line_that_cannot_be_read_costs_itself(line: bytes, message: str, tmp_path: Path):
    good = json.dumps(HI).encode()
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join([good, line, good]))
    rows = source("alpaca", file=str(tmp_path / "rows.jsonl"))
    assert [contents(rows.conversation(i, RNG(0)))[1][1] for i in (0, 2)] == [["hi"], ["hi"]]
    with pytest.raises(RowError, match=message):
        rows.conversation(1, RNG(0))
    assert rows.name(1) == "1"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the file is empty"),
        (b"\xef\xbb\xbf \n", "the file is empty"),
        (b"[]", "expected a non-empty list of objects"),
        (b"[1, 2]", "row 0: expected an object, got 1"),
        (b'[{"a": 1}, {"a": ', "not valid JSON"),
        (b'[\n{"a": 1},\n{"a": }\n]', "not valid JSON: .*line 3"),
        (b"no json\nat all", "line 1: not valid JSON"),
        (b"\x1f\x8b\x08damaged", "not valid JSON"),
        (gzip.compress(LINES.encode(), mtime=0)[:-9], "not valid JSON"),
    ],
)
def test_a_file_without_rows_is_refused_when_it_is_opened(
    data: bytes, message: str, tmp_path: Path
):
    (tmp_path / "rows.json").write_bytes(data)
    with pytest.raises(ConfigError, match=message):
        read_rows(str(tmp_path / "rows.json"), None, "stage.data.rows")


def test_where_keeps_rows_that_cannot_be_read(tmp_path: Path):
    rows = [{**HI, "split": "train"}, {**HI, "split": ["train"]}, {**HI, "split": "test"}]
    text = "\n".join([*map(json.dumps, rows), "{"])
    (tmp_path / "rows.jsonl").write_text(text)
    found = answers("alpaca", tmp_path / "rows.jsonl", where={"split": "train"})
    assert found[0] == ["hi"]
    assert found[1].startswith("line 4: not valid JSON")
    assert len(found) == 2
    with pytest.raises(ConfigError, match="no row has split = 'none'"):
        source("alpaca", file=str(tmp_path / "rows.jsonl"), where={"split": "none"})


# --- conversations ------------------------------------------------------------------------------

PART = {"type": "image", "file": "a.jpg", "caption": "ok"}


def talk(asked: Any, answer: Any = "yes", role: Any = "user") -> dict[str, Any]:
    return {
        "messages": [{"role": role, "content": asked}, {"role": "assistant", "content": answer}]
    }


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"conversation": []}, "expected a list of `messages`, got None"),
        ({"messages": None}, "expected a list of `messages`, got None"),
        ({"messages": "hi"}, "expected a list of `messages`, got 'hi'"),
        ({"messages": []}, "the assistant says nothing"),
        ({"messages": ["hi"]}, "expected a turn"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "the assistant says nothing"),
        ({"messages": [{"role": "assistant", "content": "hi"}]}, "the assistant speaks first"),
        (talk("hi", ""), "a turn of 'assistant' is empty"),
        (talk(" \n"), "a turn of 'user' is empty"),
        (talk("x", role="tool"), "unknown speaker 'tool'"),
        (talk("x", role=["user"]), r"unknown speaker \['user'\]"),
        (talk("x", role=None), "unknown speaker None"),
        (talk(None), "expected a text or a list of parts, got None"),
        (talk(5), "expected a text or a list of parts, got 5"),
        (talk(["image"]), "expected a part .*got 'image'"),
        (talk([{"text": "hi"}]), "expected a part"),
        (talk([{"type": "text"}]), "a text part has no text"),
        (talk([{"type": "text", "text": 5}]), "a text part has no text"),
        (talk([{"type": ["text"], "text": "a"}]), "expected a part"),
        (talk([{"type": "smell", "file": "a"}]), "unknown modality 'smell'"),
        (talk([{"type": "image"}]), "an image that 'user' shows has no file"),
        (talk([{"type": "image", "file": 5}]), "the name of a file, got 5"),
        (talk("draw", [{**PART, "caption": None}]), "needs a caption"),
        (talk("draw", [{**PART, "caption": float("nan")}]), "needs a caption"),
        (talk("draw", [{**PART, "caption": {"en": "x"}}]), "caption: expected a text"),
    ],
)
def test_dialogues_say_what_is_wrong_with_a_row(row: Any, message: str, tmp_path: Path):
    rows = source("dialogues", file=write_json(tmp_path / "rows.jsonl", [talk("hi"), row]))
    assert contents(rows.conversation(0, RNG(0)))[1] == ("assistant", ["yes"])
    with pytest.raises(RowError, match=message):
        rows.conversation(1, RNG(0))


def test_text_parts_hold_their_words_under_several_names(tmp_path: Path):
    rows = [
        talk([{"type": "text", key: "What is red?"}], [{"type": "text", key: "A cherry."}])
        for key in ("text", "value", "content")
    ]
    rows += [talk([{"type": "text", "words": "hi"}]), talk(["image"]), talk("q", [])]
    file = Path(write_json(tmp_path / "rows.jsonl", rows))
    found = answers("messages", file)
    assert found[:3] == [["A cherry."]] * 3
    assert found[3].startswith("a text part has no text, but {'type'")
    assert found[4].startswith("expected a part {type: text, text}")
    assert found[5] == "a turn of 'assistant' is empty"


def test_a_speaker_may_be_anything_but_unknown(tmp_path: Path):
    turns = [{"from": ["human"], "value": "?"}, {"from": "gpt", "value": "7"}]
    good = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "7"}]
    rows = [{"conversations": turns}, {"conversations": good}]
    found = answers("llava", Path(write_json(tmp_path / "rows.json", rows)))
    assert found[0].startswith("unknown speaker ['human']; known are system, human, user, gpt")
    assert found[1] == ["7"]


@pytest.mark.parametrize("text", [" " * 300_000, "<image>" * 40_000, "<image> " * 40_000])
def test_long_texts_are_read_once(text: str, tmp_path: Path):
    """In linear time: no pattern searches the rest of the text at each tag or blank."""
    turns = [{"from": "human", "value": f"?{text}?"}, {"from": "gpt", "value": "7"}]
    rows = [{"conversations": turns}, {"conversation": turns}]
    nextgpt = source("nextgpt", file=write_json(tmp_path / "rows.json", rows))
    began = time.perf_counter()
    for index in range(2):
        _answer(nextgpt, index)
    assert time.perf_counter() - began < 20


# --- captions -----------------------------------------------------------------------------------

CAPTIONS = {
    "ok": "ok",
    42: "42",
    3.5: "3.5",
    0: "0",
    " padded\r\n": "padded",
    None: None,
    "": None,
    "nan": "nan",  # somebody wrote the word
}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        *CAPTIONS.items(),
        (float("nan"), None),
        (["two"], "two"),
        ([None, "one", float("nan"), ""], "one"),
        ([], None),
    ],
)
def test_every_reader_takes_the_same_captions(value: Any, expected: str | None, tmp_path: Path):
    picture(tmp_path / "a.png")
    row = {"file": "a.png", "modality": "image", "caption": value}
    wanted = "the caption is empty" if expected is None else [expected]
    pairs = write_json(tmp_path / "pairs.json", [row])
    assert _ends(answers("pairs", Path(pairs), **ASK)[0], wanted)
    assert _ends(answers("table", Path(pairs), path="{file}", **ASK)[0], wanted)
    named = write_json(tmp_path / "named.json", [{"image_name": "a.png", "caption": value}])
    fields = {key: ASK[key] for key in ("direction", "prompts")}
    assert _ends(answers("nextgpt", Path(named), **fields)[0], wanted)
    files = {"1.png": (tmp_path / "a.png").read_bytes(), "1.json": json.dumps(row).encode()}
    write_tar(tmp_path / "a.tar", files)
    shards = source("webdataset", shards=str(tmp_path / "a.tar"), caption="json:caption", **ASK)
    assert _ends(_answer(shards, 0), wanted)
    made = [{"type": "image", "image": "a.png", "file": "a.png", "caption": value}]
    wanted = "needs a caption" if expected is None else [f"<image={expected}>"]
    for kind in ("messages", "dialogues"):
        file = write_json(tmp_path / f"{kind}.json", [talk("Draw.", made)])
        assert _ends(answers(kind, Path(file))[0], wanted)


def _ends(found: Any, wanted: Any) -> bool:
    return found.endswith(wanted) if isinstance(wanted, str) and found else found == wanted


@pytest.mark.parametrize("value", [True, {"en": "x"}, [["x"]], float("inf"), [{"a": 1}]])
def test_what_is_no_caption_is_refused(value: Any, tmp_path: Path):
    row = {"file": "a.png", "modality": "image", "caption": value}
    found = answers("pairs", Path(write_json(tmp_path / "rows.json", [row])), **ASK)
    assert found[0].startswith("caption: expected a text, a number or a list of them, got ")


def test_parquet_holds_nan_and_lists(tmp_path: Path):
    picture(tmp_path / "a.png")
    values = pa.array([float("nan"), 2.5, None])
    pq.write_table(pa.table({"file": ["a.png"] * 3, "caption": values}), tmp_path / "a.parquet")
    found = answers("table", tmp_path / "a.parquet", path="{file}", **ASK)
    assert [_ends(found[0], "empty"), found[1], _ends(found[2], "empty")] == [True, ["2.5"], True]


def test_alpaca_takes_numbers_and_one_of_several_answers(tmp_path: Path):
    rows = [
        {**HI, "output": 42},
        {**HI, "output": 0},
        {**HI, "output": ["a"]},
        {**HI, "instruction": 3, "input": float("nan")},
        {**HI, "output": {"a": 1}},
        {**HI, "output": " "},
    ]
    file = Path(write_json(tmp_path / "rows.json", rows))
    assert answers("alpaca", file)[:4] == [["42"], ["0"], ["a"], ["hi"]]
    assert contents(source("alpaca", file=str(file)).conversation(3, RNG(0)))[0][1] == ["3"]
    assert answers("alpaca", file)[4].startswith("output: expected a text")
    assert answers("alpaca", file)[5].startswith("`instruction` or `output` is empty")


# --- templates ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("What is {}?", "names no field"),
        ("What is {0}?", "no row has a field '0'"),
        ("answer as {", "write {{ for a brace"),
        ("answer as }", "write {{ for a brace"),
        ("{caption.foo}", "no row has a field 'caption.foo'"),
        ("{caption[0]}", "no row has a field"),
        ("{caption!q}", "unknown conversion !q"),
        ("{captoin}", "no row has a field 'captoin'; did you mean 'caption'"),
        ("{caption:{kind}}", "cannot be written as"),
        ("{caption:zz}", "cannot be written as 'zz'"),
    ],
)
@pytest.mark.parametrize("field", ["prompts", "replies"])
def test_a_template_is_checked_when_the_dataset_is_opened(template, message, field, tmp_path: Path):
    row = {"file": "a.jpg", "modality": "image", "caption": "ok", "kind": "x"}
    file = write_json(tmp_path / "rows.json", [row])
    with pytest.raises(ConfigError, match=message) as caught:
        source("pairs", file=file, **{**ASK, field: [template]})
    assert f"stage.data.{field}" in str(caught.value)
    with pytest.raises(ConfigError):
        source("table", file=file, path="{file}", **{**ASK, field: [template]})
    write_tar(tmp_path / "a.tar", {"1.png": b"x", "1.txt": b"x"})
    with pytest.raises(ConfigError):
        source("webdataset", shards=str(tmp_path / "a.tar"), **{**ASK, field: [template]})


def test_templates_fill_in_what_a_row_has(tmp_path: Path):
    row = {"file": "a.png", "modality": "image", "caption": "ok", "size": 7, "id": "139"}
    lacking = {key: row[key] for key in ("file", "modality", "caption", "size")}
    file = write_json(tmp_path / "rows.json", [row, lacking, {**row, "size": None}])
    template = "{caption} {size:03d} {id:>5} {{x}} {caption!r}"
    pairs = source("pairs", file=file, **{**ASK, "replies": [template]})
    assert _answer(pairs, 0) == ["ok 007   139 {x} 'ok'"]
    assert _answer(pairs, 1) == f"the row has no 'id', which {template!r} needs"
    assert _answer(pairs, 2).startswith("the row has no 'size'")


def test_a_path_of_a_text_file_may_format_numbers(tmp_path: Path):
    """COCO's names, whose number a CSV holds as a text."""
    picture(tmp_path / "000000000139.png", 9)
    (tmp_path / "a.csv").write_text("image_id,caption\n139,a cat\nx,no number\n")
    fields = {"path": "{image_id:012d}.png", **ASK}
    table = source("table", file=str(tmp_path / "a.csv"), **fields)
    assert grey(table.conversation(0, RNG(0))[0]) == [9]
    assert table.name(0) == "000000000139.png"
    assert _answer(table, 1) == "image_id: 'x' cannot be written as '012d'"
    with pytest.raises(ConfigError, match="names no field"):
        source("table", file=str(tmp_path / "a.csv"), path="{}.png", **ASK)


@pytest.mark.parametrize("text", ['{"a": "abc"}', '{"a": []}', '{"a": [1]}', "[", '{"b": 1}'])
def test_prompts_of_a_file_are_a_list_of_texts(text: str, tmp_path: Path):
    picture(tmp_path / "a.png")
    row = {"file": "a.png", "modality": "image", "caption": "ok"}
    file = write_json(tmp_path / "rows.json", [row])
    prompts = tmp_path / "prompts.json"
    fields = {**ASK, "prompts": f"{prompts}#a"}
    prompts.write_text(text)
    with pytest.raises(ConfigError, match=r"stage\.data\.prompts"):
        source("pairs", file=file, **fields)
    prompts.write_bytes('{"a": ["Was?"]}'.encode("utf-8-sig"))
    found = contents(source("pairs", file=file, **fields).conversation(0, RNG(0)))
    assert "Was?" in found[0][1]


# --- base64 -------------------------------------------------------------------------------------


def test_base64_is_accepted_in_place_of_any_file_name(tmp_path: Path):
    data = picture(tmp_path / "a.png", 30).read_bytes()
    uri = f"data:image/png;base64,{base64.encodebytes(data).decode()}"
    shown = [{"type": "image", "file": uri, "image": uri}]
    for kind in ("messages", "dialogues"):
        file = write_json(tmp_path / f"{kind}.json", [talk(shown)])
        assert grey(source(kind, file=file).conversation(0, RNG(0))[0]) == [30]
    turns = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "7"}]
    loud = f"DATA:IMAGE/PNG;BASE64,{uri.partition(',')[2]}"
    file = write_json(tmp_path / "llava.json", [{"image": loud, "conversations": turns}])
    assert grey(source("llava", file=file).conversation(0, RNG(0))[0]) == [30]
    row = {"file": uri, "modality": "image", "caption": "ok"}
    file = write_json(tmp_path / "pairs.json", [row])
    pairs = source("pairs", file=file, **ASK)
    assert grey(pairs.conversation(0, RNG(0))[0]) == [30]
    assert len(pairs.name(0)) <= 120


@pytest.mark.parametrize("wrapped", [False, True])
def test_base64_without_its_scheme_is_not_taken_for_a_name(wrapped: bool, tmp_path: Path):
    data = bytes(range(256)) * 4000
    text = (base64.encodebytes if wrapped else base64.b64encode)(data).decode()
    file = write_json(tmp_path / "rows.json", [talk([{"type": "image", "image": text}])])
    found = answers("messages", Path(file))[0]
    assert "looks like base64: write data:image/jpeg;base64" in found
    assert len(found) < 400


def test_a_sound_may_be_a_data_uri_too(tmp_path: Path):
    data = base64.encodebytes(b"RIFF" * 20).decode()
    for text in (data, f"data:audio/wav;base64,{data}"):
        part = {"type": "input_audio", "input_audio": {"data": text, "format": "wav"}}
        file = write_json(tmp_path / "rows.json", [talk([part])])
        shown = source("messages", file=file).conversation(0, RNG(0))[0].media[0]
        assert shown.source == b"RIFF" * 20


# --- tables -------------------------------------------------------------------------------------

TABLE = {"path": "{image}", **ASK}


def test_a_row_of_a_table_costs_itself(tmp_path: Path):
    data = b'image,caption\na,red\nb,green,extra\nc\nd,caf\xe9\n\ne,"x, ""y""\nz"\n'
    (tmp_path / "a.csv").write_bytes(data)
    found = answers("table", tmp_path / "a.csv", **TABLE)
    assert found[0] == ["red"]
    assert found[1].startswith("column 'caption': b'caf\\xe9' is not UTF-8 (byte 0xe9)")
    assert found[2] == ['x, "y"\nz']
    assert found[3] == "row 2: 2 fields expected, 3 found: 'b,green,extra'"
    assert found[4] == "row 3: 2 fields expected, 1 found: 'c'"
    assert len(found) == 5
    chosen = answers("table", tmp_path / "a.csv", where={"caption": "red"}, **TABLE)
    assert [entry == ["red"] for entry in chosen] == [True, False, False]


@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
def test_a_row_of_a_table_may_be_wrong_in_two_ways(mark: bytes, tmp_path: Path, capfd):
    data = "image,caption,größe\na,rød,1\n".encode() + b"b,caf\xe9\nc,\xe9,2\n"
    (tmp_path / "a.csv").write_bytes(mark + data)
    found = answers("table", tmp_path / "a.csv", **{**TABLE, "replies": ["{caption} {größe}"]})
    assert found[0] == ["rød 1"]
    assert found[1].startswith("column 'caption': b'\\xe9' is not UTF-8")
    assert found[2] == "row 2: 3 fields expected, 2 found: 'b,caf\\\\xe9'"
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_tables_in_other_encodings(encoding: str, tmp_path: Path):
    for name, mark in (("a.csv", ","), ("a.tsv", "\t"), ("A.CSV", ",")):
        (tmp_path / name).write_bytes(f"image{mark}caption\r\na{mark}réd\r\n".encode(encoding))
        assert answers("table", tmp_path / name, **TABLE) == [["réd"]]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("mark", [";", "\t", ","])
@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_tables_of_spreadsheets_with_other_delimiters(
    name: str, mark: str, encoding: str, tmp_path: Path
):
    quote = "" if (name, mark) == ("a.tsv", "\t") else '"'  # which is text in tabbed files
    text = f"image{mark}caption\r\na{mark}{quote}red, or; not{quote}\r\n"
    (tmp_path / name).write_bytes(text.encode(encoding))
    assert answers("table", tmp_path / name, **TABLE) == [["red, or; not"]]


def test_a_table_without_names_is_not_guessed_at(tmp_path: Path):
    (tmp_path / "a.tsv").write_text("red; or not, so\ta\n")
    table = {**TABLE, "header": ["caption", "image"]}
    assert answers("table", tmp_path / "a.tsv", **table) == [["red; or not, so"]]


def test_a_path_that_is_a_column_instead_of_a_template_is_refused(tmp_path: Path):
    (tmp_path / "a.csv").write_text("image,caption\na,red\n")
    with pytest.raises(ConfigError, match=r"'image' is a column; write path: '\{image\}'"):
        answers("table", tmp_path / "a.csv", **{**TABLE, "path": "image"})


def test_the_developer_role_is_the_system(tmp_path: Path):
    rows = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    rows.append({"role": "assistant", "content": "Hi."})
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": rows}))
    talk = source("messages", file=str(tmp_path / "a.jsonl"))
    assert contents(talk.conversation(0, RNG(0)))[0] == ("system", ["Be brief."])


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.csv.gz"])
def test_a_field_may_be_large(name: str, tmp_path: Path):
    mark = "\t" if ".tsv" in name else ","
    long = "word " * 500_000
    text = f"image{mark}caption\na{mark}{long}\nb{mark}red\n".encode()
    (tmp_path / name).write_bytes(gzip.compress(text, mtime=0) if name.endswith("gz") else text)
    assert answers("table", tmp_path / name, **TABLE) == [[long.strip()], ["red"]]


def test_columns_of_parquet_are_found_by_name(tmp_path: Path):
    one = {"image": ["a"], "caption": ["red"]}
    pq.write_table(pa.table(one), tmp_path / "s-0.parquet")
    pq.write_table(pa.table(dict(reversed(one.items()))), tmp_path / "s-1.parquet")
    assert answers("table", tmp_path / "s-*.parquet", **TABLE) == [["red"], ["red"]]
    pq.write_table(pa.table({"image": ["a"]}), tmp_path / "s-2.parquet")
    with pytest.raises(ConfigError, match=r"s-2\.parquet has columns"):
        answers("table", tmp_path / "s-*.parquet", **TABLE)


def test_where_matches_lists_of_parquet(tmp_path: Path):
    table = pa.table({"image": ["a", "b"], "caption": ["x", "y"], "tags": [["p"], ["q"]]})
    pq.write_table(table, tmp_path / "a.parquet")
    assert answers("table", tmp_path / "a.parquet", where={"tags": [["q"]]}, **TABLE) == [["y"]]


# --- what is wrong with the dataset itself ------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("alpaca", {}, "no row has a field 'instruction'; did you mean 'instructions'"),
        ("messages", {}, "no row has a field 'messages'; did you mean 'message'"),
        ("messages", {"column": "talk"}, "no row has a field 'talk'"),
        ("dialogues", {}, "no row has a field 'messages'"),
        ("llava", {}, "no row has a field 'conversations'; did you mean 'conversation'"),
        ("nextgpt", {}, "holds pairs"),
        ("pairs", ASK, "no row has modality = 'image'"),
        ("table", {**ASK, "path": "{file}"}, "no column 'file'"),
    ],
)
def test_a_file_of_another_kind_is_refused_when_it_is_opened(kind, fields, message, tmp_path: Path):
    row = {"instructions": "a", "message": []}
    row |= {} if kind == "nextgpt" else {"conversation": []}
    file = write_json(tmp_path / "rows.jsonl", [row, row])
    with pytest.raises(ConfigError, match=message):
        source(kind, file=file, **fields)


def test_names_in_a_tar_may_be_any_bytes(tmp_path: Path):
    png = picture(tmp_path / "a.png", 7).read_bytes()
    write_tar(tmp_path / "a.tar", {"caf\udce9.png": png, "caf\udce9.txt": b"\xef\xbb\xbfred"})
    shards = source("webdataset", shards=str(tmp_path / "a.tar"), **ASK)
    assert shards.name(0) == r"a.tar/caf\udce9"
    assert _answer(shards, 0) == ["red"]
    assert grey(shards.conversation(0, RNG(0))[0]) == [7]
