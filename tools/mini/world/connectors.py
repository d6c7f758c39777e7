"""Compares output projections on mini's world: same data, seeds and budget, held-out scenes.

    python -m tools.mini.world.connectors --system my/system.yaml --out runs/connectors \\
        --judge runs/judge/judge.safetensors --steps 2000

Each candidate is a stage of training that differs in the output projection and its losses alone.
Held-out scenes are then drawn from the states of a reply that says what it draws, the same reply
for every candidate, and judged (mmllm.evaluation.scene_judge). Encoded scenes are kept in
OUT/cache for all candidates, a stopped training goes on where it was, and a candidate with a result
is not trained again. With --seconds every candidate trains so long instead of so many steps.

Dimensions: K signal tokens, B images.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as Pillow
from torch import Tensor

from mmllm import checkpoints
from mmllm import config as configs
from mmllm.config import RunConfig
from mmllm.conversation import Image, Message, assistant, user
from mmllm.data.batch import collate
from mmllm.evaluation.metrics import wilson_interval
from mmllm.evaluation.scene_judge import SceneJudge, shows
from mmllm.mini.world import wordings
from mmllm.mini.world.captions import caption, describe
from mmllm.mini.world.rendering import SIDE
from mmllm.mini.world.scenes import Scene, draw_heldout_scene
from mmllm.model import AnyToAny
from mmllm.training.trainer import train

logger = logging.getLogger("connectors")

KINDS = ("colour", "count", "pair", "pair, colours", "groups")
"""Kinds of held-out scenes (mmllm.mini.world.scenes)."""
TRIAL = 10
"""Steps by which the seconds of a step are measured; the first half is not counted."""


@dataclass(frozen=True)
class Candidate:
    """One way from the language model to the decoder.

    Attributes:
        projection: the entry of `output_projections`.
        losses: of the stage, or of both halves of its steps.
        stage: further keys of the stage.
    """

    projection: Mapping[str, Any]
    losses: Sequence[Mapping[str, float]]
    stage: Mapping[str, Any]


ALIGN, DENOISE = {"align": 1.0}, {"denoise": 1.0}
WEIGHTED = {"denoise": {"times": "auto", "min_snr": 5.0}}
QUERIES = {"type": "connector", "signal_tokens": 64, "layers": 6, "width": 384, "heads": 6}
WORDS = {**QUERIES, "signal_tokens": 8, "words": 40}
CANDIDATES = {
    "regression": Candidate({"type": "transformer", "signal_tokens": 8}, [ALIGN], {}),
    "queries, aligned": Candidate(QUERIES, [ALIGN], {}),
    "queries": Candidate(QUERIES, [DENOISE], {}),
    "queries, min-SNR": Candidate(QUERIES, [DENOISE], WEIGHTED),
    "queries, aligned first": Candidate(QUERIES, [ALIGN, DENOISE], {}),
    "layers": Candidate({**QUERIES, "llm_layers": [10, 20, 30]}, [DENOISE], {}),
    "words, aligned": Candidate(WORDS, [ALIGN], {}),
    "words": Candidate(WORDS, [DENOISE], {}),
    "words, aligned first": Candidate(WORDS, [ALIGN, DENOISE], {}),
    "words, layers": Candidate({**WORDS, "llm_layers": [10, 20, 30]}, [ALIGN, DENOISE], {}),
    "words, language model": Candidate(
        {**WORDS, "weights": "mini:smollm2-135m-instruct"}, [ALIGN, DENOISE], {}
    ),
}
"""Name -> candidate; "regression" is the paper's way (NExT-GPT, Wu et al. 2023)."""


@dataclass(frozen=True)
class Budget:
    """What every candidate gets.

    Attributes:
        steps: of training, both halves together.
        seconds: of training instead; None: the steps count.
        batch_size: conversations of a step.
        scenes: different ones in training.
        seed: of everything.
    """

    steps: int = 2000
    seconds: float | None = None
    batch_size: int = 32
    scenes: int = 20_000
    seed: int = 0


