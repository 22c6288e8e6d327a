"""Experts against each other: equal to slow dense versions, symmetric, and blind to how dW is split into factors."""

import math
from typing import Dict, List

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spacy_sam.adapters import Adapter, LoraFactors
from spacy_sam.errors import SamError
from spacy_sam.merge import insight
from spacy_sam.merge.insight import ALL, ATTENTION, FEED_FORWARD, MEASURES, OTHER, Group, Place, compare, place, profile

Q, UP, HEAD = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight", "lm_head.weight"
SHAPES = {Q: (6, 5), UP: (9, 4), HEAD: (3, 7)}
SCALES = (0.5, 2.0, -1.0)


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def factors(matrix: str, rank: int, seed: int, scale: float = 2.0, transposed: bool = False) -> LoraFactors:
    n_out, n_in = SHAPES[matrix]
    return LoraFactors(random(rank, n_in, seed=seed), random(n_out, rank, seed=seed + 1), scale, transposed)


@st.composite
def experts(draw: st.DrawFn) -> Dict[str, Adapter]:
    """Two to four experts: some matrices each, ranks of their own, now and then a task vector of zeros."""
    found = {}
    for number in range(draw(st.integers(2, 4))):
        matrices = draw(st.lists(st.sampled_from(sorted(SHAPES)), unique=True))
        adapter = {}
        for matrix in matrices:
            rank, seed = draw(st.integers(1, 5)), draw(st.integers(0, 50))
            each = factors(matrix, rank, seed, draw(st.sampled_from(SCALES)))
            zero = draw(st.integers(0, 5)) == 0
            adapter[matrix] = LoraFactors(each.a, each.b * (0 if zero else 1), each.scale)
        found[f"expert{number}"] = Adapter(adapter)
    return found


def slow_overlap(x: torch.Tensor, y: torch.Tensor) -> float:
    """Mean squared cosine of the angles between column spaces, by projectors on the dense matrices' singular vectors."""
    spaces = []
    for dense in (x.double(), y.double()):
        u, s, _ = torch.linalg.svd(dense)
        spaces.append(u[:, : int((s > 1e-5 * s[0]).sum())] if s[0] > 0 else u[:, :0])
    if not spaces[0].shape[1] or not spaces[1].shape[1]:
        return float("nan")
    projectors = [space @ space.T for space in spaces]
    return float((projectors[0] @ projectors[1]).trace()) / min(space.shape[1] for space in spaces)


def slow_measures(first: Adapter, second: Adapter) -> Dict[str, float]:
    """By the letter of the definitions, on dense task vectors and flat lists."""
    shared = [matrix for matrix in first.matrices if matrix in second.matrices]
    nan = float("nan")
    if not shared:
        return dict.fromkeys(MEASURES, nan)
    xs = [first.matrices[matrix].delta() for matrix in shared]
    ys = [second.matrices[matrix].delta() for matrix in shared]
    x, y = (torch.cat([dense.flatten() for dense in side]).double() for side in (xs, ys))
    norms = float(x.norm() * y.norm())
    pairs = [(a, b) for a, b in zip(x.tolist(), y.tolist()) if a * b != 0]
    at_odds = [(a, b) for a, b in pairs if a * b < 0]
    size = sum(abs(a) + abs(b) for a, b in pairs)

    def mean(values: List[float]) -> float:
        known = [value for value in values if not math.isnan(value)]
        return sum(known) / len(known) if known else nan

    return {
        "cosine": float(x @ y) / norms if norms else nan,
        "sign_conflict": len(at_odds) / len(pairs) if pairs else nan,
        "magnitude_conflict": sum(abs(a) + abs(b) for a, b in at_odds) / size if pairs else nan,
        "column_overlap": mean([slow_overlap(a, b) for a, b in zip(xs, ys)]),
        "row_overlap": mean([slow_overlap(a.T, b.T) for a, b in zip(xs, ys)]),
    }


def everything(adapters: Dict[str, Adapter], **settings: object) -> Group:
    return compare(adapters, **settings).groups[0]  # type: ignore[arg-type]


def assert_same(first: Group, second: Group, atol: float = 1e-5) -> None:
    for measure in MEASURES:
        torch.testing.assert_close(
            getattr(first, measure), getattr(second, measure), rtol=0, atol=atol, equal_nan=True, msg=measure
        )


