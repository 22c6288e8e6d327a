"""Merge methods on LoRA factors against worked numbers and their dense definitions, computed slowly."""

import json
import math
import random as randoms
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, List, Sequence, Tuple

import pytest
import torch
from helpers import load_model
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spacy_sam.adapters import Adapter, LoraFactors
from spacy_sam.bank import ExpertBank
from spacy_sam.errors import SamError
from spacy_sam.merge.factors import FactorMethod, Low, left_basis, low_rank_svd
from spacy_sam.merge.materialise import WeightSwitch
from spacy_sam.merge.merged import LOW_RANK, merged_deltas, merged_factors
from spacy_sam.merge.methods import Dare, Mean, MergeMethod, TaskArithmetic, Ties, ties
from spacy_sam.merge.pruning import Breadcrumbs, DareTies, Della, Pcb
from spacy_sam.merge.subspace import (
    CoreSpace,
    IsoC,
    Knots,
    Star,
    Tsvm,
    core_space,
    iso_c,
    knots,
    star,
    truncate_and_rescale,
    tsv_m,
)
from spacy_sam.plan import TaskModelSpec

DATA = Path(__file__).parent / "data"
LORA = {
    key: torch.tensor(value)
    for key, value in json.loads((DATA / "ties_vectors.json").read_text(encoding="utf8"))["lora"].items()
}
EXPECTED = json.loads((DATA / "subspace_vectors.json").read_text(encoding="utf8"))
WORKED = [LoraFactors(LORA["A1"], LORA["B1"], 1.0), LoraFactors(LORA["A2"], LORA["B2"], 1.0)]
METHODS: List[Any] = [Star(), IsoC(), Tsvm(), Knots(0.6), CoreSpace(Ties(0.6))]
WEIGHTS = st.integers(1, 12).map(lambda n: n / 4)


def lora(out: int, into: int, rank: int, seed: int = 0, scale: float = 1.0, transposed: bool = False) -> LoraFactors:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rank, into, generator=generator), torch.randn(out, rank, generator=generator)
    return LoraFactors(a, b, scale, transposed)


@st.composite
def experts(draw: st.DrawFn, min_experts: int = 2) -> Tuple[List[LoraFactors], List[float]]:
    """Random factors of one matrix, of different ranks and scales; some experts do not change it."""
    out, into = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    ranks = draw(st.lists(st.integers(0, 4), min_size=min_experts, max_size=4))
    seed, transposed = draw(st.integers(0, 10_000)), draw(st.booleans())
    scales = draw(st.lists(st.sampled_from([0.5, 1.0, 2.0]), min_size=len(ranks), max_size=len(ranks)))
    factors = [
        lora(out, into, rank, seed + 10_000 * number, scale, transposed)
        for number, (rank, scale) in enumerate(zip(ranks, scales))
    ]
    return factors, draw(st.lists(WEIGHTS, min_size=len(ranks), max_size=len(ranks)))


def close(merged: LoraFactors, expected: Tensor, tolerance: float = 1e-4) -> None:
    size = max(float(expected.abs().max()), 1e-3) if expected.numel() else 1.0
    torch.testing.assert_close(merged.delta().double(), expected.double(), rtol=0, atol=tolerance * size)


def dense(factors: Sequence[LoraFactors]) -> List[Tensor]:
    """dW as [out, in] in float64, whatever the base's layout."""
    return [each.scale * each.b.double() @ each.a.double() for each in factors]


def svd(matrix: Tensor, least: float = 1e-6) -> Tuple[Tensor, Tensor, Tensor]:
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    kept = s > least * s.max()
    return u[:, kept], s[kept], v[kept]


def unit_mean(weights: Sequence[float]) -> List[float]:
    return [weight * len(weights) / sum(weights) for weight in weights]


def slow_star(factors, weights, eta=40.0):
    total = torch.zeros_like(dense(factors)[0])
    for delta, weight in zip(dense(factors), weights):
        u, s, v = svd(delta)
        for rank in range(1, len(s) + 1):
            if s[:rank].sum() >= eta / 100 * s.sum() * (1 - 1e-9):
                kept = (u[:, :rank] * s[:rank]) @ v[:rank]
                total += weight / sum(weights) * kept * s.sum() / s[:rank].sum()
                break
    return total


def slow_iso_c(factors, weights):
    total = sum(weight * delta for delta, weight in zip(dense(factors), unit_mean(weights)))
    u, s, v = svd(total)
    return s.mean() * u @ v if len(s) else total


