"""demos/mixtures.py: its families, its model, and a run of a few steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from demos import mixtures


def drawn(num: int = 4000) -> tuple[torch.Tensor, torch.Generator]:
    generator = torch.Generator().manual_seed(0)
    shape = (num, mixtures.EXAMPLES, mixtures.DIMENSIONS)
    return torch.randn(shape, generator=generator), generator


def test_families_have_variance_one_and_sums_are_between_them() -> None:
    x, generator = drawn()
    for family in mixtures.FAMILIES.values():
        assert family(x, generator).square().mean() == pytest.approx(1, abs=0.05)
    half = mixtures.combined(0.5)(x, generator)
    assert half.square().mean() == pytest.approx(0.5, abs=0.05)


def test_least_squares_knows_a_linear_function_from_as_many_examples_as_dimensions() -> None:
    error = mixtures.least_squares(mixtures.linear).median(0).values
    assert error[0] > 0.1
    assert (error[mixtures.DIMENSIONS :] < 1e-6).all()


def test_a_prediction_depends_on_the_pairs_before_it_alone() -> None:
    torch.manual_seed(0)
    model = mixtures.InContextLearner().eval()
    x, generator = drawn(3)
    y = mixtures.linear(x, generator)
    changed = y.clone()
    changed[:, 5:] += 1
    with torch.no_grad():
        before, after = model(x, y), model(x, changed)
    assert torch.equal(before[:, :6], after[:, :6])
    assert (before[:, 6] != after[:, 6]).all()


def test_training_helps_and_a_run_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(mixtures, "SEQUENCES", 100)
    early, late = (mixtures.train(["linear"], 0, steps) for steps in (1, 60))
    first, last = (mixtures.errors(model, mixtures.linear).mean() for model in (early, late))
    assert last < first
    monkeypatch.setattr("sys.argv", ["mixtures.py", str(tmp_path), "--steps", "2"])
    mixtures.main()
    assert capsys.readouterr().out.count("2 steps") == 3
    report = json.loads((tmp_path / "mixtures.json").read_text(encoding="utf-8"))
    findings = report["findings"][0]
    errors = report["errors"][0]
    assert errors["mixture"]["sine"][-1][1] < errors["mixture"]["sine"][-1][2]
    assert findings["outside: sine asked of the linear model"] == errors["linear"]["sine"][-1][0]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "between: half and half" in (tmp_path / "index.html").read_text(encoding="utf-8")
    mixtures.main()
    assert "2 steps" not in capsys.readouterr().out
