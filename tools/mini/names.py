"""Teaches a run the names of mini's own single media: pictures and clips of one thing.

    python -m tools.mini.names RUN OUT
    python -m tools.mini.names RUN OUT --also FOLDER
    python -m tools.mini.names RUN OUT --anew

For input projections of `type: ctc`. Pictures are those of training styles, as they are and
anywhere in a larger one; scenes and clips with descriptions are rehearsed, and stay spelled. Sounds
are spelled alone: with names, which hide how loud, high and often they are, 0.57 of 60 held-out
soundscapes were read rightly, and 0.75 without.
"""

from __future__ import annotations

import argparse
import logging
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mmllm import checkpoints
from mmllm.data.formats.labelled import LabelledMedia, LabelledMedium, read_labelled
from mmllm.mini.world.conversations import converse
from mmllm.projections.ctc import CTCConfig
from mmllm.training import teaching
from mmllm.training.learners import NameLearner
from mmllm.training.rehearsal import scenes, single_things
from mmllm.training.teaching import Lesson, TeachingOptions

logger = logging.getLogger("names")

OPTIONS = TeachingOptions(learning_rate=1e-2, steps=1000)
"""Of images in a style that teaching leaves out, 0.53 are named at this learning rate, 0.50 at 3e-3
and 0.46 at 1e-3."""
NAMED = ("image", "video")
"""Modalities whose single things are named."""
PLACED = 3000
"""Pictures anywhere in a larger one: without them 0.36 of 100 such in the unseen style are read."""
REHEARSED = {"image": 5000}
"""Scenes by modality where teaching by users rehearses fewer: among them are things in a colour,
which a name would lose."""


def modalities(run: str | Path) -> list[str]:
    """Those of NAMED that a run spells.

    Args:
        run: a checkpoint, or a run with several.
    """
    system = checkpoints.open_checkpoint(run).system()
    return sorted(
        {
            encoder.modality
            for key, encoder in system.encoders.items()
            if encoder.modality in NAMED and isinstance(system.input_projections[key], CTCConfig)
        }
    )


def own_media(run: str | Path) -> list[LabelledMedium]:
    """Mini's own single media of the modalities that a run spells.

    Args:
        run: a checkpoint, or a run with several.
    """
    known = modalities(run)
    media = [item for modality in known for item in single_things(modality)]
    return media + (placed(PLACED) if "image" in known else [])


def placed(count: int) -> list[LabelledMedium]:
    """Pictures of single things anywhere in a larger picture and of any size.

    Args:
        count: how many.
    """
    labels = {item.medium.caption: item.label for item in single_things("image")}
    found = []
    for index in range(count):
        talk = converse("picture", "training", random.Random(f"placed {index}"))
        shown = talk.messages[0].media[0]
        caption = talk.messages[1].text.removeprefix("I see ").removesuffix(".")
        found.append(LabelledMedium(replace(shown, caption=caption), labels[caption]))
    return found


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
        counts = {modality: REHEARSED.get(modality) for modality in modalities(run)}
        rehearse = [item for modality in counts for item in scenes(modality, counts[modality])]
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


def without_names(run: str | Path, output: str | Path) -> Path:
    """Save a run without the names that its projections know.

    Args:
        run: a checkpoint, or a run with several.
        output: where the checkpoint is written.
    """
    found = checkpoints.open_checkpoint(run)
    model = checkpoints.load_model(found)
    for key, config in found.system().input_projections.items():
        if isinstance(config, CTCConfig):
            NameLearner(model, key).forget()
    return checkpoints.save(
        Path(output),
        model,
        step=found.step,
        stage=found.stage(),
        resolved_settings=found.resolved_settings,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__ and __doc__.partition("\n")[0])
    parser.add_argument("run", type=Path, help="a checkpoint, or a run with several")
    parser.add_argument("out", type=Path, help="where the checkpoint is written")
    parser.add_argument("--also", type=Path, help="a folder or table of further labelled media")
    parser.add_argument("--anew", action="store_true", help="without the names that RUN knows")
    parser.add_argument("--cache", type=Path, help="folder of a feature cache")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    run = arguments.run
    if arguments.anew:
        run = without_names(run, arguments.out)
    media = own_media(run)
    if arguments.also:
        media += read_labelled(arguments.also).items
    for lesson in teach(run, arguments.out, media, cache=arguments.cache):
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
