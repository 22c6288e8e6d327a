"""The merging benchmark's parts on small matrices: what is compared gives the same result."""

import pytest
import torch

from benchmarks import merge_costs as costs
from benchmarks import merging

SMALL = (48, 64)


def test_ways_have_the_same_result():
    found = costs.compare_with_peft(SMALL, "cpu", 1)
    assert found.pop("difference") < 1e-6
    assert found.pop("peft keeps otherwise") == 0
    assert set(found) == {"peft", "ours", "ours into bfloat16", "ours, global trim", "copy", "copy of bfloat16"}
    assert min(found.values()) > 0


def test_thresholds_are_equal_and_differences_are_noticed(monkeypatch):
    assert len(costs.compare_thresholds(SMALL)) == 6
    monkeypatch.setattr(costs.thresholds, "_by_histograms", lambda *args: (0.1, 0, 0))
    with pytest.raises(AssertionError, match="differ"):
        costs.compare_thresholds(SMALL)


def test_both_ways_with_a_layer_can_be_run(monkeypatch):
    kept = []
    monkeypatch.setattr(
        costs, "alternate", lambda ways, *args: kept.append({name: work() for name, work in ways.items()})
    )
    costs.compare_ties_svd(SMALL, "cpu", 1)
    merged = costs.merge(costs.random_experts(SMALL, "cpu"))
    assert merged.shape == SMALL
    assert int((merged != 0).sum()) > 0.2 * merged.numel()
    assert torch.isfinite(kept[0]["ours"]).all()


def test_alternate_takes_medians_in_turns(monkeypatch):
    order, times = [], iter([1.0, 10.0, 3.0, 30.0, 2.0, 20.0])
    monkeypatch.setattr(costs, "seconds", lambda work, device: (work(), next(times))[1])
    ways = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    assert costs.alternate(ways, 3) == {"a": 2.0, "b": 20.0}
    assert order == ["a", "b"] * 3


def test_model_of_8b_has_its_parameters():
    """All linear layers of the blocks: 6.98 of the 8.03 B parameters; the others are embeddings and norms."""
    entries = sum(count * rows * columns for (rows, columns), count in costs.SHAPES.items())
    assert entries == 32 * (2 * 4096**2 + 2 * 1024 * 4096 + 3 * 4096 * 14336)
    by_shape = {str(shape): {"x": 1.0} for shape in costs.SHAPES}
    assert merging.of_8b(by_shape, "x") == 32 * 7
