"""`python -m mmllm` is `mmllm`."""

from mmllm.cli import run

if __name__ == "__main__":
    run()