@given(experts())
def test_measures_equal_the_slow_dense_ones(adapters):
    if not any(adapter.matrices for adapter in adapters.values()):
        assert compare(adapters).groups == ()
        return
    group = everything(adapters)
    for i, first in enumerate(adapters.values()):
        for j, second in enumerate(adapters.values()):
            for measure, expected in slow_measures(first, second).items():
                found = float(getattr(group, measure)[i, j])
                assert found == pytest.approx(expected, abs=1e-5, nan_ok=True), (measure, i, j)
            assert group.shared[i, j] == len(first.matrices.keys() & second.matrices.keys())


@given(experts())
def test_measures_are_symmetric_and_bounded(adapters):
    for group in compare(adapters).groups:
        for measure in MEASURES:
            values = getattr(group, measure)
            assert torch.equal(values.nan_to_num(9), values.T.nan_to_num(9)), measure
            low = -1 if measure == "cosine" else 0
            assert all(low <= value <= 1 for value in values[~values.isnan()].tolist()), measure
        for measure, alike in zip(MEASURES, (1.0, 0.0, 0.0, 1.0, 1.0)):
            own = getattr(group, measure).diagonal()
            assert own[~own.isnan()].tolist() == pytest.approx([alike] * int((~own.isnan()).sum())), measure


@given(experts(), st.integers(0, 99))
def test_measures_do_not_depend_on_the_split_into_factors(adapters, seed):
    """(B Q^-1, Q A), with the scale moved into B and a direction added that dW does not have."""
    others = {}
    for name, adapter in adapters.items():
        split = {}
        for matrix, each in adapter.matrices.items():
            rank = each.a.shape[0]
            # Orthogonal times a power of two: entries of dW near 0 keep their signs but for rounding.
            q = torch.linalg.qr(random(rank, rank, seed=seed))[0] * 4
            a, b = q @ each.a, each.scale * each.b @ (q.T / 16)
            extra = random(1, a.shape[1], seed=seed)
            split[matrix] = LoraFactors(torch.cat([a, extra]), torch.cat([b, torch.zeros(len(b), 1)], dim=1), 1.0)
        others[name] = Adapter(split)
    for first, second in zip(compare(adapters).groups, compare(others).groups, strict=True):
        assert_same(first, second, atol=1e-4)


@given(experts(), st.sampled_from([4, 7, 30, 10**6]))
def test_measures_do_not_depend_on_tiles(adapters, tile):
    with pytest.MonkeyPatch.context() as patch:
        whole = compare(adapters)
        patch.setattr(insight, "TILE_ENTRIES", tile)
        tiled = compare(adapters)
    for first, second in zip(whole.groups, tiled.groups, strict=True):
        assert_same(first, second, atol=1e-12)


def test_order_of_the_experts_does_not_matter():
    adapters = {f"e{n}": Adapter({Q: factors(Q, 2, 10 * n), UP: factors(UP, n + 1, 5 * n)}) for n in range(3)}
    order = ["e2", "e0", "e1"]
    index = torch.tensor([2, 0, 1])
    turned = everything({name: adapters[name] for name in order})
    for measure in MEASURES:
        expected = getattr(everything(adapters), measure)[index[:, None], index]
        torch.testing.assert_close(getattr(turned, measure), expected)


def test_opposite_and_orthogonal_experts():
    one = factors(Q, 2, 0)
    opposite = LoraFactors(one.a, one.b, -3 * one.scale)
    group = everything({"one": Adapter({Q: one}), "opposite": Adapter({Q: opposite})})
    assert group.cosine[0, 1] == pytest.approx(-1)
    assert group.sign_conflict[0, 1] == group.magnitude_conflict[0, 1] == 1
    assert group.column_overlap[0, 1] == pytest.approx(1)
    eye = torch.eye(6)
    apart = [Adapter({Q: LoraFactors(torch.eye(5)[i : i + 1], eye[:, i : i + 1], 1.0)}) for i in range(2)]
    group = everything(dict(zip("ab", apart)))
    assert (group.cosine[0, 1], group.column_overlap[0, 1], group.row_overlap[0, 1]) == (0, 0, 0)
    assert group.sign_conflict[0, 1].isnan()  # no entry that both change


def test_magnitude_counts_entries_by_their_size():
    x = LoraFactors(torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0]]), 1.0)
    y = LoraFactors(torch.tensor([[7.0, -1.0]]), torch.tensor([[1.0]]), 1.0)
    group = everything({"x": Adapter({HEAD: x}), "y": Adapter({HEAD: y})})
    assert group.sign_conflict[0, 1] == 0.5
    assert group.magnitude_conflict[0, 1] == 0.2  # (1 + 1) of (1 + 7) + (1 + 1)


