"""The row `insight/memory`, on a tiny model, whose results are known where everything is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch

from mmllm import mini
from mmllm.evaluation import memory
from mmllm.evaluation.memory import measure_memory, read_text
from mmllm.evaluation.metrics import Metric
from mmllm.inference.chat import Chat
from mmllm.model import AnyToAny

DATA = mini.locate("data")


def measured(model: AnyToAny, num: int) -> dict[str, Metric]:
    done: list[int] = []
    found = {
        metric.name.removeprefix("insight/memory, "): metric
        for metric in measure_memory(Chat(model), DATA, num, done.append)
    }
    assert sum(done) == num
    return found


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    def shorten(blocks: int) -> None:
        options = {"window": 16, "block": 8, "blocks": blocks}
        monkeypatch.setattr(memory, "READ", {192: options})
        monkeypatch.setattr(memory, "MAX_SHARE", {192: 0.4})
        monkeypatch.setattr(memory, "RECALL", options)
        monkeypatch.setattr(memory, "DISTANCE", 300)
        monkeypatch.setattr(memory, "TIMED", (64, 128))

    return shorten


def test_where_everything_is_read_nothing_is_lost(tiny_model: AnyToAny, short: Any) -> None:
    short(1000)
    found = measured(tiny_model, 3)
    ratio = found["perplexity at 192, ratio to that with all keys"]
    assert ratio.value == pytest.approx(1, abs=1e-4)
    assert ratio.met
    assert ratio.low is not None
    assert ratio.high is not None
    assert ratio.low <= ratio.value <= ratio.high
    assert found["perplexity at 192, keys read"].value == pytest.approx(1)
    assert not found["perplexity at 192, keys read"].met
    assert found["name 300 tokens ago"].n == 3
    assert found["time of a token, 2k to 32k kept, largest ratio"].value > 0


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_where_parts_are_read_the_share_is_counted(
    tiny_model: AnyToAny, short: Any, kernels: Literal["auto", "reference"]
) -> None:
    tiny_model.llm.use_kernels(kernels)
    short(2)
    found = measured(tiny_model, 2)
    assert found["perplexity at 192, keys read"].met
    ratio = found["perplexity at 192, ratio to that with all keys"]
    assert ratio.value != pytest.approx(1, abs=1e-4)


def test_a_text_is_read_in_pieces_as_at_once(tiny_model: AnyToAny) -> None:
    llm = tiny_model.llm
    ids = torch.randint(300, (90,), generator=torch.Generator().manual_seed(0))
    reading = read_text(llm, ids, 50, 7)
    with torch.no_grad():
        wanted = llm(llm.embed(ids[None]), positions=torch.arange(90)[None])[0, 50:]
    torch.testing.assert_close(reading.states, wanted, atol=1e-4, rtol=1e-4)
    assert reading.share == 1
    assert reading.cache.get_seq_length() == 90
