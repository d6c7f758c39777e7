"""`mmllm …`: the app, its commands and its exit codes.

Commands import what they need when they run, so that `mmllm --help` loads nothing heavy.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from mmllm import console
from mmllm.cli import (
    cache,
    chat,
    convert,
    data,
    evaluate,
    insight,
    insight_anomalies,
    insight_features,
    plan,
    reason,
    serve,
    swap,
    teach,
    tools,
    train,
)
from mmllm.cli.renamed import with_present_names
from mmllm.errors import MmllmError

FAILED = 2
"""Exit code of a command that failed."""
INTERRUPTED = train.INTERRUPTED

app = typer.Typer(
    name="mmllm",
    help="Any-to-any multimodal language models: train them, talk to them, measure them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
_debug = False


def run() -> None:
    """The entry point of the installed command."""
    sys.exit(main(sys.argv[1:]))


def main(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code.

    An MmllmError is printed as one message and gives FAILED; with `--debug` it is raised.
    """
    try:
        app(args=with_present_names(arguments), prog_name="mmllm")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except MmllmError as error:
        if _debug:
            raise
        console.error(error)
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def _print_version(wanted: bool) -> None:
    if wanted:
        import mmllm

        console.echo(f"mmllm {mmllm.__version__}")
        raise typer.Exit


@app.callback()
def common(
    debug: Annotated[bool, typer.Option("--debug", help="Log more; show stack traces.")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_print_version, help="Show the version."),
    ] = False,
) -> None:
    global _debug
    _debug = debug
    console.tolerate_encodings()
    console.set_up_logging(debug=debug)


convert_app = typer.Typer(help="Import what others have trained.", no_args_is_help=True)
convert_app.command("nextgpt")(convert.nextgpt)
reason_app = typer.Typer(help="Programs that use a language model as a part.", no_args_is_help=True)
reason_app.command("search")(reason.search)
reason_app.command("cipher")(reason.cipher)
reason_app.command("read")(reason.read)
reason_app.command("focus")(reason.focus)
insight_app = typer.Typer(help="Look inside a model.", no_args_is_help=True)
insight_app.command("features")(insight_features.features)
insight_app.command("heads")(insight.heads)
insight_app.command("steer")(insight.steer)
insight_app.command("anomalies")(insight_anomalies.anomalies)
data_app = typer.Typer(help="Inspect the data of a stage.", no_args_is_help=True)
data_app.command("check")(data.check)

app.command()(train.train)
app.command()(teach.teach)
app.command()(swap.swap)
app.command()(plan.plan)
app.command()(cache.cache)
app.command()(chat.chat)
app.command()(serve.demo)
app.command()(evaluate.evaluate)
app.command()(serve.serve)
app.command()(convert.export)
app.command()(convert.merge)
app.command()(tools.provenance)
app.command()(tools.assets)
app.command()(tools.concepts)
app.command()(tools.version)
app.add_typer(convert_app, name="convert")
app.add_typer(data_app, name="data")
app.add_typer(insight_app, name="insight")
app.add_typer(reason_app, name="reason")
