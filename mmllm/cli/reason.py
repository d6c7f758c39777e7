"""`mmllm reason …`: programs that use a language model as a part (mmllm.reasoning)."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mmllm import console
from mmllm.cli.options import check_at_least_one
from mmllm.errors import ConfigError

if TYPE_CHECKING:
    from mmllm.reasoning.models import Budget
    from mmllm.reasoning.sources import Readable

Model = Annotated[
    str,
    typer.Option(
        "--model",
        metavar="MODEL|URL",
        help="A model as `mmllm chat` takes it, or the base URL of an OpenAI-compatible API.",
    ),
]
Name = Annotated[str, typer.Option("--name", help="Name of the model behind a URL.")]
ApiKey = Annotated[
    str | None, typer.Option(envvar="OPENAI_API_KEY", help="Key of the API behind a URL.")
]
MaxCalls = Annotated[int | None, typer.Option(help="Calls of the model, at most.")]
MaxTokens = Annotated[int | None, typer.Option(help="Tokens of prompts and replies, at most.")]
Record = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Record every call there; started again, the run goes on from it."
    ),
]
Seed = Annotated[int, typer.Option(help="Of the problem and of all samples.")]
JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write the whole result there.")
]
ProblemName = Literal["regression", "salesman", "blocksworld", "arithmetic"]


def search(
    problem: Annotated[ProblemName, typer.Argument(help="What is searched for.")],
    model: Model = "mini",
    name: Name = "mini",
    api_key: ApiKey = None,
    size: Annotated[
        int | None, typer.Option(help="Nodes, blocks or numbers (10, 4 and 4 unless given).")
    ] = None,
    target: Annotated[
        tuple[int, int], typer.Option(metavar="W B", help="True w and b of the regression.")
    ] = (15, 14),
    strategy: Annotated[
        Literal["opro", "critique"] | None,
        typer.Option(help="Unless given, critique for blocksworld, else opro."),
    ] = None,
    steps: Annotated[int, typer.Option(help="Calls of the model.")] = 20,
    samples: Annotated[int, typer.Option(help="Replies per call.")] = 8,
    keep: Annotated[
        int | None, typer.Option(help="Candidates that the prompt shows (opro 20, critique 4).")
    ] = None,
    temperature: Annotated[float, typer.Option(help="Of the sampling.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(help="Of one reply.")] = 128,
    seed: Seed = 0,
    max_calls: MaxCalls = None,
    max_tokens: MaxTokens = None,
    record: Record = None,
    json_file: JsonFile = None,
    curve: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the curve there (.png, .svg).")
    ] = None,
) -> None:
    """Search with a model as the source of candidates; random search and hill climbing besides."""
    from mmllm import reasoning
    from mmllm.reasoning import problems, report
    from mmllm.reasoning.baselines import baselines

    check_at_least_one(steps=steps, samples=samples, keep=keep, max_new_tokens=max_new_tokens)
    built: Any = {
        "regression": lambda: problems.LinearRegression(*target, seed=seed),
        "salesman": lambda: problems.TravellingSalesman(size or 10, seed=seed),
        "blocksworld": lambda: problems.Blocksworld(size or 4, seed=seed),
        "arithmetic": lambda: problems.Arithmetic(size or 4, seed=seed),
    }[problem]()
    asked = _open_model(model, name, api_key, max_calls, max_tokens, record)
    is_live = sys.stderr.isatty()
    if is_live:
        console.note(report.HEAD)
    result = reasoning.search(
        asked,
        built,
        strategy=strategy or ("critique" if problem == "blocksworld" else "opro"),
        steps=steps,
        samples=samples,
        keep=keep,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        seed=seed,
        on_step=lambda found: console.note(report.step_line(found)) if is_live else None,
    )
    compared = baselines(built, result, seed=seed)
    console.echo(report.summary(result, compared))
    if json_file:
        _write_json(json_file, report.as_json(result, compared))
    if curve:
        try:
            report.write_curve(result, compared, curve)
        except (OSError, ValueError) as error:
            raise ConfigError(f"--curve {curve}: cannot be written: {error}") from error


def cipher(
    text: Annotated[str, typer.Argument(help="A text in a Caesar cipher.")],
    model: Model = "mini",
    shift: Annotated[
        int | None, typer.Option(help="Ask the model to decode this shift, too.")
    ] = None,
    max_calls: MaxCalls = None,
    max_tokens: MaxTokens = None,
    record: Record = None,
) -> None:
    """Decode a Caesar cipher: a program tries all shifts, the model's likelihood chooses."""
    from mmllm.reasoning.problems.cipher import decode_by_test, decode_directly

    asked = _open_model(model, "", None, max_calls, max_tokens, record)
    found = decode_by_test(asked, text)
    console.echo(f"generate and test: {found.text} (shift {found.shift})")
    if shift is not None:
        console.echo(f"asked directly: {decode_directly(asked, text, shift)}")


