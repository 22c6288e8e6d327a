"""Merge methods against worked numbers, peft, a slow obvious TIES, and properties."""

import json
import math
from pathlib import Path
from typing import List, Sequence, Tuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.utils.merge_utils import ties as peft_ties

from spacy_sam.errors import SamError
from spacy_sam.merge.methods import (
    Dare,
    Mean,
    MergeMethod,
    TaskArithmetic,
    Ties,
    dare,
    disjoint_mean,
    elect_signs,
    mean,
    task_arithmetic,
    ties,
    trim,
)

VECTORS = json.loads((Path(__file__).parent / "data" / "ties_vectors.json").read_text(encoding="utf8"))
CASES = VECTORS["ties"]
METHODS = [ties, mean, task_arithmetic, dare]
DENSITIES = (0.1, 0.2, 0.25, 1 / 3, 0.5, 0.75, 1.0)
# Multiples of 1/8, and weights of 1/4: every sum is exact in float32, so properties can ask for equal bits, and equal
# magnitudes and sums of exactly 0 are frequent.
VALUES = st.integers(-16, 16).map(lambda n: n / 8)
WEIGHTS = st.integers(1, 12).map(lambda n: n / 4)


@st.composite
def stacks(draw: st.DrawFn, min_experts: int = 1) -> Tuple[torch.Tensor, List[float]]:
    n_experts, rows, columns = draw(st.tuples(st.integers(min_experts, 5), st.integers(1, 4), st.integers(1, 5)))
    size = n_experts * rows * columns
    values = draw(st.lists(VALUES, min_size=size, max_size=size))
    weights = draw(st.lists(WEIGHTS, min_size=n_experts, max_size=n_experts))
    return torch.tensor(values).reshape(n_experts, rows, columns), weights


def slow_ties(vectors: Sequence[Sequence[float]], weights: Sequence[float], density: float) -> List[float]:
    """TIES by the letter of the paper, on flat lists."""
    trimmed = []
    for vector in vectors:
        order = sorted(range(len(vector)), key=lambda i: (-abs(vector[i]), i))
        kept = set(order[: int(density * len(vector))])
        trimmed.append([value if i in kept else 0.0 for i, value in enumerate(vector)])
    merged = []
    for column in zip(*trimmed):
        sign = 1 if sum(w * v for w, v in zip(weights, column)) >= 0 else -1
        agreeing = [(w, v) for w, v in zip(weights, column) if v * sign > 0]
        merged.append(sum(w * v for w, v in agreeing) / sum(w for w, _ in agreeing) if agreeing else 0.0)
    return merged


def random_stack(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"density{case['density']:.2f}")
def test_worked_example(case):
    vectors = torch.tensor(VECTORS["V"])
    trimmed = trim(vectors, case["density"])
    assert trimmed.tolist() == case["trimmed"]
    assert (trimmed != 0).sum(1).tolist() == [case["n_kept"]] * 3
    signs = elect_signs(trimmed)
    assert signs.tolist() == case["signs"]
    assert disjoint_mean(trimmed, signs).tolist() == case["merged"]
    assert ties(vectors, density=case["density"]).tolist() == case["merged"]
    assert ties(vectors, (1, 1, 1), case["density"], scale=0.5).tolist() == [v / 2 for v in case["merged"]]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"density{case['density']:.2f}")
def test_weights_count_in_election_and_mean(case):
    merged = ties(torch.tensor(VECTORS["V"]), (0.5, 0.25, 0.25), case["density"])
    torch.testing.assert_close(merged, torch.tensor(case["mergekit_w_.5_.25_.25"]), rtol=1e-6, atol=0)


def test_linear_methods_on_worked_example():
    vectors = torch.tensor(VECTORS["V"])
    total = torch.tensor(VECTORS["sum"])
    torch.testing.assert_close(mean(vectors), torch.tensor(VECTORS["mean"]))
    torch.testing.assert_close(mean(vectors, scale=3), total)
    torch.testing.assert_close(task_arithmetic(vectors, scale=1), total)
    torch.testing.assert_close(task_arithmetic(vectors, (5, 5, 5)), 0.4 * total)
    weighted = 0.5 * vectors[0] + 0.25 * vectors[1] + 0.25 * vectors[2]
    torch.testing.assert_close(mean(vectors, (2, 1, 1)), weighted)
    torch.testing.assert_close(task_arithmetic(vectors, (2, 1, 1), scale=1), 3 * weighted)


