"""The profile of a training step sorts operators into the parts that the cost model has a floor for."""

from pathlib import Path

import pytest


@pytest.fixture
def profile_training(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    import profile_training

    return profile_training


@pytest.mark.parametrize("n_items", [40, 3668])
def test_parts(profile_training, n_items):
    def part(operator, *shapes):
        return profile_training.part_of(f"aten::{operator}", shapes, n_items)

    assert part("mm", [1024, 64], [64, n_items]) == part("mm", [n_items, 1024], [1024, 64]) == "scores of all items"
    assert part("mm", [6400, 64], [64, 256]) == part("addmm", [64], [6400, 64], [64, 64]) == "linear layers"
    assert part("_softmax", [1024, n_items]) == "softmax"
    assert part("_softmax", [256, n_items, n_items]) == part("bmm", [256, 50, 32], [256, 32, 50]) == "attention"
    assert part("random_", [102400]) == "dropout"
    assert part("empty", []) == "allocation, views, calls and the rest"