def read(
    file: Annotated[Path, typer.Argument(help="A text in UTF-8, a clip or a sound.")],
    question: Annotated[str, typer.Argument(help="A question about it.")],
    model: Model = "mini",
    name: Name = "mini",
    api_key: ApiKey = None,
    option: Annotated[
        list[str] | None, typer.Option(help="A possible answer (repeatable).")
    ] = None,
    choose: Annotated[
        Literal["likelihood", "written"] | None,
        typer.Option(help="How the way is chosen; likelihood for a local model, else written."),
    ] = None,
    no_reasoning: Annotated[
        bool, typer.Option("--no-reasoning", help="Written choices without reasoning.")
    ] = False,
    segment_tokens: Annotated[int, typer.Option(help="Tokens of a segment of a text.")] = 500,
    segment_seconds: Annotated[
        float, typer.Option(help="Seconds of a segment of a clip or a sound.")
    ] = 2.0,
    trees: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Keep trees there (.mmllm-trees).")
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Also answer from the whole text, summaries, …")
    ] = False,
    context: Annotated[int, typer.Option(help="Tokens of a text in --compare.")] = 1500,
    max_calls: MaxCalls = None,
    max_tokens: MaxTokens = None,
    record: Record = None,
    json_file: JsonFile = None,
) -> None:
    """Answer a question about a long text, clip or sound by a walk through a tree of summaries."""
    from dataclasses import asdict

    from mmllm.reasoning import TreeOptions, build_tree, walk
    from mmllm.reasoning.reading import BASELINES, answer_by_baselines

    check_at_least_one(context=context)
    source = _open_source(file, segment_seconds)
    is_local = not is_url(model)
    options = TreeOptions(segment_tokens=segment_tokens)
    asked = _open_model(model, name, api_key, max_calls, max_tokens, record)
    tree = build_tree(
        asked,
        source,
        options,
        folder=trees or Path(".mmllm-trees"),
        on_progress=lambda _: console.status(f"summaries: {asked.usage.calls}"),
    )
    console.status()
    found = walk(
        asked,
        tree,
        question,
        choose=choose or ("likelihood" if is_local else "written"),
        options=option or (),
        reason=not no_reasoning,
    )
    console.echo(found.answer if found.answer is not None else f"no answer: {found.note}")
    nodes = " > ".join(map(str, found.path))
    console.note(f"read {found.read_fraction:.0%} of it; path {nodes} of {len(tree.nodes)}")
    if found.segments:
        console.note(f"last segment: {tree.place_of(found.segments[-1])}")
    answers: dict[str, str | None] = {}
    if compare:
        names = [entry for entry in BASELINES if is_local or entry != "likelihood"]
        answers = answer_by_baselines(
            asked, tree, question, options=option or (), context=context, names=names
        )
        for entry, answer in answers.items():
            console.echo(f"{entry}: {'exceeds the context' if answer is None else answer}")
    if json_file:
        _write_json(json_file, {**asdict(found), "baselines": answers})


def focus(
    text: Annotated[str, typer.Argument(help="A message with a question, opinions and all.")],
    model: Model = "mini",
    name: Name = "mini",
    api_key: ApiKey = None,
    attend: Annotated[
        Literal["rewrite", "sentences"], typer.Option(help="How it is decided what counts.")
    ] = "rewrite",
    max_calls: MaxCalls = None,
    max_tokens: MaxTokens = None,
    record: Record = None,
) -> None:
    """Answer a message from what should count in it alone (System 2 Attention)."""
    from mmllm import reasoning
    from mmllm.conversation import Text, message

    asked = _open_model(model, name, api_key, max_calls, max_tokens, record)
    focused = reasoning.focus(asked, [message("user", Text(text))], attend=attend)
    console.note(focused[-1].text)
    (completion,) = asked.complete(focused, temperature=0.0)
    console.echo(completion.text)


def _open_source(file: Path, seconds: float) -> Readable:
    """The text, clip or sound of a file, by its suffix."""
    from mmllm.conversation import Audio, Video
    from mmllm.inference.inputs import MEDIA_SUFFIXES
    from mmllm.reasoning import LongMedium

    kind = MEDIA_SUFFIXES.get(file.suffix.lower())
    if kind in ("Audio", "Video"):
        return LongMedium((Audio if kind == "Audio" else Video)(file), seconds)
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: no text can be read from it: {error}") from error


def is_url(source: str) -> bool:
    """Whether a model is named by the URL of an API."""
    return source.startswith(("http://", "https://"))


def _open_model(
    source: str,
    name: str,
    api_key: str | None,
    max_calls: int | None,
    max_tokens: int | None,
    record: Path | None,
) -> Budget:
    """The model of a command, with its budget and its record."""
    import mmllm
    from mmllm.reasoning import Budget, ChatModel, OpenAIModel, Recorder

    check_at_least_one(max_calls=max_calls, max_tokens=max_tokens)
    model: ChatModel
    if is_url(source):
        model = OpenAIModel(source, name, api_key=api_key)
    else:
        console.note(f"loading {source}")
        model = mmllm.load(source)
    if record:
        model = Recorder(model, record)
    return Budget(model, max_calls=max_calls, max_tokens=max_tokens)


def _write_json(path: Path, tree: Any) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(tree, indent=1, ensure_ascii=False)
        path.write_text(f"{text}\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--json {path}: cannot be written: {error.strerror}") from error
