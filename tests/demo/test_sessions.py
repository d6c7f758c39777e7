"""Sessions: who may open them, what they take, when they end."""

from __future__ import annotations

import functools
import io
import os
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PILImage

from mmllm import media
from mmllm.conversation import Image, Video, user
from mmllm.demo.archive import pack, unpack
from mmllm.demo.replying import stream_reply
from mmllm.demo.sessions import SessionStore, Turn
from mmllm.errors import ConfigError, MediaError
from mmllm.inference.chat import Chat
from mmllm.media import isolated
from mmllm.model import AnyToAny
from tests.demo.samples import sent
from tests.samples import picture


def test_a_session_is_found_by_its_secret_only(sessions: SessionStore) -> None:
    one, other = sessions.open(None), sessions.open("guessed")
    assert len({one.token, other.token, "guessed"}) == 3
    assert sessions.open(one.token) is one
    assert one.folder != other.folder
    assert sessions.open({"token": one.token}) not in (one, other)  # pyright: ignore[reportArgumentType]


def test_the_number_of_sessions_is_bounded_and_empty_ones_are_dropped_first(
    sessions: SessionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmllm.demo.sessions.MAX_SESSIONS", 3)
    spoken = sessions.open(None)
    spoken.turns.append(Turn(user("hello")))
    for _ in range(10):
        sessions.open(None)
    assert sessions.open(spoken.token) is spoken
    assert len(list(sessions.root.iterdir())) == 3


def test_a_file_that_was_sent_becomes_a_medium_in_the_sessions_folder(
    sessions: SessionStore,
) -> None:
    session = sessions.open(None)
    path = sent(sessions)
    (medium, again), errors = session.take([path, path])
    assert errors == []
    assert (medium.modality, medium.source) == ("image", session.folder / "001.png")
    assert (again.modality, again.source) == ("image", session.folder / "002.png")
    (other,), _ = sessions.open(None).take([path])  # the same picture in another session
    assert np.array_equal(other.to_numpy(), picture(40).to_numpy())


@pytest.mark.parametrize(
    ("name", "kept"),
    [("a.tif", ".png"), ("a.jpg", ".jpg"), ("a.html", ".png"), ("a", ".png"), ("a.JPG", ".jpg")],
)
def test_pictures_are_kept_as_what_browsers_show(
    sessions: SessionStore, name: str, kept: str
) -> None:
    file = io.BytesIO()
    kind = "tiff" if name.endswith("tif") else "jpeg" if name.lower().endswith("jpg") else "png"
    PILImage.fromarray(picture(40).to_numpy()).save(file, kind)
    (medium,), errors = sessions.open(None).take([sent(sessions, name, file.getvalue())])
    assert errors == []
    assert isinstance(medium.source, Path)
    assert medium.source.suffix == kept
    assert np.array_equal(medium.to_numpy(), Image(file.getvalue()).to_numpy())
    assert (media.probe(medium.source).format == "PNG") == (kept == ".png")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.png", b"no picture", "neither an image, audio nor a video"),
        ("empty.wav", b"", "empty"),
        ("../../secret.png", None, "no file that was sent"),
    ],
)
def test_other_files_are_refused(
    sessions: SessionStore, name: str, data: bytes | None, message: str
) -> None:
    path = sessions.root / name if data is None else sent(sessions, name, data)
    if data is None:
        picture(40).save(path)
    taken, errors = sessions.open(None).take([sent(sessions), path, sent(sessions)])
    assert len(taken) == 2  # what is good is taken
    (error,) = errors
    assert isinstance(error, MediaError)
    assert message in str(error)


def test_a_picture_beyond_the_limits_is_refused(
    sessions: SessionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmllm.demo.sessions.UPLOADS", media.Limits(pixels=4))
    taken, (error,) = sessions.open(None).take([sent(sessions)])
    assert taken == []
    assert "limit of 4" in str(error)


def test_unused_sessions_and_uploads_are_deleted(sessions: SessionStore) -> None:
    late, used, busy = (sessions.open(None) for _ in range(3))
    orphan = sent(sessions)
    for session in (late, busy):
        session.used -= 3601
    busy.replying.acquire()
    long_ago = time.time() - 3601
    os.utime(orphan.parent, (long_ago, long_ago))
    sessions.sweep()
    assert {path.name for path in sessions.root.iterdir()} == {used.token, busy.token}
    assert sessions.open(late.token) is not late


def test_a_conversation_that_is_full_says_so_and_can_be_saved(
    tiny_model: AnyToAny, sessions: SessionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = sessions.open(None)
    monkeypatch.setattr("mmllm.demo.sessions.MAX_FILES", 3)
    path = sent(sessions)
    taken, (error,) = session.take([path] * 4)
    assert len(taken) == 3
    assert "at most 3 files" in str(error)
    session.turns.append(Turn(user(*taken)))
    assert "at most 3 files" in str(session.take([path])[1][0])
    monkeypatch.setattr("mmllm.demo.sessions.MAX_TURNS", 1)
    with pytest.raises(ConfigError, match="at most 1 messages"):
        list(stream_reply(Chat(tiny_model), session, {}))
    assert not session.replying.locked()
    other = sessions.open(None)
    unpack(other, pack(session, "tiny"))
    assert [len(message.media) for message in other.conversation] == [3]


def test_the_clip_of_a_phone_is_taken_and_one_that_takes_too_long_is_not(
    sessions: SessionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1080p at 60 frames a second: more than the limit when it is decoded whole."""
    frames = np.zeros((60, 1080, 1920, 3), np.uint8)
    frames[:, :, ::2] = 255
    path = Video.from_numpy(frames, fps=60).save(sessions.root / "clip.mp4")
    (clip,), errors = sessions.open(None).take([path])
    assert errors == []
    assert clip.modality == "video"
    assert clip.sample_frames(3).shape == (3, 1080, 1920, 3)

    hasty = functools.partial(isolated.sample_frames, seconds=0.01)
    monkeypatch.setattr("mmllm.media.isolated.sample_frames", hasty)
    taken, (error,) = sessions.open(None).take([path])
    assert taken == []
    assert "not decoded within 0.01 s" in str(error)
