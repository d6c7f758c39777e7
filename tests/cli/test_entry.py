"""The command line: helpful words, exit codes, and never a stack trace for a user's mistake."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

import mmllm
from mmllm import console
from mmllm.cli import FAILED, INTERRUPTED, main
from mmllm.cli.options import find_config
from mmllm.conversation import Image
from mmllm.inference.chat import Chat
from mmllm.model import AnyToAny

ROOT = Path(__file__).parents[2]
COMMANDS = (
    "train",
    "plan",
    "cache",
    "chat",
    "demo",
    "evaluate",
    "export",
    "merge",
    "serve",
    "provenance",
    "assets",
    "version",
)


@pytest.fixture(autouse=True)
def _logging_as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Commands set up logging for a whole process."""
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        monkeypatch.setenv(name, os.environ.get(name, "error"))
    root, own = logging.getLogger(), logging.getLogger("mmllm")
    before = root.handlers, root.level, own.level
    yield
    root.handlers, root.level, own.level = before
    logging.captureWarnings(False)


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def tiny_chat(tiny_model: AnyToAny, monkeypatch: pytest.MonkeyPatch) -> None:
    """`mmllm chat` talks to the tiny model, whatever --model says."""
    monkeypatch.setattr(mmllm, "load", lambda *_, **__: Chat(tiny_model))


def test_help_names_every_command_and_loads_nothing_heavy() -> None:
    program = (
        "import sys; from mmllm.cli import main; code = main(['--help']);"
        "heavy = {'torch', 'transformers', 'diffusers'} & sys.modules.keys();"
        "sys.exit(code or bool(heavy))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert all(f"  {name} " in done.stdout for name in COMMANDS)


def test_the_version_is_an_option_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"mmllm {mmllm.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "model", "prompt"),
    [
        ([], "mini", None),
        (["mini"], "mini", None),
        (["Draw a cat"], "mini", "Draw a cat"),
        (["Draw", "a", "cat"], "mini", "Draw a cat"),
        (["mini", "Draw a cat"], "mini", "Draw a cat"),
        (["run", "Draw a cat"], "run", "Draw a cat"),
        (["own.yaml", "hi"], "own.yaml", "hi"),
        (["docs", "hi"], "mini", "docs hi"),
        (["~nobody-here", "hi"], "mini", "~nobody-here hi"),
        (["mini", "--model", "run"], "run", "mini"),
        (["--model", "run"], "run", None),
        (["x" * 5000], "mini", "x" * 5000),
    ],
)
def test_which_model_is_asked_what(
    arguments: list[str],
    model: str,
    prompt: str | None,
    in_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from mmllm.cli import terminal_chat

    Path("run/checkpoints").mkdir(parents=True)
    Path("docs").mkdir()
    Path("own.yaml").touch()
    asked: dict[str, object] = {"prompt": None}

    class TerminalChat:
        def __init__(self, chat: object, *_: object, **__: object):
            asked["model"] = chat

        def run(self) -> None:
            pass

        def turn(self, prompt: str, _: object) -> None:
            asked["prompt"] = prompt

    monkeypatch.setattr(mmllm, "load", lambda source, **_: source)
    monkeypatch.setattr(terminal_chat, "TerminalChat", TerminalChat)
    assert main(["chat", *arguments]) == 0
    assert asked == {"model": model, "prompt": prompt}


@pytest.mark.parametrize("words", [["mini"], ["--model", "mini"], []])
def test_a_plan_of_a_model_by_name(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *words]) == 0
    assert "llm" in capsys.readouterr().out