def test_experts_without_a_common_matrix_cannot_be_compared():
    similarity = compare({"a": Adapter({Q: factors(Q, 2, 0)}), "b": Adapter({UP: factors(UP, 2, 1)})})
    for group in similarity.groups:
        assert group.shared[0, 1] == 0
        for measure in MEASURES:
            assert getattr(group, measure)[0, 1].isnan()
    assert everything({"a": Adapter({Q: factors(Q, 2, 0)}), "b": Adapter({})}).cosine[1, 1].isnan()


def test_zero_task_vectors_cannot_be_compared():
    one = factors(Q, 2, 0)
    # B A is 0 though neither factor is: what is left of it in floating point is not a direction.
    hidden = LoraFactors(torch.ones(2, 5) / 3, torch.tensor([[1.0, -1.0]]).expand(6, 2) / 7, 2.0)
    for zero in (LoraFactors(one.a, 0 * one.b, 2.0), LoraFactors(0 * one.a, one.b, 2.0), hidden):
        group = everything({"one": Adapter({Q: one}), "zero": Adapter({Q: zero})})
        for measure in MEASURES:
            assert getattr(group, measure)[0, 1].isnan(), measure
            assert getattr(group, measure)[1, 1].isnan(), measure
            assert not getattr(group, measure)[0, 0].isnan()


def test_weights_kept_as_in_by_out_are_compared_as_they_act():
    plain = {n: Adapter({Q: factors(Q, 2, 10 * n)}) for n in range(2)}
    turned = {n: Adapter({Q: factors(Q, 2, 10 * n, transposed=True)}) for n in range(2)}
    assert_same(everything(plain), everything(turned))


def test_other_shapes_are_refused():
    other = LoraFactors(torch.ones(1, 4), torch.ones(6, 1), 1.0)
    with pytest.raises(SamError, match=r"^\[S402\]"):
        compare({"a": Adapter({Q: factors(Q, 1, 0)}), "b": Adapter({Q: other})})


def test_overlap_by_chance():
    """Random subspaces have the overlap that chance is said to make, on average."""
    found = []
    for seed in range(60):
        pair = {f"{n}": Adapter({UP: factors(UP, n, 100 * seed + 10 * n)}) for n in (1, 3)}
        group = everything(pair)
        found.append((float(group.column_overlap[0, 1]), float(group.row_overlap[0, 1])))
    assert (float(group.column_chance[0, 1]), float(group.row_chance[0, 1])) == pytest.approx((3 / 9, 3 / 4))
    columns, rows = (sum(values) / len(values) for values in zip(*found))
    assert columns == pytest.approx(3 / 9, abs=0.06)
    assert rows == pytest.approx(3 / 4, abs=0.06)


# Rows at random


def large(seed: int) -> Adapter:
    shared = random(400, 1, seed=0)
    b = torch.cat([shared, random(400, 2, seed=seed)], dim=1)
    return Adapter({HEAD: LoraFactors(torch.cat([torch.ones(1, 20), random(2, 20, seed=seed + 1)]), b, 1.0)})


def test_sampled_rows_estimate_the_signs_and_nothing_else():
    adapters = {"a": large(10), "b": large(20)}
    exact, sampled = compare(adapters, None), compare(adapters, 2000, seed=3)
    assert (exact.share_of_entries, sampled.share_of_entries, sampled.seed) == (1.0, 0.25, 3)
    for measure in ("cosine", "column_overlap", "row_overlap"):
        assert torch.equal(getattr(exact.groups[0], measure), getattr(sampled.groups[0], measure))
    for measure in ("sign_conflict", "magnitude_conflict"):
        pair = [getattr(each.groups[0], measure)[0, 1].item() for each in (exact, sampled)]
        assert pair[0] == pytest.approx(pair[1], abs=0.05)
        assert pair[0] != pair[1]


def test_sampled_rows_depend_on_the_seed_alone():
    adapters = {"a": large(10), "b": large(20)}
    torch.manual_seed(1)
    first = everything(adapters, max_entries=400, seed=5)
    torch.manual_seed(2)
    assert torch.equal(first.sign_conflict, everything(adapters, max_entries=400, seed=5).sign_conflict)
    assert not torch.equal(first.sign_conflict, everything(adapters, max_entries=400, seed=6).sign_conflict)


def test_sampled_matrices_count_by_their_size():
    """A matrix of which few rows are looked at counts as much as if all were."""
    plus = LoraFactors(torch.ones(1, 10), torch.ones(100, 1), 1.0)
    minus = LoraFactors(torch.ones(1, 10), -torch.ones(100, 1), 1.0)
    small = LoraFactors(torch.ones(1, 10), torch.ones(5, 1), 1.0)
    adapters = {"a": Adapter({HEAD: plus, Q: small}), "b": Adapter({HEAD: minus, Q: small})}
    assert everything(adapters, max_entries=50).sign_conflict[0, 1] == pytest.approx(1000 / 1050)
    assert compare(adapters, max_entries=1).groups[0].sign_conflict[0, 1] == pytest.approx(1000 / 1050)