def slow_tsv_m(factors, weights):
    parts = [(svd(delta), weight) for delta, weight in zip(dense(factors), unit_mean(weights))]
    parts = [(part, weight) for part, weight in parts if len(part[1])]
    if not parts:
        return torch.zeros_like(dense(factors)[0])
    spans = [len(svd(torch.cat(dense(factors), dim=dim))[1]) for dim in (0, 1)]
    n_kept = max(min(spans) // len(parts), 1)
    u = torch.cat([part[0][:, :n_kept] for part, _ in parts], dim=1)
    s = torch.cat([weight * part[1][:n_kept] for part, weight in parts])
    v = torch.cat([part[2][:n_kept] for part, _ in parts])
    (u1, _, u2), (v1, _, v2) = svd(u), svd(v)
    return u1 @ u2 @ torch.diag(s) @ v1 @ v2


def slow_ties(vectors: Tensor, weights: Sequence[float], density: float) -> Tensor:
    vectors = torch.where(vectors.abs() > 1e-6 * vectors.abs().max(), vectors, 0) if vectors.numel() else vectors
    return ties(vectors, weights, density)


def slow_knots(factors, weights, density=0.6):
    u, _, _ = svd(torch.cat(dense(factors), dim=1))
    coordinates = torch.stack([u.T @ delta for delta in dense(factors)])
    return 0.5 * u @ slow_ties(coordinates, weights, density)


def slow_core_ties(factors, weights, density=0.6):
    left = svd(torch.cat([each.scale * each.b.double() for each in factors], dim=1), 1e-10)[0]
    right = svd(torch.cat([each.a.double() for each in factors]), 1e-10)[2]
    cores = torch.stack([left.T @ delta @ right.T for delta in dense(factors)])
    return left @ slow_ties(cores, weights, density) @ right


SLOW = list(zip(METHODS, (slow_star, slow_iso_c, slow_tsv_m, slow_knots, slow_core_ties)))


def named(value: Any) -> str:
    return type(value).__name__ if isinstance(value, FactorMethod) else ""


def test_worked_examples():
    close(iso_c(WORKED), torch.tensor(EXPECTED["iso_c"]), 1e-6)
    close(tsv_m(WORKED), torch.tensor(EXPECTED["tsv_m"]), 1e-6)
    close(core_space(WORKED, inner=Ties(density=1.0)), torch.tensor(EXPECTED["core_ties"]), 1e-6)
    for case in EXPECTED["knots"]:
        # Coordinates are [4, 3]; half an entry more, so that rounding down gives the number that was kept.
        density = min((case["n_kept"] + 0.5) / 12, 1.0)
        close(knots(WORKED, None, density, 1.0), torch.tensor(case["merged"]), 1e-6)


def test_worked_star():
    u, s, v = truncate_and_rescale(low_rank_svd(Low(LORA["B1"].double(), LORA["A1"].double())), EXPECTED["star"]["eta"])
    expected = torch.tensor(EXPECTED["star"]["D1"]).double()
    torch.testing.assert_close((u * s) @ v, expected, rtol=1e-6, atol=1e-6)
    # Twice the expert is the mean of two.
    close(star([WORKED[0], WORKED[0]]), expected, 1e-6)


@pytest.mark.parametrize(("eta", "rank"), [(1, 1), (40, 1), (50, 1), (50.1, 2), (75, 2), (76, 3), (100, 3)])
def test_star_keeps_as_few_as_reach_the_share(eta, rank):
    factors = LoraFactors(torch.eye(3, 4), torch.diag(torch.tensor([2.0, 1.0, 1.0])), 1.0)
    kept = truncate_and_rescale(low_rank_svd(Low(factors.b.double(), factors.a.double())), eta)
    assert len(kept.s) == rank
    assert float(kept.s.sum()) == pytest.approx(4)


@pytest.mark.parametrize(("method", "slow"), SLOW, ids=named)
@given(case=experts())
def test_factors_multiply_to_the_dense_definition(method, slow, case):
    factors, weights = case
    merged = method.merge_factors(factors, weights)
    expected = slow(factors, weights) if any(each.a.shape[0] for each in factors) else dense(factors)[0]
    close(merged, expected.T if merged.transposed else expected)


@pytest.mark.parametrize("method", METHODS, ids=named)
@given(case=experts())
def test_rank_is_at_most_the_sum_of_ranks(method, case):
    factors, weights = case
    merged = method.merge_factors(factors, weights)
    assert merged.a.shape[0] == merged.b.shape[1] <= sum(each.a.shape[0] for each in factors)
    assert (merged.shape, merged.scale) == (factors[0].shape, 1.0)
    assert merged.a.dtype == merged.b.dtype == torch.float32
    assert merged.transposed == factors[0].transposed


@pytest.mark.parametrize("method", METHODS, ids=named)
@given(case=experts(), random=st.randoms(use_true_random=False))
def test_order_of_experts_changes_no_bit(method, case, random):
    factors, weights = case
    order = list(range(len(weights)))
    random.shuffle(order)
    merged = method.merge_factors(factors, weights)
    shuffled = method.merge_factors([factors[i] for i in order], [weights[i] for i in order])
    assert torch.equal(merged.a, shuffled.a)
    assert torch.equal(merged.b, shuffled.b)


@pytest.mark.parametrize("inner", [Dare(), DareTies(), Della(), Pcb(0.5)], ids=str)
def test_order_of_experts_does_not_change_what_chance_drops_in_core_space(inner):
    factors = [lora(7, 9, 3, seed) for seed in range(3)]
    merged = core_space(factors, (1, 2, 3), inner).delta()
    assert torch.equal(merged, core_space(factors[::-1], (3, 2, 1), inner).delta())
    assert torch.isfinite(merged).all()


@pytest.mark.parametrize("method", METHODS, ids=named)
@given(case=experts(), factor=st.sampled_from([3, 0.5, 2.0**200, 2.0**-200]))
def test_weights_are_relative(method, case, factor):
    factors, weights = case
    larger = method.merge_factors(factors, [factor * weight for weight in weights])
    close(larger, method.merge_factors(factors, weights).delta())


@pytest.mark.parametrize(
    "make",
    [lambda s: Star(scale=s), IsoC, Tsvm, lambda s: Knots(0.6, s), lambda s: CoreSpace(Ties(0.6, s))],
    ids=["Star", "IsoC", "Tsvm", "Knots", "CoreSpace"],
)
@given(case=experts(), scale=st.sampled_from([0.25, 1.7, 4.0]))
def test_scale_is_linear(make: Callable[[float], Any], case, scale):
    factors, weights = case
    merged = make(scale).merge_factors(factors, weights)
    close(merged, scale * make(1.0).merge_factors(factors, weights).delta(), 1e-5)


@pytest.mark.parametrize("method", METHODS, ids=named)
def test_single_expert_is_returned_as_it_is(method):
    single = lora(5, 7, 3, scale=0.3)
    assert method.merge_factors([single], [0.2]) is single


@pytest.mark.parametrize("method", METHODS[:-1], ids=named)
@given(case=experts(), seed=st.integers(0, 100))
def test_how_a_change_is_factored_does_not_matter(method, case, seed):
    """(B Q^-1) (Q A) is the same change. Core space's TIES is the exception, as in its paper."""
    factors, weights = case
    generator = torch.Generator().manual_seed(seed)
    other = []
    for each in factors:
        q = (
            torch.linalg.qr(torch.randn(2 * (each.a.shape[:1]), generator=generator))[0]
            if each.a.shape[0]
            else each.a[:, :0]
        )
        other.append(replace(each, a=4 * q @ each.a, b=each.b @ q.T, scale=each.scale / 4) if len(q) else each)
    close(method.merge_factors(other, weights), method.merge_factors(factors, weights).delta(), 1e-3)


@given(case=experts())
def test_linear_merges_in_core_space_are_those_of_dense_task_vectors(case):
    factors, weights = case
    for inner in (Mean(0.7), TaskArithmetic(0.3)):
        expected = inner(torch.stack(dense(factors)), weights)
        close(core_space(factors, weights, inner), expected.T if factors[0].transposed else expected, 1e-5)


@given(case=experts())
def test_iso_c_makes_all_directions_equal_and_keeps_their_sum(case):
    factors, weights = case
    merged = IsoC().merge_factors(factors, weights)
    total = sum(weight * delta for delta, weight in zip(dense(factors), unit_mean(weights)))
    before, after = torch.linalg.svdvals(total), torch.linalg.svdvals(merged.delta())
    assert float(after.sum()) == pytest.approx(float(before.sum()), rel=1e-4, abs=1e-6)
    rank = merged.a.shape[0]
    torch.testing.assert_close(after[:rank], after[:1].expand(rank), rtol=1e-4, atol=1e-6)


@given(st.integers(1, 8), st.integers(1, 5), st.integers(0, 1000), st.randoms(use_true_random=False))
def test_basis_has_its_signs_fixed(rows, columns, seed, random):
    """However its columns are turned and ordered, a matrix has one basis of its span."""
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    basis = left_basis(matrix)
    torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1], dtype=torch.float64))
    torch.testing.assert_close(basis @ (basis.T @ matrix), matrix)
    assert (basis.gather(0, basis.abs().argmax(dim=0)[None]) > 0).all()
    order = random.sample(range(columns), columns)
    signs = torch.tensor([random.choice([1.0, -1.0]) for _ in order], dtype=torch.float64)
    torch.testing.assert_close(left_basis(matrix[:, order] * signs), basis, rtol=1e-6, atol=1e-6)


