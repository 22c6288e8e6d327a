"""Dense merge methods that drop entries: worked numbers, slow obvious versions, peft's combination, and properties."""

import json
import math
from pathlib import Path
from typing import Any, List, Sequence, Tuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.utils.merge_utils import calculate_majority_sign_mask, disjoint_merge

from spacy_sam.errors import SamError
from spacy_sam.merge.methods import MergeMethod, dare, mean, task_arithmetic, ties
from spacy_sam.merge.pruning import (
    Breadcrumbs,
    DareTies,
    Della,
    Pcb,
    breadcrumbs,
    dare_ties,
    della,
    keep_chances,
    pcb,
)
from spacy_sam.merge.stacks import drop

DATA = Path(__file__).parent / "data"
VECTORS = torch.tensor(json.loads((DATA / "ties_vectors.json").read_text(encoding="utf8"))["V"])
EXPECTED = json.loads((DATA / "subspace_vectors.json").read_text(encoding="utf8"))
METHODS = [dare_ties, della, breadcrumbs, pcb]
SETTINGS: List[Any] = [DareTies(), Della(), Della(combine="linear"), Breadcrumbs(), Pcb()]
WEIGHTS = st.integers(1, 12).map(lambda n: n / 4)


@st.composite
def stacks(draw: st.DrawFn, min_experts: int = 1) -> Tuple[torch.Tensor, List[float]]:
    """Random task vectors without equal magnitudes, and weights."""
    n_experts, rows, columns = draw(st.tuples(st.integers(min_experts, 5), st.integers(1, 6), st.integers(1, 7)))
    vectors = random_stack(n_experts, rows, columns, seed=draw(st.integers(0, 10_000)))
    return vectors, draw(st.lists(WEIGHTS, min_size=n_experts, max_size=n_experts))