# Groups


@pytest.mark.parametrize(
    ("matrix", "expected"),
    [
        ("model.layers.3.self_attn.q_proj.weight", Place(ATTENTION, "model", 3)),
        ("model.layers.31.mlp.down_proj.weight", Place(FEED_FORWARD, "model", 31)),
        ("model.layers.2.block_sparse_moe.experts.5.w1.weight", Place(FEED_FORWARD, "model", 2)),
        ("bert.encoder.layer.4.attention.output.dense.weight", Place(ATTENTION, "encoder", 4)),
        ("bert.encoder.layer.4.attention.self.key.weight", Place(ATTENTION, "encoder", 4)),
        ("bert.encoder.layer.4.intermediate.dense.weight", Place(FEED_FORWARD, "encoder", 4)),
        ("bert.encoder.layer.4.output.dense.weight", Place(FEED_FORWARD, "encoder", 4)),
        ("transformer.h.7.attn.c_attn.weight", Place(ATTENTION, "transformer", 7)),
        ("transformer.h.7.mlp.c_proj.weight", Place(FEED_FORWARD, "transformer", 7)),
        ("model.decoder.layers.1.fc2.weight", Place(FEED_FORWARD, "decoder", 1)),
        ("model.encoder.layers.1.self_attn.out_proj.weight", Place(ATTENTION, "encoder", 1)),
        ("decoder.block.5.layer.1.EncDecAttention.k.weight", Place(ATTENTION, "decoder", 5)),
        ("decoder.block.5.layer.2.DenseReluDense.wi.weight", Place(FEED_FORWARD, "decoder", 5)),
        ("model.embed_tokens.weight", Place(OTHER, "", None)),
        ("lm_head.weight", Place(OTHER, "", None)),
        ("classifier.weight", Place(OTHER, "", None)),
        ("bert.pooler.dense.weight", Place(OTHER, "", None)),
    ],
)
def test_place(matrix, expected):
    assert place(matrix) == expected


def test_groups_are_everything_kinds_and_layers():
    adapters = {f"{n}": Adapter({matrix: factors(matrix, 2, n) for matrix in SHAPES}) for n in range(2)}
    similarity = compare(adapters)
    found = {group.name: group.n_matrices for group in similarity.groups}
    assert found == {ALL: 3, ATTENTION: 1, FEED_FORWARD: 1, OTHER: 1, "layer 0": 1, "layer 1": 1}
    by_name = {group.name: group for group in similarity.groups}
    assert torch.equal(by_name[ATTENTION].cosine, by_name["layer 0"].cosine)
    alone = everything({name: Adapter({Q: adapter.matrices[Q]}) for name, adapter in adapters.items()})
    assert_same(by_name[ATTENTION], alone)


def test_layers_of_encoder_and_decoder_are_told_apart():
    matrices = [f"model.{stack}.layers.{n}.fc1.weight" for stack in ("encoder", "decoder") for n in (0, 10, 2)]
    one = factors(Q, 1, 0)
    names = [group.name for group in compare({"a": Adapter(dict.fromkeys(matrices, one))}).groups]
    assert names[2:] == [f"{stack} layer {n}" for stack in ("decoder", "encoder") for n in (0, 2, 10)]


# One expert


@given(experts())
def test_profile(adapters):
    for adapter in adapters.values():
        profiles = profile(adapter)
        assert sum(each.n_matrices for each in profiles) == len(adapter.matrices)
        norm = sum(float(each.delta().double().square().sum()) for each in adapter.matrices.values()) ** 0.5
        assert sum(each.norm**2 for each in profiles) ** 0.5 == pytest.approx(norm, abs=1e-5)


def test_profile_names_modules_and_ranks():
    adapter = Adapter({Q: factors(Q, 2, 0), UP: factors(UP, 1, 0), UP.replace("1", "0"): factors(UP, 3, 0)})
    attention, feed_forward = profile(adapter)
    assert (attention.kind, attention.modules, attention.ranks) == (ATTENTION, ("self_attn.q_proj",), (2, 2))
    assert attention.n_parameters == 2 * (6 + 5)
    assert (feed_forward.modules, feed_forward.n_matrices, feed_forward.ranks) == (("mlp.up_proj",), 2, (1, 3))