def test_python_m_mmllm_is_the_same() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mmllm", "provenance", "nothing.png"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == FAILED
    assert done.stderr == "mmllm: nothing.png: no such file\n"
    assert done.stdout == ""


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert f"mmllm {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["chta"], "Did you mean 'chat'?"),
        (["train"], "Missing argument"),
        (["train", "nothing.yaml"], "nothing.yaml: no such file"),
        (["chat", "hello", "--seeed", "1"], "--seed"),
        (["chat", "hello", "--image", "nothing.png"], "nothing.png: no such file"),
        (["chat", "hello", "--force", "smell"], "unknown modality 'smell'"),
        (["chat", "hello", "--force", "image", "--forbid", "image"], "both name image"),
        (["chat", "hello", "--steps", "0"], "--steps: expected at least 1, got 0"),
        (["chat", "hello", "--out", "apple.xyz"], "unknown suffix"),
        (["chat", "hello", "--model", "nothing"], "nothing: no checkpoint there"),
        (["evaluate", "mini", "--limit", "0"], "--limit: expected at least 1, got 0"),
        (["evaluate", "mini", "--baseline", "no.json"], "no.json is no report"),
        (["evaluate", "mini", "--beside=no.json"], "--beside is now called --baseline"),
        (["serve", "--waiting", "0"], "--max-queue-size: expected at least 1, got 0"),
        (["chat", "minni", "hello"], "no checkpoint there; did you mean 'mini'?"),
        (["chat", "hello", "--force", "pictrue"], "did you mean 'picture'?"),
        (["chat", "mini", "hello", "--sound", "nothing.wav"], "nothing.wav: no such file"),
        (["evaluate", "--model", "minni"], "did you mean 'mini'?"),
        (["demo", "mini", "--model", "runs/x"], "two models: 'mini' and --model 'runs/x'"),
        (["export", "runs/x"], "expected MODEL FOLDER"),
        (["merge", "a", "b", "--model", "mini"], "expected MODEL FOLDER"),
        (["export", "--model", "minni", "there"], "did you mean 'mini'?"),
        (["plan", "a.yaml", "b.yaml"], "expected one CONFIG and KEY=VALUE"),
        (["plan", "minni"], "did you mean 'mini'?"),
        (["serve", "nothing", "--port", "0"], "nothing: no checkpoint there"),
        (["serve", "mini", "--port", "70000"], "choose another --host or --port"),
        (["serve", "mini", "--token", "a b"], "token: expected visible ASCII characters"),
        (["serve", "mini", "--allow-urls", "http://x/"], "expected a host such as example.org"),
        (["export", "nothing", "there"], "nothing: no checkpoint there"),
        (["export", "nothing", "there", "--dtype", "int8"], "expected float32, bfloat16, float16"),
        (["cache", "info"], "mmllm cache info: expected one FOLDER"),
        (["cache", "info", "nothing"], "nothing: no feature cache there"),
        (["assets", "list", "nothing"], "unknown asset 'nothing'"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(
    arguments: list[str], message: str, in_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == FAILED
    shown = capsys.readouterr()
    assert message in shown.err
    assert "Traceback" not in shown.err
    assert shown.out == ""


def test_an_unknown_key_is_named_with_the_near_one(
    in_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("run.yaml").write_text("sytem: {}\nstage: {}\n", encoding="utf-8")
    assert main(["train", "run.yaml"]) == FAILED
    assert "unknown key 'sytem'; did you mean 'system'?" in capsys.readouterr().err


def test_overrides_are_checked_like_the_yaml_wherever_options_stand(
    in_folder: Path, system_tree: dict, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = {
        "name": "s",
        "output": "out",
        "learning_rates": {"*": 0.1},
        "losses": {"text": 1},
        "data": {},
    }
    Path("run.yaml").write_text(yaml.safe_dump({"system": system_tree, "stage": stage}))
    for arguments in (
        ["run.yaml", "stage.stpes=3", "--resume"],
        ["--resume", "run.yaml", "stage.stpes=3"],
    ):
        assert main(["train", *arguments]) == FAILED
        assert "unknown key 'stpes'; did you mean 'steps'?" in capsys.readouterr().err


def test_debug_lets_the_stack_trace_through(in_folder: Path) -> None:
    with pytest.raises(mmllm.ConfigError, match="no such file"):
        main(["--debug", "train", "nothing.yaml"])


def test_a_stopped_training_has_its_own_exit_code(
    in_folder: Path, system_tree: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmllm.training import trainer

    stage = {
        "name": "s",
        "output": "out",
        "learning_rates": {"*": 0.1},
        "losses": {"text": 1},
        "data": {},
    }
    Path("run.yaml").write_text(yaml.safe_dump({"system": system_tree, "stage": stage}))
    monkeypatch.setattr(trainer, "train", lambda run, *, resume: Path(run.stage.output))
    assert main(["train", "run.yaml"]) == INTERRUPTED


@pytest.mark.usefixtures("tiny_chat")
def test_chat_saves_media_under_the_given_name_and_overwrites_nothing_else(
    in_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    forced = ["--force", "image", "--force", "audio", "--seed", "3", "--steps", "2"]
    assert main(["chat", "draw", "--out", "made/apple.png", *forced]) == 0
    assert Path("made/apple.png").is_file()
    assert Path("made/reply-001.wav").is_file()
    shown = capsys.readouterr().out
    assert "[image: made/apple.png]" in shown
    assert "[audio: made/reply-001.wav]" in shown

    assert main(["chat", "draw", "--out", "made", *forced]) == 0
    assert sorted(path.name for path in Path("made").iterdir()) == [
        "apple.png",
        "reply-001.png",
        "reply-001.wav",
        "reply-002.wav",
    ]
    same = Image("made/apple.png").to_numpy() == Image("made/reply-001.png").to_numpy()
    assert same.all(), "same seed, same picture"
    capsys.readouterr()
    assert main(["provenance", "made/apple.png"]) == 0
    assert '"seed": 3' in capsys.readouterr().out


@pytest.mark.usefixtures("tiny_chat")
def test_chat_says_when_there_is_nothing_to_write(
    in_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    forbidden = [word for name in ("image", "audio", "video") for word in ("--forbid", name)]
    assert main(["chat", "hello", "--out", "apple.png", *forbidden]) == 1
    assert "nothing was written to apple.png" in capsys.readouterr().err


@pytest.mark.usefixtures("tiny_chat")
def test_a_chat_of_several_turns(
    in_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = iter(
        [
            "/seed 1",
            "/force image",
            "draw",
            KeyboardInterrupt,
            "/image nothing.png",
            "/image mmllm-chat/reply-001.png",
            "/forbid image",
            "/force smell",
            "what is this?",
            "/auto",
            "/what",
            "/seed abc",
            "/imagine",
            "/force pictrue",
            "/picture",
            '/clip "open',
            EOFError,
        ]
    )

    def answer(_: str) -> str:
        line = next(lines)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", answer)
    assert main(["chat"]) == 0
    shown = capsys.readouterr()
    assert "[image: mmllm-chat/reply-001.png] seed 1" in shown.out
    for message in (
        "Ctrl-D leaves",
        "nothing.png: no such file",
        "goes with your next message: mmllm-chat/reply-001.png",
        "unknown modality 'smell'",
        "unknown command '/what'; /help lists them",
        "/seed: expected a whole number from 0 on, got 'abc'",
        "unknown command '/imagine'; did you mean '/image'?",
        "unknown modality 'pictrue'; did you mean 'picture'?",
        "/picture: expected the name of a file",
        "'\"open': cannot be the name of a file (No closing quotation)",
    ):
        assert message in shown.err
    assert next(lines, None) is None


def test_only_the_main_process_logs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in ("0", "1"):
        monkeypatch.setenv("RANK", number)
        console.set_up_logging()
        logging.getLogger("mmllm.training").info("from %s", number)
    assert capsys.readouterr().err == "from 0\n"


def test_configs_are_found_from_anywhere_they_ship(
    in_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmllm.cli import options

    inside = in_folder / "site" / "mmllm" / "configs" / "mini" / "a.yaml"
    inside.parent.mkdir(parents=True)
    inside.touch()
    file = in_folder / "site" / "mmllm" / "cli" / "options.py"
    monkeypatch.setattr(options, "__file__", str(file))
    assert find_config("configs/mini/a.yaml") == inside
    assert find_config("other/a.yaml") == Path("other/a.yaml")
    own = Path("configs/mini/a.yaml")
    own.parent.mkdir(parents=True)
    own.touch()
    assert find_config("configs/mini/a.yaml") == own


@pytest.fixture
def run_in_processes(tmp_path: Path) -> Callable[[str], list[str]]:
    """Start a script as `accelerate launch --config_file configs/accelerate/NAME.yaml` does."""

    def start(name: str) -> list[str]:
        script = tmp_path / "script.py"
        script.write_text(
            "from mmllm.cli.train import agree_on_cpu\n"
            "agree_on_cpu()\n"
            "import torch\n"
            "from accelerate import Accelerator\n"
            "accelerator = Accelerator()\n"
            "total = accelerator.reduce(torch.ones(()))\n"
            "open(f'{__file__}.{accelerator.process_index}', 'w').write("
            "f'{accelerator.num_processes} {total.item():g} {accelerator.device.type}')\n"
            "accelerator.end_training()\n"
        )
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
        command += [str(ROOT / "configs" / "accelerate" / f"{name}.yaml"), str(script)]
        environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        subprocess.run(
            command, check=True, capture_output=True, env={**os.environ, **environment}, cwd=ROOT
        )
        return [path.read_text() for path in sorted(tmp_path.glob("script.py.*"))]

    return start


@pytest.mark.parametrize(("shape", "output"), [("cpu", ["1 1 cpu"]), ("cpu-2", ["2 2 cpu"] * 2)])
def test_accelerate_really_starts_as_many_processes_as_the_file_says(
    shape: str, output: list[str], run_in_processes: Callable[[str], list[str]]
) -> None:
    """A sum over processes, because two that do not know each other look like two that do."""
    assert run_in_processes(shape) == output
