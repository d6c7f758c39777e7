"""`mmllm serve` and `mmllm demo`: a model behind OpenAI's API, and in the browser."""

from __future__ import annotations

from typing import Annotated

import typer

from mmllm import console
from mmllm.cli.options import (
    Device,
    DType,
    Memory,
    ModelArgument,
    ModelOption,
    Trust,
    check_at_least_one,
    one_model,
)
from mmllm.errors import ConfigError


def demo(
    named: ModelArgument = None,
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
    device: Device = None,
    dtype: DType = None,
    trust: Trust = None,
) -> None:
    """Talk to a model in the browser (needs the extra `demo`)."""
    import mmllm
    from mmllm.demo import Demo, card_of
    from mmllm.kernels.allocator import limit_malloc_arenas

    model = one_model(named, model)
    console.note(f"loading {model}")
    limit_malloc_arenas()
    chat = mmllm.load(model, device=device, dtype=dtype)
    chat.model.load_encoders()
    with Demo(chat, card=card_of(model), host=host, port=port, share=share) as page:
        console.echo(page.url)
        if page.shared_url:
            console.echo(page.shared_url)
        console.note("Ctrl-C ends it")
        page.wait()


def serve(
    named: ModelArgument = None,
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
    max_batch_size: Annotated[int, typer.Option(help="Requests answered at the same time.")] = 8,
    max_queue_size: Annotated[int, typer.Option(help="Requests that wait, at most.")] = 64,
    prefix_cache_size: Annotated[
        int, typer.Option(help="Conversations whose caches are kept for their next turns.")
    ] = 0,
    memory: Memory = False,
    device: Device = None,
    dtype: DType = None,
    trust: Trust = None,
) -> None:
    """Serve a model by OpenAI's API (needs the extra `server`)."""
    try:
        from mmllm.server import listener
        from mmllm.server.settings import ServerSettings
    except ModuleNotFoundError as error:
        raise ConfigError(f"mmllm serve needs {error.name}: pip install 'mmllm[server]'") from error

    model = one_model(named, model)
    check_at_least_one(max_batch_size=max_batch_size, max_queue_size=max_queue_size)
    settings = ServerSettings(
        token=token,
        allow_urls=frozenset(allow_urls or ()),
        hosts=listener.allowed_hosts(host),
        media_format=media,  # pyright: ignore[reportArgumentType]  # ServerSettings checks it
        lenient=lenient,
        allow_origins=frozenset(allow_origins or ()),
        max_batch=max_batch_size,
        max_queued=max_queue_size,
    )
    socket = listener.listen(host, port)
    if token is None and not listener.is_loopback(host):
        console.note("others can reach this server and need no token: see --token")

    import mmllm
    from mmllm.kernels.allocator import limit_malloc_arenas
    from mmllm.server.app import build_app

    console.note(f"loading {model}")
    limit_malloc_arenas()
    chat = mmllm.load(
        model,
        device=device,
        dtype=dtype,
        prefixes=prefix_cache_size,
        memory=memory or None,
    )
    chat.model.load_encoders()
    console.echo(f"{listener.address(socket)}/v1")
    listener.uvicorn_server(build_app(chat, settings)).run(sockets=[socket])