def test_sum_of_zero_elects_plus():
    vectors = torch.tensor(VECTORS["zero_sum_tie"]["Z"])
    assert elect_signs(vectors)[0] == 1
    assert ties(vectors, density=1).tolist() == VECTORS["zero_sum_tie"]["merged"]
    assert ties(-vectors, density=1)[0] == 2
    # Weights 3 and 1 on -1 and 3: zero again, only when the election is weighted.
    assert ties(torch.tensor([[-1.0], [3.0]]), (3, 1), density=1).tolist() == [3]
    assert ties(torch.tensor([[-1.0], [3.0]]), (4, 1), density=1).tolist() == [-1]


def test_trimmed_entries_have_no_say():
    # Untrimmed, the second entry would be elected negative; trimmed, two small negatives are gone.
    vectors = torch.tensor([[4.0, 2.0], [4.0, -1.5], [4.0, -1.5]])
    assert ties(vectors, density=1).tolist() == [4, -1.5]
    assert ties(torch.tensor([[1.0, 2.0], [4.0, -1.5], [4.0, -1.5]]), density=0.5).tolist() == [4, 2]


def test_trim_keeps_first_of_equal_magnitudes():
    vector = torch.tensor([[1.0, -1.0, 2.0], [1.0, 3.0, -1.0]])
    assert trim(vector[None], 0.5).tolist() == [[[1, 0, 2], [0, 3, 0]]]
    assert trim(vector[None], 4 / 6).tolist() == [[[1, -1, 2], [0, 3, 0]]]
    equal = torch.full((1, 50, 40), -0.5)
    kept = trim(equal, 0.3).reshape(-1)
    assert (kept[:600] == -0.5).all()
    assert (kept[600:] == 0).all()


def test_trim_keeps_exactly_the_share_of_each_vector():
    vectors = random_stack(3, 10, 10) * torch.tensor([1.0, 10.0, 100.0])[:, None, None]
    for density, n_kept in [(0.001, 0), (0.01, 1), (0.29, int(0.29 * 100)), (0.5, 50), (1.0, 100), (1, 100)]:
        trimmed = trim(vectors, density)
        assert (trimmed != 0).flatten(1).sum(1).tolist() == [n_kept] * 3
        assert torch.equal(trimmed[trimmed != 0], vectors[trimmed != 0])
        for vector, rest in zip(trimmed, vectors - trimmed):
            assert not n_kept or vector[vector != 0].abs().min() >= rest.abs().max()