def test_directions_that_are_rounding_are_not_made_large():
    """The same expert, times a number that float32 rounds: one subspace, not two."""
    one = lora(20, 30, 3)
    again = replace(one, a=(0.3 * one.a).float())
    for method in (IsoC(), Tsvm(), Knots()):
        merged = method.merge_factors([one, again], [1, 1])
        # Two experts in three directions have one each in TSV-M.
        assert torch.linalg.matrix_rank(merged.delta(), rtol=1e-4) == (1 if isinstance(method, Tsvm) else 3)
        assert merged.delta().norm() < 2 * one.delta().norm()


def test_experts_with_one_frozen_a_keep_its_rank():
    shared = lora(20, 30, 4)
    factors = [replace(lora(20, 30, 4, seed), a=shared.a) for seed in (1, 2, 3)]
    for method in (IsoC(), Tsvm(), CoreSpace()):
        assert 0 < torch.linalg.matrix_rank(method.merge_factors(factors, [1, 1, 1]).delta(), rtol=1e-4) <= 4


def test_orthogonal_experts_do_not_interfere():
    """Their merge is their sum."""
    u = torch.linalg.qr(torch.randn(12, 6, generator=torch.Generator().manual_seed(0)))[0]
    v = torch.linalg.qr(torch.randn(15, 6, generator=torch.Generator().manual_seed(1)))[0]
    sizes = torch.tensor([3.0, 2.0, 1.0])
    factors = [LoraFactors(v[:, :3].T, u[:, :3] * sizes, 1.0), LoraFactors(v[:, 3:].T, u[:, 3:] * (sizes + 0.7), 2.0)]
    close(tsv_m(factors), sum(dense(factors)), 1e-5)
    # Without a part in a direction an expert has no count in the mean there.
    close(knots(factors, None, 1.0, 1.0), sum(dense(factors)), 1e-5)


