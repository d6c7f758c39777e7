"""A chat with a model in the browser; `mmllm demo` with more options is the same.

python demos/chat.py --model mini [--port 7860]
"""

import argparse

import mmllm
from mmllm import console
from mmllm.demo import Demo, card_of


def main() -> None:
    options = arguments()
    console.set_up_logging()
    chat = mmllm.load(options.model)
    with Demo(chat, card=card_of(options.model), port=options.port) as page:
        console.echo(page.url)
        page.wait()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="mini")
    parser.add_argument("--port", type=int)
    return parser.parse_args()


if __name__ == "__main__":
    main()
