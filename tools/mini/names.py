"""Teaches a run the names of mini's own single media: pictures, sounds and clips of one thing.

    python -m tools.mini.names RUN OUT
    python -m tools.mini.names RUN OUT --also FOLDER

For input projections of `type: ctc`. Pictures are those of training styles; scenes, soundscapes and
clips with descriptions are rehearsed, and stay spelled.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from mmllm import checkpoints
from mmllm.data.formats.labelled import LabelledMedia, LabelledMedium, read_labelled
from mmllm.projections.ctc import CTCConfig
from mmllm.training import teaching
from mmllm.training.rehearsal import scenes, single_things
from mmllm.training.teaching import Lesson, TeachingOptions

logger = logging.getLogger("names")

OPTIONS = TeachingOptions(learning_rate=1e-2)
"""Of images in a style that teaching leaves out, 0.53 are named at this learning rate, 0.50 at 3e-3
and 0.46 at 1e-3; of new scenes 0.93 to 0.94 stay spelled."""


def modalities(run: str | Path) -> list[str]:
    """The modalities that a run spells.

    Args:
        run: a checkpoint, or a run with several.
    """
    system = checkpoints.open_checkpoint(run).system()
    return sorted(
        {
            encoder.modality
            for key, encoder in system.encoders.items()
            if isinstance(system.input_projections[key], CTCConfig)
        }
    )


def own_media(run: str | Path) -> list[LabelledMedium]:
    """Mini's own single media of the modalities that a run spells.

    Args:
        run: a checkpoint, or a run with several.
    """
    return [item for modality in modalities(run) for item in single_things(modality)]


def teach(
    run: str | Path,
    output: str | Path,
    media: Sequence[LabelledMedium] | None = None,
    *,
    rehearse: Sequence[LabelledMedium] | None = None,
    options: TeachingOptions | None = None,
    cache: str | Path | None = None,
    progress: bool = True,
) -> list[Lesson]:
    """Teach a run the names of single media, and save it as a checkpoint.

    Args:
        run: a checkpoint, or a run with several.
        output: where the checkpoint is written.
        media: with captions; None: mini's own single media of the modalities that the run spells.
        rehearse: what is to stay spelled; None: the scenes of these modalities that teaching
            rehearses.
        options: of teaching; None: OPTIONS.
        cache: folder of a feature cache.
        progress: show a progress bar.
    """
    if media is None:
        media = own_media(run)
    if rehearse is None:
        rehearse = [item for modality in modalities(run) for item in scenes(modality)]
    lessons, _ = teaching.teach(
        LabelledMedia(list(media), []),
        output,
        model=str(run),
        rehearse=LabelledMedia(list(rehearse), []),
        options=options or OPTIONS,
        cache=cache,
        progress=progress,
    )
    return lessons


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__ and __doc__.partition("\n")[0])
    parser.add_argument("run", type=Path, help="a checkpoint, or a run with several")
    parser.add_argument("out", type=Path, help="where the checkpoint is written")
    parser.add_argument("--also", type=Path, help="a folder or table of further labelled media")
    parser.add_argument("--cache", type=Path, help="folder of a feature cache")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    media = own_media(arguments.run)
    if arguments.also:
        media += read_labelled(arguments.also).items
    for lesson in teach(arguments.run, arguments.out, media, cache=arguments.cache):
        logger.info(
            "%s: %d media of %d names; %.3f of them read right, %.3f of the scenes as before",
            lesson.encoder,
            lesson.num_media,
            len(lesson.new) + len(lesson.known),
            lesson.accuracy,
            lesson.kept or 0.0,
        )


if __name__ == "__main__":
    main()
