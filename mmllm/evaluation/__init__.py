"""What a model can do, measured on held-out items: `mmllm evaluate mini --json FILE`.

    report = evaluate("mini", rows=["text->image"], limit=50)
    report.figure("text->image").value

One table: a row's share of right items with its 95 % Wilson interval, the bar, and whether it is
met (mmllm.evaluation.rows holds the table as data). While a model is asked, no caption can reach
a decoder.
"""

from __future__ import annotations

import contextlib
import json
import logging
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from mmllm import console, mini
from mmllm.chat import Chat, load
from mmllm.conversation import Medium, Message, Text, assistant, user
from mmllm.data.sources import read_text
from mmllm.errors import ConfigError
from mmllm.evaluation import batching, perplexity, rows
from mmllm.evaluation.asking import (
    Answer,
    Question,
    ask,
    muted,
    no_captions,
    read_questions,
    spread,
)
from mmllm.evaluation.judges import Judge, altered_items, build_judge, motion
from mmllm.evaluation.naming import Names
from mmllm.evaluation.probe import probe
from mmllm.evaluation.report import Figure, Report, wilson
from mmllm.evaluation.rows import ROWS, Marked, Row, short_bar
from mmllm.gallery import GalleryEntry, write_gallery

__all__ = ["Figure", "Report", "evaluate"]

logger = logging.getLogger(__name__)

_OTHER = ("perplexity", "batch of 8")
_BATCH_ROWS = (
    "image->text",
    "text->image",
    "audio->text",
    "text->audio",
    "routing/text",
    "text->video",
    "text->image+audio",
    "image->audio",
)
_PACKAGES = ("torch", "transformers", "diffusers", "peft", "timm", "scikit-learn", "numpy")
_SHOWN = 4
"""Items of a row that the gallery shows."""
_SHORT_WINDOWS = 20
"""Windows of each plain text for a short run, which has no bar there."""


def evaluate(
    model: str,
    *,
    rows: Sequence[str] | None = None,
    json_path: Path | None = None,
    beside: str | None = None,
    limit: int | None = None,
    gallery: Path | None = None,
    short_run: bool = False,
) -> Report:
    """Measure a model, print the table, and write JSON and a gallery where asked.

    `rows`: names of the table's rows, or their beginning ("routing"); all unless given. `limit`:
    items per row at most, for a quick look. `beside`: a second model, measured alike, or the JSON
    file of a report; its values make a last column, and what it says of frozen parts that both
    models have is not measured again. `short_run`: hold the model to the bars of a few minutes'
    training. Raises ConfigError for a row that does not exist.
    """
    wanted = _wanted(rows)
    other = _saved_report(beside) if beside and beside.endswith(".json") else None
    bench = _Bench(wanted, limit, short_run=short_run, known=other)
    report, answers = bench.measure(model)
    if beside:
        report = replace(report, beside=other or bench.measure(beside)[0])
    if json_path:
        report.save(json_path)
    console.echo(report.table())
    if gallery:
        write_gallery(gallery, f"{model}: held-out items", _entries(report, answers))
    return report


def _wanted(names: Sequence[str] | None) -> list[str]:
    """The rows that names or beginnings of names mean."""
    known = [row.name for row in ROWS] + list(_OTHER)
    for name in names or ():
        if not any(_means(name, row) for row in known):
            raise ConfigError(f"evaluate: unknown row {name!r}; known are {', '.join(known)}")
    return [row for row in known if names is None or any(_means(name, row) for name in names)]