def stages(
    system: Mapping[str, Any], candidate: Candidate, folder: Path, cache: Path, budget: Budget
) -> list[RunConfig]:
    """The stages of a candidate, one after another.

    Args:
        system: the system as plain data, with an image decoder.
        candidate: its projection and losses.
        folder: of its runs.
        cache: of encoded scenes and captions.
        budget: of the candidate.
    """
    own = {
        **system,
        "encoders": {},
        "input_projections": {},
        "decoders": {"image": system["decoders"]["image"]},
        "output_projections": {"image": candidate.projection},
    }
    runs, before = [], None
    for number, losses in enumerate(candidate.losses, 1):
        output = folder / f"stage-{number}"
        stage = {
            "name": output.name,
            "learning_rates": {"output_projections.*": 5e-4, "llm.signal_embeddings": 5e-4},
            "losses": losses,
            "data": {"scenes": {"type": "scenes", "count": budget.scenes, "kinds": ["draw"]}},
            "steps": max(budget.steps // len(candidate.losses), 1),
            "batch_size": budget.batch_size,
            "ema": {"decay": 0.999},
            "cache": str(cache),
            "seed": budget.seed,
            "output": str(output),
            "init_from": before,
            **(candidate.stage if "denoise" in losses else {}),
        }
        runs.append(configs.parse_run({"system": own, "stage": stage}))
        before = str(output)
    return runs


def with_seconds(runs: list[RunConfig], folder: Path, seconds: float) -> list[RunConfig]:
    """The same stages with as many steps as take so many seconds, both halves alike."""
    timed = []
    for number, run in enumerate(runs, 1):
        trial = folder / f"trial-{number}"
        if not (trial / "metrics.jsonl").is_file():
            once = replace(run.stage, steps=TRIAL, output=str(trial), init_from=None)
            train(replace(run, stage=once), progress=False)
        each = np.median(step_seconds(trial)[TRIAL // 2 :])
        steps = max(int(seconds / len(runs) / each), 1)
        timed.append(replace(run, stage=replace(run.stage, steps=steps)))
    return timed


def step_seconds(folder: Path) -> list[float]:
    """Seconds of each step of a run."""
    rows = map(json.loads, (folder / "metrics.jsonl").read_text("utf-8").splitlines())
    return [row["seconds"] for row in rows if "seconds" in row]


def conversation(scene: Scene, rng: random.Random) -> list[Message]:
    """The request for a scene in words of its own, and the reply that says and shows it."""
    words, verb = describe(scene), "are" if scene.groups[0].count > 1 else "is"
    request = wordings.request("draw", caption(scene, rng, "heldout"), "heldout", rng)
    return [user(request), assistant(f"Here {verb} {words}.", Image(caption=words))]


def heldout(count: int) -> list[tuple[str, Scene, list[Message]]]:
    """`count` held-out scenes of each kind, always the same, with their conversations."""
    rng = random.Random("connectors")
    found = []
    for kind in KINDS:
        for _ in range(count):
            scene = draw_heldout_scene(kind, rng)
            found.append((kind, scene, conversation(scene, rng)))
    return found


@torch.inference_mode()
def draw(model: AnyToAny, talks: Sequence[list[Message]], *, from_captions: bool) -> np.ndarray:
    """Draw what replies say: uint8[B, P, P, 3].

    Args:
        model: the trained model.
        talks: conversations that end with an image.
        from_captions: condition on the decoder's own captions, not on the language model.
    """
    decoder, images = model.decoders["image"], []
    for start in range(0, len(talks), 16):
        group = talks[start : start + 16]
        condition: dict[str, Tensor]
        negative = None
        if from_captions:
            condition = decoder.encode_captions([talk[-1].parts[-1].caption for talk in group])  # pyright: ignore
        else:
            items = [model.renderer.render(talk) for talk in group]
            batch = collate(items, None, model.batch_layout, targets=False).to(model.device)
            projection = model.output_projection("image")
            condition = projection(model.signals(batch)["image"])
            negative = projection.null_condition(len(group))
        generators = [torch.Generator().manual_seed(start + row) for row in range(len(group))]
        images += decoder.sample(condition, generators=generators, negative=negative)
    sides = [Pillow.fromarray(image.to_numpy()).resize((SIDE, SIDE)) for image in images]
    return np.stack([np.asarray(side) for side in sides])


def judged(
    judge: SceneJudge, images: np.ndarray, scenes: Sequence[tuple[str, Scene, list[Message]]]
) -> dict[str, list[bool]]:
    """Kind -> whether each image shows everything that was asked for."""
    right: dict[str, list[bool]] = {kind: [] for kind in KINDS}
    for start in range(0, len(images), 16):
        found = judge.find(images[start : start + 16])
        for things, (kind, scene, _) in zip(found, scenes[start : start + 16], strict=True):
            right[kind].append(shows(things, scene).everything)
    return right


def compare(
    system: Mapping[str, Any],
    judge: SceneJudge,
    out: Path,
    names: Sequence[str],
    budget: Budget,
    count: int = 60,
) -> list[dict[str, Any]]:
    """Train and judge candidates, and write OUT/table.md.

    Args:
        system: the system as plain data.
        judge: of scenes.
        out: folder of runs, results and the table.
        names: of CANDIDATES.
        budget: of each.
        count: held-out scenes of each kind.

    Returns:
        The rows of the table.
    """
    scenes = heldout(count)
    talks = [talk for _, _, talk in scenes]
    rows = []
    for name in names:
        folder = out / name.replace(", ", "-").replace(" ", "-")
        file = folder / "result.json"
        if not file.is_file():
            runs = stages(system, CANDIDATES[name], folder, out / "cache", budget)
            if budget.seconds is not None:
                runs = with_seconds(runs, folder, budget.seconds)
            for run in runs:
                train(run, resume=True, progress=False)
            last = Path(runs[-1].stage.output)
            model = checkpoints.load_model(checkpoints.open_checkpoint(last))
            parameters = sum(w.numel() for w in model.output_projections.parameters())
            row = {
                "name": name,
                "steps": sum(run.stage.steps for run in runs),
                "seconds": sum(sum(step_seconds(Path(run.stage.output))) for run in runs),
                "parameters": parameters,
                "budget": asdict(budget),
                "right": judged(judge, draw(model, talks, from_captions=False), scenes),
            }
            file.write_text(json.dumps(row), encoding="utf-8")
            if not (out / "captions.json").is_file():
                own = {
                    "name": "the decoder's own captions",
                    "right": judged(judge, draw(model, talks, from_captions=True), scenes),
                }
                (out / "captions.json").write_text(json.dumps(own), encoding="utf-8")
        rows.append(json.loads(file.read_text("utf-8")))
        logger.info("%s", line(rows[-1]))
    rows.append(json.loads((out / "captions.json").read_text("utf-8")))
    head = ["connector", "parameters", "steps", "seconds", *KINDS, "all"]
    table = [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *map(line, rows)]
    (out / "table.md").write_text("\n".join(table) + "\n", encoding="utf-8")
    return rows


def line(row: Mapping[str, Any]) -> str:
    """One row of the table: the share of scenes that are right, with 95 % intervals."""
    cells = [row["name"]]
    cells += [
        f"{row[key]:,.0f}" if key in row else "" for key in ("parameters", "steps", "seconds")
    ]
    everything = [right for kind in KINDS for right in row["right"][kind]]
    for right in [*(row["right"][kind] for kind in KINDS), everything]:
        low, high = wilson_interval(sum(right), len(right))
        cells.append(f"{sum(right) / max(len(right), 1):.2f} ({low:.2f} to {high:.2f})")
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description="Compares output projections on mini's world.")
    parser.add_argument("--system", type=Path, required=True, help="YAML with an image decoder")
    parser.add_argument("--judge", type=Path, required=True, help="weights of the judge")
    parser.add_argument("--out", type=Path, required=True, help="an existing one goes on")
    parser.add_argument("--only", nargs="+", choices=CANDIDATES, default=list(CANDIDATES))
    parser.add_argument("--steps", type=int, default=Budget.steps)
    parser.add_argument("--seconds", type=float, help="of training, instead of steps")
    parser.add_argument("--batch-size", type=int, default=Budget.batch_size)
    parser.add_argument("--scenes", type=int, default=Budget.scenes)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=60, help="held-out scenes of a kind")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    torch.set_num_threads(arguments.threads)
    budget = Budget(
        arguments.steps,
        arguments.seconds,
        arguments.batch_size,
        arguments.scenes,
        arguments.seed,
    )
    system = configs.read_yaml(arguments.system)
    judge = SceneJudge.load(arguments.judge)
    compare(system, judge, arguments.out, arguments.only, budget, arguments.count)


if __name__ == "__main__":
    main()
