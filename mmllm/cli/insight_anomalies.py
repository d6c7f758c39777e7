"""`mmllm insight anomalies`: media of a folder that are unlike those of another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmllm import console
from mmllm.cli.options import Device, DType, Trust
from mmllm.errors import ConfigError
from mmllm.utils.files import write_errors

if TYPE_CHECKING:
    from mmllm.conversation import Medium


def anomalies(
    normal: Annotated[Path, typer.Option(metavar="FOLDER", help="Normal media of one kind.")],
    test: Annotated[Path, typer.Option(metavar="FOLDER", help="Media that are compared.")],
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="As `mmllm chat` takes it.")
    ] = "mini",
    describe: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT", help='What normal ones show ("a dog"); its surprisal is measured, too.'
        ),
    ] = None,
    stage: Annotated[
        list[str] | None,
        typer.Option(metavar="MODULE", help="A module of the encoder to compare (repeatable)."),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write all, with the maps, there.")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Write a page with the maps there.")
    ] = None,
    device: Device = None,
    dtype: DType = None,
    trust: Trust = None,
) -> None:
    """Say how odd each medium is: its distance from normal ones, and how many are as odd."""
    usual, asked = read_folder(normal), read_folder(test)

    import mmllm
    from mmllm.insight.anomaly import AnomalyDetector

    console.note(f"loading {model}")
    chat = mmllm.load(model, device=device, dtype=dtype, trust=trust or ())
    detector = AnomalyDetector(
        chat, list(usual.values()), stages=stage or (), describe=describe and f"It is {describe}."
    )
    found = dict(zip(asked, detector.score(list(asked.values())), strict=True))
    width = max(map(len, found))
    for name, entry in sorted(found.items(), key=lambda pair: -pair[1].score):
        line = f"{name:{width}}  {entry.score:.3f}  p {entry.p_value:.3f}"
        console.echo(line + ("" if entry.surprisal is None else f"  -log p {entry.surprisal:.1f}"))
    if folder:
        from mmllm.insight.anomaly_page import write_anomaly_page

        page = folder / "index.html"
        title = f"{test.name}: what is unlike {normal.name}"
        with write_errors(page, ConfigError, "choose another folder"):
            folder.mkdir(parents=True, exist_ok=True)
            write_anomaly_page(page, title, {name: (asked[name], found[name]) for name in found})
        console.echo(f"{page}")
    if json_file:
        report = {
            name: {
                "score": entry.score,
                "p_value": entry.p_value,
                "surprisal": entry.surprisal,
                "map": entry.map.tolist(),
            }
            for name, entry in found.items()
        }
        try:
            json_file.write_text(json.dumps(report), encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--json {json_file}: cannot be written: {error}") from error


def read_folder(folder: Path) -> dict[str, Medium]:
    """Name -> medium of each media file in a folder, in the order of their names.

    Args:
        folder: the folder.

    Raises:
        ConfigError: there is no such folder, or no media file in it.
        MediaError: a file cannot be read.
    """
    from mmllm import media
    from mmllm.conversation import MEDIA
    from mmllm.inference.inputs import MEDIA_SUFFIXES

    if not folder.is_dir():
        raise ConfigError(f"{folder}: is no folder")
    files = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in MEDIA_SUFFIXES]
    if not files:
        raise ConfigError(
            f"{folder}: holds no picture, sound or clip; expected files such as "
            f"{', '.join(list(MEDIA_SUFFIXES)[:3])}"
        )
    return {path.name: MEDIA[media.probe(path).modality](path) for path in files}