def _saved_report(path: str) -> Report:
    try:
        return Report.load(Path(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"evaluate: {path} is no report of `mmllm evaluate`: {error}") from error


def _means(name: str, row: str) -> bool:
    return row == name or row.startswith(f"{name}/")


class _Bench:
    """What two models that are measured side by side have in common."""

    def __init__(
        self,
        wanted: Sequence[str],
        limit: int | None,
        *,
        short_run: bool = False,
        known: Report | None = None,
    ):
        self.short_run = short_run
        self.known = known if limit is None else None
        self.data = mini.locate("data")
        self.wanted = wanted
        self.limit = limit
        self.questions = read_questions(self.data / "tests.jsonl.gz")
        self.names = {
            "audio": Names(_read(self.data / "sounds.json.gz")["concepts"]),
            "": Names(_read(self.data / "concepts.json")),
        }
        self.probes: dict[str, Figure] = {}
        self._judges: dict[str, tuple[Judge, Figure]] = {}

    def judge(self, modality: str) -> tuple[Judge, Figure]:
        """A judge, and how well it knows real altered items."""
        if modality not in self._judges:
            start = time.perf_counter()
            judge = build_judge(modality, data=self.data)
            num = min(self.limit or 200, 200)
            checked = judge.validate(altered_items(modality, judge, data=self.data, num=num))
            row = f"judge/{modality}: real, altered"
            right = [True] * round(checked.top5 * checked.n)
            right += [False] * (checked.n - len(right))
            figure = _barred(_share(row, right, start), rows.JUDGE_BAR)
            self._judges[modality] = judge, figure
        return self._judges[modality]

    def settled(self, row: str, part: str, fingerprint: str) -> list[Figure]:
        """What a report of the very same frozen part says of a row and its additions."""
        if self.known is None or self.known.facts["fingerprints"].get(part) != fingerprint:
            return []
        return [f for f in self.known.figures if f.row == row or f.row.startswith(f"{row},")]

    def validations(self) -> list[Figure]:
        """Of the judges that were needed."""
        return [figure for _, figure in self._judges.values()]

    def chosen(self, row: Row) -> list[Question]:
        return spread(self.questions.get(row.name, []), min(row.num, self.limit or row.num))

    def measure(self, model: str) -> tuple[Report, list[Answer]]:
        start = time.perf_counter()
        table = [row for row in ROWS if row.name in self.wanted]
        chat = load(model)
        run = _Run(self, model, chat)
        total = sum(len(self.chosen(row)) for row in table)
        with tqdm(total=total, unit="item", desc=model) as bar:
            for row in table:
                bar.set_description(f"{model} {row.name}")
                run.row(row, bar)
            if "perplexity" in self.wanted:
                run.perplexity(bar)
            if "batch of 8" in self.wanted:
                bar.set_description(f"{model} batch of 8")
                run.batch_of_8()
        facts = _facts(chat) | {"seconds": round(time.perf_counter() - start, 1)}
        items = tuple(asdict(mark) for mark in run.marks)
        return Report(model, tuple(run.finished()), items, facts), run.answers


class _Run:
    """One model's figures as they come."""

    def __init__(self, bench: _Bench, source: str, chat: Chat):
        self.bench = bench
        self.source = source
        self.chat = chat
        self.figures: list[Figure] = []
        self.marks: list[Marked] = []
        self.answers: list[Answer] = []

    def row(self, row: Row, bar: Any) -> None:
        """Ask one row's items and mark them."""
        questions = self.bench.chosen(row)
        missing = self._missing(questions)
        if missing or not questions:
            logger.warning("%s: left out, %s", row.name, missing or "no such test items")
            bar.update(len(questions))
            return
        start = time.perf_counter()
        if row.name.startswith("decoder/"):
            if found := self._settled_decoder(row.name):
                self.figures += found
                bar.update(len(questions))
                return
            answers = self._decode(questions, bar)
        else:
            model = self.chat.model
            quiet = muted(model) if row.task == "route" else contextlib.nullcontext()
            with no_captions(model), quiet:
                answers = ask(self.chat, questions, tick=bar.update)
        if row.task != "route":  # its media are blank
            self.answers += answers[:_SHOWN]
        if row.task == "name":
            marks = [rows.mark_name(answer, self._names(answer.question)) for answer in answers]
        elif row.task == "route":
            marks = [rows.mark_route(answer) for answer in answers]
        else:
            marks = self._judged(answers)
        self._add(row.name, marks, start)
        if row.name in ("image->text", "audio->text"):
            self._probe(row.name.partition("->")[0], questions)
        elif row.name == "decoder/video":
            self._motion(answers)
        elif row.name == "what-did-you-draw":
            self._as_input(answers)

    def perplexity(self, bar: Any) -> None:
        """Of every text in data/text, and of all together."""
        start = time.perf_counter()
        together = perplexity.Perplexity(0, 0.0, 0.0)
        for file in sorted((self.bench.data / "text").glob("*.txt")):
            bar.set_description(f"perplexity {file.stem}")
            begun = time.perf_counter()
            text = file.read_text(encoding="utf-8")
            num = self.bench.limit or (_SHORT_WINDOWS if self.bench.short_run else None)
            figures = perplexity.measure(self.chat.model, text, num=num)
            together += figures
            self._ratio(f"perplexity/{file.stem}", figures, begun)
        self._ratio("perplexity", together, start)

    def batch_of_8(self) -> None:
        """In float32 the bars hold; in bfloat16 the share of equal replies is reported."""
        questions = [self.bench.questions[name][0] for name in _BATCH_ROWS]
        missing = self._missing(questions)
        if missing:
            logger.warning("batch of 8: left out, %s", missing)
            return
        for dtype in ("float32", "bfloat16"):
            start = time.perf_counter()
            chat = load(self.source, device=str(self.chat.model.device), dtype=dtype)
            found = batching.compare(chat, questions)
            figure = _share(f"batch of 8/{dtype}, same ids", found.same, start)
            if dtype == "float32":
                self.figures.append(_barred(figure, 1.0))
                self._apart(found)
            else:
                self.figures.append(figure)

    def _apart(self, found: batching.Agreement) -> None:
        """The largest difference of media, by modality; where none was made, the bar is missed."""
        for modality in self.chat.model.renderer.output_keys:
            apart = found.differences.get(modality, [])
            largest = max(apart, default=0.0)
            self.figures.append(
                Figure(
                    f"batch of 8/float32, {modality} apart",
                    len(apart),
                    largest,
                    bar=f"<= {rows.MEDIA_TOLERANCE:.0e}",
                    met=bool(apart) and largest <= rows.MEDIA_TOLERANCE,
                )
            )

    def finished(self) -> list[Figure]:
        """All figures, the bars of the table filled in."""
        classes = {row.name for row in ROWS if row.task == "route"}
        routed = [mark for mark in self.marks if mark.row in classes]
        if {mark.row for mark in routed} == classes:
            figure = _share("routing", [mark.right for mark in routed], time.perf_counter())
            self.figures.append(
                figure if self.bench.short_run else _barred(figure, rows.ROUTING_BAR)
            )
        values = {figure.row: figure.value for figure in self.figures}
        table = map(short_bar, ROWS) if self.bench.short_run else ROWS
        by_name = {row.name: row for row in table}
        figures = self.bench.validations()
        for figure in self.figures:
            row = by_name.get(figure.row)
            if row is None or row.bar is None:
                figures.append(figure)
            elif row.of is None:
                figures.append(_barred(figure, row.bar))
            elif row.of in values:
                figures.append(
                    _barred(figure, row.bar * values[row.of], f" ({row.bar} x {row.of})")
                )
            else:
                figures.append(replace(figure, bar=f"{row.bar} x {row.of}"))
        return figures

    def _missing(self, questions: Sequence[Question]) -> str:
        """What these questions need that the model lacks."""
        renderer = self.chat.model.renderer
        heard = {
            medium.modality
            for question in questions
            for turn in question.turns
            for message in turn
            for medium in message.media
        }
        asked = {modality for question in questions for modality in question.modalities}
        lacking = [f"no encoder of {modality}" for modality in heard - renderer.input_keys.keys()]
        lacking += [f"no decoder of {modality}" for modality in asked - renderer.output_keys.keys()]
        return ", ".join(sorted(lacking))

    def _settled_decoder(self, row: str) -> list[Figure]:
        key = self.chat.model.renderer.output_keys[row.partition("/")[2]]
        decoder = self.chat.model.decoders[key]
        return self.bench.settled(row, f"decoders.{key}", decoder.fingerprint)

    def _decode(self, questions: Sequence[Question], bar: Any, batch: int = 16) -> list[Answer]:
        """The decoder alone, given the captions."""
        key = self.chat.model.renderer.output_keys[questions[0].modalities[0]]
        decoder = self.chat.model.decoders[key]
        answers = []
        for start in range(0, len(questions), batch):
            group = questions[start : start + batch]
            made = decoder.sample(
                decoder.encode_captions([question.caption for question in group]),
                generators=[torch.Generator().manual_seed(question.seed) for question in group],
            )
            answers += [
                Answer(question, (user(question.caption), assistant(medium)))
                for question, medium in zip(group, made, strict=True)
            ]
            bar.update(len(group))
        return answers

    def _judged(self, answers: Sequence[Answer]) -> list[Marked]:
        modalities = {m for answer in answers for m in answer.question.modalities}
        return rows.mark_make(answers, {m: self.bench.judge(m)[0] for m in sorted(modalities)})

    def _names(self, question: Question) -> Names:
        """Sounds have a vocabulary of their own."""
        heard = {medium.modality for turn in question.turns for m in turn for medium in m.media}
        return self.bench.names["audio" if heard == {"audio"} else ""]

    def _add(self, name: str, marks: Sequence[Marked], start: float) -> None:
        self.marks += marks
        self.figures.append(_share(name, [mark.right for mark in marks], start))
        if any(mark.top1 is not None for mark in marks):
            figure = _share(f"{name}, top 1", [bool(mark.top1) for mark in marks], start)
            self.figures.append(replace(figure, seconds=0.0))

    def _probe(self, modality: str, questions: Sequence[Question]) -> None:
        model = self.chat.model
        key, _ = model.renderer.input_keys[modality]
        known = self.bench.probes
        fingerprint = str(model.encoders[key].fingerprint)
        name = f"{modality} {fingerprint}"
        if found := self.bench.settled(f"probe/{modality}", f"encoders.{key}", fingerprint):
            known[name] = found[0]
        if name not in known:  # models that are measured side by side often share encoders
            start = time.perf_counter()
            tests = [(question.concept, _medium(question)) for question in questions]
            named = probe(model, modality, tests, data=self.bench.data)
            right = [name == concept for name, (concept, _) in zip(named, tests, strict=True)]
            known[name] = _barred(_share(f"probe/{modality}", right, start), rows.PROBE_BAR)
        self.figures.append(known[name])

    def _motion(self, answers: Sequence[Answer]) -> None:
        """How much clips move, compared with the real clips of their concepts."""
        start = time.perf_counter()
        real = self.bench.judge("video")[0].gallery
        pairs = [(motion(a.media[0]), motion(real[a.question.concept])) for a in answers]
        made, wanted = np.array(pairs).T
        low, high = rows.MOTION_BAR
        mean = float(made.mean() / wanted.mean())
        seconds = time.perf_counter() - start
        self.figures.append(
            Figure(
                "decoder/video, motion / real",
                len(pairs),
                mean,
                bar=f"{low}-{high}",
                met=low <= mean <= high,
                seconds=round(seconds, 2),
            )
        )
        within = list((low * wanted <= made) & (made <= high * wanted))
        self.figures.append(_share("decoder/video, motion within 0.5-2", within, start))

    def _as_input(self, answers: Sequence[Answer]) -> None:
        """The same generated media as pictures from the user: what the model makes of them."""
        start = time.perf_counter()
        asked = _read(self.bench.data / "prompts.json")["ask_image"]["heldout"]
        questions = []
        for number, answer in enumerate(answers):
            drawn = [medium for message in answer.messages[:-1] for medium in message.media]
            if drawn:
                turn = (user(drawn[0], asked[number % len(asked)]),)
                questions.append(
                    replace(
                        answer.question,
                        id=f"{answer.question.id}/as input",
                        row="what-did-you-draw/as input",
                        turns=(turn,),
                    )
                )
        with no_captions(self.chat.model), muted(self.chat.model):
            replies = ask(self.chat, questions)
        marks = [rows.mark_name(reply, self.bench.names[""]) for reply in replies]
        self._add("what-did-you-draw/as input", marks, start)

    def _ratio(self, name: str, figures: perplexity.Perplexity, start: float) -> None:
        """Perplexity with what was trained over the base model's; n is in tokens."""
        met = figures.ratio <= rows.PERPLEXITY_BAR
        logger.info("%s: %.3f, base model %.3f", name, figures.adapted, figures.base)
        self.figures.append(
            Figure(
                f"{name}, ratio",
                figures.tokens,
                figures.ratio,
                bar=f"<= {rows.PERPLEXITY_BAR}",
                met=met,
                seconds=round(time.perf_counter() - start, 2),
            )
        )


def _share(row: str, right: Sequence[bool], start: float) -> Figure:
    """The share of right items; `start` is when their measuring began."""
    count, n = sum(map(bool, right)), len(right)
    low, high = wilson(count, n)
    return Figure(
        row, n, count / max(n, 1), low, high, seconds=round(time.perf_counter() - start, 2)
    )


def _barred(figure: Figure, bar: float, note: str = "") -> Figure:
    """With its bar; one that is a share of nothing is not met by nothing."""
    met = figure.n > 0 and bar > 0 and figure.value >= bar
    return replace(figure, bar=f"{bar:.3f}{note}", met=met)


def _medium(question: Question) -> Medium:
    """The one medium that the user shows."""
    return next(medium for message in question.turns[0] for medium in message.media)


def _read(file: Path) -> Any:
    return json.loads(read_text(file))


def _facts(chat: Chat) -> dict[str, Any]:
    """With what it was measured."""
    from mmllm import __version__

    model = chat.model
    return {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "versions": {
            "mmllm": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in _PACKAGES},
        },
        "device": str(model.device),
        "dtype": str(model.llm.embedding.weight.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "fingerprints": {
            **{f"encoders.{key}": part.fingerprint for key, part in model.encoders.items()},
            **{f"decoders.{key}": part.fingerprint for key, part in model.decoders.items()},
        },
    }


def _entries(report: Report, answers: Sequence[Answer]) -> list[GalleryEntry]:
    """What the gallery shows: a few items of every row, right or wrong."""
    right = {item["id"]: item["right"] for item in report.items}
    entries = []
    for answer in answers:
        messages = tuple(
            Message(message.role, tuple(p for p in message.parts if p != Text("")))
            for message in answer.messages
        )
        verdict = "right" if right[answer.question.id] else "wrong"
        entries.append(GalleryEntry(messages, f"{answer.question.row}: {verdict}"))
    return entries