@pytest.mark.parametrize("density", [0.05, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("n_experts", [2, 3, 6])
def test_equals_peft_at_weights_one(density, n_experts):
    vectors = random_stack(n_experts, 37, 53)
    expected = peft_ties(list(vectors), torch.ones(n_experts), density)
    torch.testing.assert_close(ties(vectors, density=density), expected)


@given(stacks(min_experts=2), st.sampled_from(DENSITIES))
def test_equals_slow_ties(stack, density):
    vectors, weights = stack
    expected = slow_ties(vectors.flatten(1).tolist(), weights, density)
    torch.testing.assert_close(ties(vectors, weights, density).reshape(-1), torch.tensor(expected), rtol=1e-6, atol=0)


@given(stacks(), st.sampled_from(DENSITIES), st.randoms(use_true_random=False))
def test_order_of_experts_does_not_matter(stack, density, random):
    vectors, weights = stack
    order = list(range(len(weights)))
    random.shuffle(order)
    shuffled = [weights[i] for i in order]
    assert torch.equal(ties(vectors[order], shuffled, density), ties(vectors, weights, density))
    assert torch.equal(mean(vectors[order], shuffled), mean(vectors, weights))
    assert torch.equal(task_arithmetic(vectors[order], shuffled), task_arithmetic(vectors, weights))


@given(stacks(), st.sampled_from([3, 0.5, 7, 2.0**200, 2.0**-200]))
def test_weights_are_relative(stack, factor):
    vectors, weights = stack
    larger = [factor * weight for weight in weights]
    assert torch.equal(ties(vectors, larger), ties(vectors, weights))
    for method in (mean, task_arithmetic):
        torch.testing.assert_close(method(vectors, larger), method(vectors, weights), rtol=1e-6, atol=0)


@given(stacks(), st.sampled_from([0.25, 0.3, 1.7, 4.0]))
def test_scale_is_linear(stack, scale):
    vectors, weights = stack
    for method in METHODS:
        factor = scale if len(weights) > 1 else 1
        torch.testing.assert_close(method(vectors, weights, scale=scale), factor * method(vectors, weights, scale=1.0))


@pytest.mark.parametrize(
    "method", [Ties(0.01, 3.0), Mean(0.5), TaskArithmetic(0.4), Dare(0.5)], ids=lambda m: type(m).__name__
)
def test_single_expert_is_returned_as_it_is(method):
    vectors = random_stack(1, 5, 7)
    merged = method(vectors, (0.3,))
    assert torch.equal(merged, vectors[0])
    assert merged.data_ptr() != vectors.data_ptr()


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.__name__)
@pytest.mark.parametrize("n_experts", [1, 3])
@pytest.mark.parametrize(
    ("given_dtype", "expected"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_dtype_and_shape(method, n_experts, given_dtype, expected):
    for shape in [(6,), (4, 5), (2, 3, 4)]:
        vectors = random_stack(n_experts, *shape).to(given_dtype)
        before = vectors.clone()
        merged = method(vectors, [0.3] * n_experts)
        assert merged.dtype == expected
        assert merged.shape == shape
        assert torch.equal(vectors, before)
        torch.testing.assert_close(merged, method(vectors.to(expected), [0.3] * n_experts))


def test_float64_is_exact_to_float64():
    vectors = torch.tensor([[1.0, 3.0], [2.0, 5.0]], dtype=torch.float64)
    weights = (0.1, 0.7)
    expected = torch.tensor([(0.1 + 1.4) / 0.8, (0.3 + 3.5) / 0.8], dtype=torch.float64)
    for merged in (ties(vectors, weights, density=1), mean(vectors, weights)):
        torch.testing.assert_close(merged, expected, rtol=1e-14, atol=0)


def test_tiny_weights_make_no_nan():
    vectors = torch.tensor([[1.0, 0.0, 2.0], [0.0, 3.0, 4.0]])
    merged = ties(vectors, (1.0, 1e-300), density=1)
    torch.testing.assert_close(merged, torch.tensor([1.0, 3.0, 2.0]))


def test_nothing_agrees_where_all_is_trimmed():
    assert ties(torch.tensor([[5.0, 0.1], [4.0, -0.2]]), density=0.5).tolist() == [4.5, 0]
    assert ties(torch.zeros(3, 4)).tolist() == [0] * 4


def test_task_vectors_are_not_merged_by_factor():
    lora = {key: torch.tensor(value) for key, value in VECTORS["lora"].items()}
    dense = torch.stack([lora["B1"] @ lora["A1"], lora["B2"] @ lora["A2"]])
    assert torch.equal(dense, torch.stack([lora["D1"], lora["D2"]]))
    assert torch.equal(mean(dense), lora["mean_dw"])
    assert torch.equal(ties(dense, density=1), lora["ties_dw_d1"])
    assert torch.equal(ties(dense, density=0.5), lora["ties_dw_d0.5"])
    a, b = torch.stack([lora["A1"], lora["A2"]]), torch.stack([lora["B1"], lora["B2"]])
    assert torch.equal(mean(b) @ mean(a), lora["separate_mean"])
    assert torch.equal(ties(b, density=0.5) @ ties(a, density=0.5), lora["ties_separate_d0.5"])
    assert not torch.allclose(ties(b, density=0.5) @ ties(a, density=0.5), ties(dense, density=0.5))


@pytest.mark.parametrize("density", [0, -0.1, 1.0001, math.nan, math.inf])
def test_bad_density(density):
    for call in (lambda: trim(torch.ones(2, 3), density), lambda: ties(torch.ones(1, 3), density=density)):
        with pytest.raises(SamError, match="density") as caught:
            call()
        assert caught.value.code == "S401"
    with pytest.raises(SamError, match="density"):
        Ties(density=density)


@pytest.mark.parametrize("scale", [0, -1.0, math.nan, math.inf])
def test_bad_scale(scale):
    for method in METHODS:
        with pytest.raises(SamError, match="scale") as caught:
            method(torch.ones(1, 3), scale=scale)
        assert caught.value.code == "S401"
    for settings in (Ties, Mean, TaskArithmetic, Dare):
        with pytest.raises(SamError, match="scale"):
            settings(scale=scale)


@pytest.mark.parametrize("weights", [(1, 0), (1, -1), (1, math.nan), (1, math.inf), (1,), (1, 1, 1), ()])
def test_bad_weights(weights):
    vectors = torch.ones(2, 3)
    calls = [*METHODS, elect_signs, lambda v, w: disjoint_mean(v, torch.ones(3), w)]
    for call in calls:
        with pytest.raises(SamError, match="weights") as caught:
            call(vectors, weights)
        assert caught.value.code == "S401"


@pytest.mark.parametrize("vectors", [torch.tensor(1.0), torch.ones(0, 3)], ids=["scalar", "empty"])
def test_bad_stack(vectors):
    for method in METHODS:
        with pytest.raises(SamError, match="S401"):
            method(vectors)


@pytest.mark.parametrize(
    ("method", "function", "settings"),
    [
        (Ties(), ties, {"density": 0.2, "scale": 1.0}),
        (Ties(density=0.5, scale=0.7), ties, {"density": 0.5, "scale": 0.7}),
        (Mean(scale=2.0), mean, {"scale": 2.0}),
        (TaskArithmetic(), task_arithmetic, {"scale": 0.4}),
        (Dare(), dare, {"density": 0.5, "scale": 0.4, "seed": 0}),
        (Dare(0.1, 1.0, 7), dare, {"density": 0.1, "scale": 1.0, "seed": 7}),
    ],
    ids=str,
)
def test_settings_are_functions_with_a_config(method, function, settings):
    names = {Ties: "TIES", Mean: "Mean", TaskArithmetic: "TaskArithmetic", Dare: "DARE"}
    assert isinstance(method, MergeMethod)
    assert method.config == {"@misc": f"spacy_sam.{names[type(method)]}.v1", **settings}
    assert json.loads(json.dumps(method.config)) == method.config
    assert type(method)(**settings) == method
    vectors = random_stack(3, 8, 9)
    assert torch.equal(method(vectors, (3, 2, 1)), function(vectors, (3, 2, 1), **settings))


def test_dare_keeps_all_at_density_one():
    vectors = random_stack(3, 8, 9)
    assert torch.equal(dare(vectors, density=1.0), task_arithmetic(vectors))


def test_dare_keeps_a_share_of_the_entries_rescaled():
    vectors = random_stack(2, 200, 100)
    kept = dare(vectors, (1.0, 1e-12), density=0.3, scale=1.0) / (2 * vectors[0])
    assert (kept.abs() < 1e-6).float().mean() == pytest.approx(0.7, abs=0.02)
    torch.testing.assert_close(kept[kept.abs() > 1e-6], torch.full_like(kept, 1 / 0.3)[kept.abs() > 1e-6])


def test_dare_depends_on_its_seed_and_on_nothing_else():
    vectors = random_stack(3, 30, 20)
    first = dare(vectors, seed=1)
    torch.manual_seed(5)
    assert torch.equal(first, dare(vectors, seed=1))
    assert not torch.equal(first, dare(vectors, seed=2))


@pytest.mark.parametrize("density", [0, -0.5, 1.5, math.nan, "0.5"])
def test_bad_dare_density(density):
    with pytest.raises(SamError, match="density"):
        Dare(density=density)