@pytest.mark.parametrize("method", METHODS, ids=named)
def test_an_absent_expert_is_a_task_vector_of_zeros(method):
    some = [lora(6, 8, 2, 1), lora(6, 8, 3, 2)]
    absent = LoraFactors(torch.zeros(0, 8), torch.zeros(6, 0), 1.0)
    zeros = LoraFactors(torch.zeros(2, 8), torch.zeros(6, 2), 1.0)
    merged = method.merge_factors([some[0], absent, some[1]], (1, 2, 3))
    close(merged, method.merge_factors([some[0], zeros, some[1]], (1, 2, 3)).delta(), 1e-5)
    for nothing in ([absent, absent], [zeros, zeros], [zeros, absent]):
        assert method.merge_factors(nothing, (1, 1)).delta().tolist() == torch.zeros(6, 8).tolist()


@pytest.mark.parametrize("method", METHODS, ids=named)
def test_layouts_may_differ(method):
    """GPT-2 keeps [in, out]; (B A) transposed is A' B'."""
    one, other = lora(6, 8, 2, 1), lora(6, 8, 3, 2)
    turned = LoraFactors(other.b.T, other.a.T, other.scale, transposed=True)
    assert torch.equal(turned.delta(), other.delta())
    tolerance = 1e-5
    close(method.merge_factors([one, turned], (1, 2)), method.merge_factors([one, other], (1, 2)).delta(), tolerance)