def random_stack(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def slow_chances(row: Sequence[float], density: float, window: float) -> List[float]:
    order = sorted(range(len(row)), key=lambda i: (abs(row[i]), i))
    low = density - window / 2
    return [low + window * order.index(i) / (len(row) - 1) if len(row) > 1 else density for i in range(len(row))]


def slow_breadcrumbs(
    vectors: Sequence[Sequence[float]], weights: Sequence[float], density: float, gamma: float
) -> List[float]:
    total = [0.0] * len(vectors[0])
    for vector, weight in zip(vectors, weights):
        order = sorted(range(len(vector)), key=lambda i: (-abs(vector[i]), i))
        n_top = int(gamma * len(vector))
        for i in order[n_top : n_top + int(density * len(vector))]:
            total[i] += weight * len(weights) / sum(weights) * vector[i]
    return total


def slow_pcb(vectors: torch.Tensor, weights: Sequence[float], density: float) -> torch.Tensor:
    """By the letter of the paper's code, where nothing is 0 / 0, in float64."""
    n, size = vectors.shape
    shares = torch.tensor(weights, dtype=torch.float64)[:, None] * n / sum(weights)
    vectors = vectors.double()
    ordered = vectors.abs().sort(dim=1).values
    low, high = ordered[:, int(size * 0.0001)], ordered[:, max(int(size * 0.9999 - 1), 0)]
    clipped = vectors.abs().clamp(low[:, None], high[:, None])
    intra = (clipped - low[:, None]) / (high - low)[:, None]
    score = torch.exp(n * intra**2) * torch.tanh(vectors * (shares * vectors).sum(0))
    border = score.sort(dim=1).values[:, int(size * (1 - density))][:, None]
    score = (score.clamp(min=border) - border) / (score.max(dim=1, keepdim=True).values - border)
    total = (shares * score).sum(0)
    return (shares * score * vectors.sign() * clipped).sum(0) / total.clamp(min=1e-12)


def test_worked_pcb():
    merged = pcb(VECTORS, density=EXPECTED["pcb"]["density"], scale=1.0)
    torch.testing.assert_close(merged, torch.tensor(EXPECTED["pcb"]["merged"]), rtol=1e-6, atol=1e-6)


def test_worked_breadcrumbs():
    # 50 % stay, the largest sixth goes: of 6 entries the second, third and fourth largest.
    kept = torch.tensor([[0, 0, 8, -14, 4, 0], [-6, 0, 0, -4, -12, 0], [9, 0, -12, 0, -10, 0]]) / 16
    assert breadcrumbs(VECTORS, None, 0.5, 0.17, 1.0).tolist() == kept.sum(0).tolist()


def test_worked_keep_chances():
    chances = keep_chances(torch.tensor([[3.0, -1.0, 2.0, 0.5, -5.0], [1.0, 1.0, 1.0, 1.0, 1.0]]), 0.5, 0.4)
    torch.testing.assert_close(chances, torch.tensor([[0.6, 0.4, 0.5, 0.3, 0.7], [0.3, 0.4, 0.5, 0.6, 0.7]]))
    assert keep_chances(torch.ones(3, 1), 0.5, 0.4).tolist() == [[0.5]] * 3
    assert keep_chances(torch.tensor(2.0), 0.25, 0.1).tolist() == 0.25


@given(stacks(min_experts=2), st.sampled_from([(0.5, 0.0), (0.5, 0.9), (0.9, 0.2), (0.1, 0.1)]))
def test_keep_chances_are_the_slow_ones(stack, settings):
    vectors, _ = stack
    for vector in vectors:
        expected = [slow_chances(row, *settings) for row in vector.tolist()]
        torch.testing.assert_close(keep_chances(vector, *settings), torch.tensor(expected))


@given(stacks(min_experts=2), st.sampled_from([(0.3, 0.0), (0.3, 0.2), (0.5, 0.5), (1.0, 0.0), (0.75, 0.01)]))
def test_equals_slow_breadcrumbs(stack, settings):
    vectors, weights = stack
    expected = slow_breadcrumbs(vectors.flatten(1).tolist(), weights, *settings)
    merged = breadcrumbs(vectors, weights, *settings, scale=1.0).reshape(-1)
    torch.testing.assert_close(merged, torch.tensor(expected))


def test_small_matrices_are_not_zeroed_by_breadcrumbs():
    """A gamma that is less than one entry removes none, rather than all."""
    vectors = random_stack(2, 50)
    merged = breadcrumbs(vectors, None, 0.9, 0.01, 1.0)
    assert (merged != 0).sum() >= 45


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
@pytest.mark.parametrize(("n_experts", "weights"), [(2, (1, 1)), (3, (3, 2, 1)), (6, (1, 1, 2, 2, 1, 1))])
def test_equals_slow_pcb(n_experts, weights, density):
    vectors = random_stack(n_experts, 40, 55)
    expected = slow_pcb(vectors.flatten(1), weights, density)
    merged = pcb(vectors, weights, density, scale=1.0).reshape(-1)
    torch.testing.assert_close(merged, expected.float(), rtol=1e-3, atol=1e-5)


def test_pcb_where_the_authors_code_divides_by_zero():
    one = pcb(torch.tensor([[4.0, 1.0], [3.0, 0.5]]), density=0.01, scale=1.0)
    assert torch.isfinite(one).all()
    assert one[1] == 0
    assert 0.5 <= one[0] <= 4
    # An expert of zeros has no say; experts of one entry have all of it.
    vectors = random_stack(3, 6, 7)
    vectors[1] = 0
    assert torch.isfinite(pcb(vectors)).all()
    assert pcb(torch.zeros(3, 4)).tolist() == [0] * 4
    assert pcb(torch.tensor([[2.0], [4.0]]), scale=1.0).tolist() == [3]


def test_pcb_of_many_experts_does_not_overflow():
    assert torch.isfinite(pcb(random_stack(120, 5, 6))).all()


@given(stacks(min_experts=2), st.integers(0, 5))
def test_combination_of_what_was_kept_is_that_of_peft(stack, seed):
    vectors, _ = stack
    for merged, keep in [
        (dare_ties(vectors, density=0.4, seed=seed), lambda vector: 0.4),
        (della(vectors, density=0.4, window=0.2, scale=1.0, seed=seed), lambda vector: keep_chances(vector, 0.4, 0.2)),
    ]:
        kept = torch.stack([drop(vector, keep(vector), seed) for vector in vectors])
        torch.testing.assert_close(merged, disjoint_merge(kept, calculate_majority_sign_mask(kept)))


def test_survivors_are_divided_by_their_own_chance():
    vectors = random_stack(2, 200, 100)
    chances = keep_chances(vectors[0], 0.5, 0.6)
    kept = della(vectors, (1.0, 1e-12), 0.5, 0.6, 1.0, combine="linear") / 2
    survived = kept.abs() > 1e-6
    torch.testing.assert_close(kept[survived], (vectors[0] / chances)[survived])
    # Small entries go four times as often, and on the whole half of all stay.
    assert survived.float().mean() == pytest.approx(0.5, abs=0.02)
    for low, high in [(0.2, 0.3), (0.45, 0.55), (0.7, 0.8)]:
        band = (chances >= low) & (chances < high)
        assert survived[band].float().mean() == pytest.approx(float(chances[band].mean()), abs=0.03)


def test_what_nothing_is_dropped_from():
    vectors, weights = random_stack(3, 8, 9), (3, 2, 1)
    assert torch.equal(dare_ties(vectors, weights, density=1.0), ties(vectors, weights, density=1.0))
    assert torch.equal(della(vectors, weights, 1.0, 0.0, 1.0), ties(vectors, weights, density=1.0))
    total = task_arithmetic(vectors, weights, scale=1.0)
    torch.testing.assert_close(della(vectors, weights, 1.0, 0.0, 1.0, combine="linear"), total)
    torch.testing.assert_close(breadcrumbs(vectors, weights, 1.0, 0.0, 1.0), total)


def test_without_a_window_della_is_dare():
    vectors = random_stack(3, 8, 9)
    assert torch.equal(della(vectors, None, 0.5, 0.0, 1.0, 3), dare_ties(vectors, None, 0.5, 1.0, 3))
    linear = della(vectors, None, 0.5, 0.0, 0.4, 3, "linear")
    torch.testing.assert_close(linear, dare(vectors, None, 0.5, 0.4, 3))


def test_chance_depends_on_the_seed_and_on_nothing_else():
    vectors = random_stack(3, 30, 20)
    for method in (dare_ties, della):
        first = method(vectors, seed=1)
        torch.manual_seed(5)
        assert torch.equal(first, method(vectors, seed=1))
        assert not torch.equal(first, method(vectors, seed=2))


@given(stacks(), st.randoms(use_true_random=False))
def test_order_of_experts_does_not_matter(stack, random):
    vectors, weights = stack
    order = list(range(len(weights)))
    random.shuffle(order)
    for method in SETTINGS:
        shuffled = method(vectors[order], [weights[i] for i in order])
        torch.testing.assert_close(shuffled, method(vectors, weights), rtol=1e-4, atol=1e-5)


@given(stacks(), st.sampled_from([3, 0.5, 2.0**200, 2.0**-200]))
def test_weights_are_relative(stack, factor):
    vectors, weights = stack
    for method in SETTINGS:
        larger = method(vectors, [factor * weight for weight in weights])
        torch.testing.assert_close(larger, method(vectors, weights), rtol=1e-4, atol=1e-5)


@given(stacks(), st.sampled_from([0.25, 1.7, 4.0]))
def test_scale_is_linear(stack, scale):
    vectors, weights = stack
    for method in METHODS:
        factor = scale if len(weights) > 1 else 1
        torch.testing.assert_close(method(vectors, weights, scale=scale), factor * method(vectors, weights, scale=1.0))


@pytest.mark.parametrize("method", SETTINGS, ids=str)
def test_shapes_dtypes_and_a_stack_of_one(method):
    single = random_stack(1, 5, 7)
    assert torch.equal(method(single, (0.3,)), single[0])
    assert method(single).data_ptr() != single.data_ptr()
    for given_dtype, expected in [(torch.float32,) * 2, (torch.bfloat16, torch.float32), (torch.float64,) * 2]:
        for shape in [(), (6,), (4, 5), (2, 3, 4)]:
            vectors = random_stack(3, *shape).to(given_dtype)
            before = vectors.clone()
            merged = method(vectors, (1, 2, 3))
            assert (merged.dtype, merged.shape) == (expected, shape)
            assert torch.equal(vectors, before)
    assert method(torch.zeros(3, 4, 5)).abs().max() == 0


@pytest.mark.parametrize(
    ("method", "name", "settings"),
    [
        (DareTies(0.3, 0.9, 2), "DARETIES", {"density": 0.3, "scale": 0.9, "seed": 2}),
        (
            Della(0.6, 0.3, 0.9, 2, "linear"),
            "DELLA",
            {"density": 0.6, "window": 0.3, "scale": 0.9, "seed": 2, "combine": "linear"},
        ),
        (Breadcrumbs(0.4, 0.1, 0.3), "Breadcrumbs", {"density": 0.4, "gamma": 0.1, "scale": 0.3}),
        (Pcb(0.2, 0.8), "PCB", {"density": 0.2, "scale": 0.8}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_settings_are_functions_with_a_registered_config(method, name, settings):
    from spacy_sam.registered import resolve_method

    functions = {"DARETIES": dare_ties, "DELLA": della, "Breadcrumbs": breadcrumbs, "PCB": pcb}
    assert isinstance(method, MergeMethod)
    assert method.config == {"@misc": f"spacy_sam.{name}.v1", **settings}
    assert resolve_method(json.loads(json.dumps(method.config))) == method
    assert resolve_method({"@misc": f"spacy_sam.{name}.v1"}) == type(method)()
    vectors = random_stack(3, 8, 9)
    assert torch.equal(method(vectors, (3, 2, 1)), functions[name](vectors, (3, 2, 1), **settings))


@pytest.mark.parametrize(
    ("kind", "settings", "named"),
    [
        *[
            (kind, {"density": bad}, "density")
            for kind in (DareTies, Della, Breadcrumbs, Pcb)
            for bad in (0, -1, 1.1, "1")
        ],
        *[
            (kind, {"scale": bad}, "scale")
            for kind in (DareTies, Della, Breadcrumbs, Pcb)
            for bad in (0, math.inf, None)
        ],
        (Breadcrumbs, {"density": 0.9, "gamma": 0.2}, "gamma"),
        (Breadcrumbs, {"gamma": -0.1}, "gamma"),
        (Breadcrumbs, {"gamma": math.nan}, "gamma"),
        (Della, {"density": 0.9, "window": 0.3}, "window"),
        (Della, {"density": 0.1, "window": 0.2}, "window"),
        (Della, {"window": -0.1}, "window"),
        (Della, {"combine": "mean"}, "combine"),
    ],
)
def test_bad_settings(kind, settings, named):
    functions = {DareTies: dare_ties, Della: della, Breadcrumbs: breadcrumbs, Pcb: pcb}
    for call in (lambda: kind(**settings), lambda: functions[kind](torch.ones(1, 3), **settings)):
        with pytest.raises(SamError, match=f"] {named} must") as caught:
            call()
        assert caught.value.code == "S401"


@pytest.mark.parametrize("method", [*METHODS, ties, mean, task_arithmetic, dare], ids=lambda m: m.__name__)
def test_bad_input(method):
    for bad in (math.nan, math.inf, -math.inf):
        for n_experts in (1, 3):
            vectors = torch.ones(n_experts, 2, 3)
            vectors[-1, 1, 2] = bad
            with pytest.raises(SamError, match=f"number {n_experts} ") as caught:
                method(vectors)
            assert caught.value.code == "S407"
    for weights in [(1, 0), (1, -1), (1, math.nan), (1,)]:
        with pytest.raises(SamError, match=r"S401.*weights"):
            method(torch.ones(2, 3), weights)
    for vectors in (torch.tensor(1.0), torch.ones(0, 3)):
        with pytest.raises(SamError, match="S401"):
            method(vectors)
