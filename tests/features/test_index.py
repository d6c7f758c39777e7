"""Records on disk found by name, against a dictionary."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from mmllm.features import index
from mmllm.features.index import Index


def written(path: Path, names: list[str], parts: int = 2) -> Path:
    numbers = np.arange(len(names))
    halves = [
        index.records(names[part::parts], {"number": ("<u4", numbers[part::parts])})
        for part in range(parts)
    ]
    index.write(path, halves, {"of": "tests"})
    return path


@pytest.mark.parametrize("count", [1, 2, 31, 32, 33, 5000])
def test_every_name_is_found_and_no_other(count: int, tmp_path: Path) -> None:
    names = [f"name {number}" for number in range(count)]
    found = Index(written(tmp_path / "a.index", names))
    assert found.count == count
    assert found.about == {"of": "tests"}
    assert [found[name]["number"].tolist() for name in names] == [[n] for n in range(count)]
    assert not any(len(found[f"other {number}"]) for number in range(200))
    assert [path.name for path in tmp_path.iterdir()] == ["a.index"]


def test_a_name_may_have_several_records(tmp_path: Path) -> None:
    found = Index(written(tmp_path / "a.index", ["one", "two", "one"]))
    assert sorted(found["one"]["number"].tolist()) == [0, 2]


def test_an_index_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "a.index", ["one", "two"])
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="not whole"):
        Index(path)


def test_a_worker_that_inherits_nothing_opens_it_again(tmp_path: Path) -> None:
    found = pickle.loads(pickle.dumps(Index(written(tmp_path / "a.index", ["one", "two"]))))
    assert found["two"]["number"].tolist() == [1]


def test_an_index_of_other_files_has_another_name(tmp_path: Path) -> None:
    files = [tmp_path / "a", tmp_path / "b"]
    for file in files:
        file.write_bytes(b"12")
    whole = index.name_of(files)
    assert index.name_of(reversed(files)) == whole
    assert index.name_of(files[:1]) != whole
    files[1].write_bytes(b"123")
    assert index.name_of(files) != whole