@pytest.mark.parametrize(
    ("method", "name", "settings"),
    [
        (Star(30.0, 0.5), "STAR", {"eta": 30.0, "scale": 0.5}),
        (IsoC(0.5), "IsoC", {"scale": 0.5}),
        (Tsvm(0.5), "TSVM", {"scale": 0.5}),
        (Knots(0.2, 0.7), "KnOTS", {"density": 0.2, "scale": 0.7}),
        (CoreSpace(Pcb(0.2)), "CoreSpace", {"inner": Pcb(0.2).config}),
    ],
    ids=named,
)
def test_settings_have_a_registered_config(method, name, settings):
    from spacy_sam.registered import resolve_method

    assert isinstance(method, FactorMethod)
    assert not isinstance(method, MergeMethod)
    assert method.config == {"@misc": f"spacy_sam.{name}.v1", **settings}
    assert resolve_method(json.loads(json.dumps(method.config))) == method
    assert resolve_method({"@misc": f"spacy_sam.{name}.v1"}) == type(method)()


@pytest.mark.parametrize(
    "method", [Ties(), Dare(), DareTies(), Della(), Breadcrumbs(), Pcb(), Mean(), TaskArithmetic()]
)
def test_dense_methods_are_no_factor_methods(method):
    assert not isinstance(method, FactorMethod)


@pytest.mark.parametrize(
    ("call", "wanted"),
    [
        *[(lambda bad=bad: Star(bad), "eta") for bad in (0, -1, 100.1, math.nan, "40")],
        *[(lambda bad=bad: star(WORKED[:1], None, bad), "eta") for bad in (0, 101)],
        *[(lambda bad=bad: Knots(bad), "density") for bad in (0, 1.1, math.nan)],
        (lambda: knots(WORKED[:1], None, 0.0), "density"),
        *[(lambda kind=kind: kind(scale=0), "scale") for kind in (Star, IsoC, Tsvm, Knots)],
        *[(lambda call=call: call(WORKED[:1], scale=math.inf), "scale") for call in (star, iso_c, tsv_m, knots)],
        *[(lambda bad=bad: CoreSpace(bad), "inner") for bad in (Star(), "TIES", None)],
    ],
)
def test_bad_settings(call, wanted):
    with pytest.raises(SamError, match=f"] {wanted} must") as caught:
        call()
    assert caught.value.code == "S401"


@pytest.mark.parametrize("method", METHODS, ids=named)
def test_bad_input(method):
    for weights in [(1, 0), (1, -1), (1, math.nan), (1,), ()]:
        with pytest.raises(SamError, match=r"S401.*weights"):
            method.merge_factors(WORKED, weights)
    broken = LoraFactors(torch.ones(3, 3), torch.ones(4, 2), 1.0)
    for factors in ([], [broken], [WORKED[0], broken], [WORKED[0], lora(4, 5, 2)]):
        with pytest.raises(SamError, match=r"S401.*factors"):
            method.merge_factors(factors, [1] * len(factors))
    for bad in (math.nan, math.inf):
        for changed in ({"a": bad * torch.ones(2, 3)}, {"b": bad * torch.ones(4, 2)}, {"scale": bad}):
            with pytest.raises(SamError, match="number 2 ") as caught:
                method.merge_factors([WORKED[0], replace(WORKED[1], **changed)], [1, 1])
            assert caught.value.code == "S407"


# Task models


def adapters() -> Tuple[dict, TaskModelSpec]:
    """Three experts that share one matrix, with one each of their own or none."""
    one = Adapter({"both": lora(6, 8, 2, 1), "only": lora(5, 4, 2, 2)})
    two = Adapter({"both": lora(6, 8, 3, 3, 0.5)})
    three = Adapter({"other": lora(3, 3, 2, 4), "both": lora(6, 8, 1, 5)})
    return {"a": one, "b": two, "c": three}, TaskModelSpec(("a", "b", "c"), (1, 2, 3))


@pytest.mark.parametrize("method", [*METHODS, Mean(0.7), TaskArithmetic()], ids=named)
def test_factors_of_a_task_model_are_those_of_its_deltas(method):
    given_adapters, spec = adapters()
    factors = dict(merged_factors(given_adapters, spec, method))
    deltas = dict(merged_deltas(given_adapters, spec, method))
    assert list(factors) == list(deltas) == ["both", "only", "other"]
    for matrix, delta in deltas.items():
        close(factors[matrix], delta, 1e-6)
        ranks = [
            adapter.matrices[matrix].a.shape[0] for adapter in given_adapters.values() if matrix in adapter.matrices
        ]
        assert factors[matrix].a.shape[0] <= sum(ranks)
        assert delta.abs().max() > 0


def test_a_matrix_of_one_expert_is_merged_with_zeros():
    given_adapters, spec = adapters()
    only = given_adapters["a"].matrices["only"].delta()
    merged = {type(method): dict(merged_deltas(given_adapters, spec, method))["only"] for method in METHODS}
    torch.testing.assert_close(merged[Tsvm], 3 * only / 6)  # as in a weighted sum
    flat = torch.linalg.svdvals(3 * only / 6).sum() / 2
    torch.testing.assert_close(torch.linalg.svdvals(merged[IsoC])[:2], flat.expand(2))
    close(next(f for n, f in merged_factors(given_adapters, spec, Knots()) if n == "only"), 0.5 * only, 1e-5)


def test_experts_that_share_no_matrix():
    apart = {"a": Adapter({"x": lora(4, 5, 2, 1)}), "b": Adapter({"y": lora(3, 4, 1, 2)})}
    spec = TaskModelSpec(("a", "b"))
    for method in [*METHODS, Mean()]:
        assert [matrix for matrix, _ in merged_factors(apart, spec, method)] == ["x", "y"]
    close(dict(merged_factors(apart, spec, Knots(1.0, 1.0)))["y"], apart["b"].matrices["y"].delta(), 1e-5)


def test_one_expert_or_none():
    given_adapters, _ = adapters()
    for method in (Ties(), Star(), Mean()):
        assert (
            dict(merged_factors(given_adapters, TaskModelSpec(("a",), (7.0,)), method)) == given_adapters["a"].matrices
        )
        assert list(merged_factors(given_adapters, TaskModelSpec(), method)) == []


@pytest.mark.parametrize("method", [Ties(), Dare(), DareTies(), Pcb()], ids=str)
def test_dense_methods_have_no_factors(method):
    given_adapters, spec = adapters()
    with pytest.raises(SamError, match=f"{type(method).__name__}.*KnOTS") as caught:
        merged_factors(given_adapters, spec, method)  # at once, not at the first matrix
    assert caught.value.code == "S406"


def test_known_low_rank_methods_are_all_there_are():
    from spacy_sam.registered import resolve_method

    kinds = {type(resolve_method({"@misc": name})) for name in LOW_RANK}
    assert kinds == {Mean, TaskArithmetic, *map(type, METHODS)}


def test_unequal_shapes_name_the_matrix():
    unequal = {"a": Adapter({"x": lora(3, 4, 1)}), "b": Adapter({"x": lora(4, 3, 1)})}
    for stream in (
        merged_factors(unequal, TaskModelSpec(("a", "b")), IsoC()),
        merged_deltas(unequal, TaskModelSpec(("a", "b")), IsoC()),
    ):
        with pytest.raises(SamError, match="'x'") as caught:
            list(stream)
        assert caught.value.code == "S402"


@pytest.mark.parametrize("method", METHODS, ids=named)
def test_task_models_in_a_model(tiny_bank_path, method):
    """The switch adds what the factors multiply to."""
    bank = ExpertBank(tiny_bank_path)
    names = ("expert0", "expert1", "expert2")
    spec = TaskModelSpec(names, (1, 2, 3), method.config)
    loaded = {name: bank.load_adapter(name) for name in names}
    model, base = (
        load_model(bank.base[0], torch.float32),
        dict(load_model(bank.base[0], torch.float32).named_parameters()),
    )
    switch = WeightSwitch(model, bank.load_adapter, lambda config: method)
    switch.use(spec)
    factors = dict(merged_factors(loaded, spec, method))
    assert set(factors) == set(loaded["expert0"].matrices)
    for name, parameter in model.named_parameters():
        change = factors[name].delta() if name in factors else 0
        assert torch.equal(parameter, base[name] + change)
    switch.restore()
    assert all(torch.equal(parameter, base[name]) for name, parameter in model.named_parameters())


def test_nothing_of_the_size_of_the_weight_is_computed():
    """A matrix of 16 GB in float32, which would not be merged here if it were ever dense."""
    factors = [lora(65_536, 65_536, 2, seed) for seed in (1, 2)]
    index = randoms.Random(0).sample(range(65_536), 5)
    for method in METHODS:
        merged = method.merge_factors(factors, [1, 1])
        assert merged.shape == (65_536, 65_536)
        assert torch.isfinite(merged.b[index] @ merged.a[:, index]).all()


def test_core_space_refuses_trimming_over_the_whole_task_vector():
    with pytest.raises(SamError, match=r"S401.*inner"):
        CoreSpace(Ties(trim="global"))
