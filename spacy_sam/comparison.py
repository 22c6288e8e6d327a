"""Experts of a bank against each other, as plain data (for JSON) and as tables (for the terminal and HTML)."""

import math
from dataclasses import dataclass, replace
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np

from .bank import ExpertBank
from .errors import SamError
from .merge.insight import ALL, MAX_ENTRIES, MEASURES, Group, Similarity, compare
from .overview import Table
from .plan import Expert
from .select.similarity import cosine

Matrix = List[List[Optional[float]]]


@dataclass(frozen=True)
class Measure:
    """How a measure is called, what it says, and how it is coloured.

    centre: The value of experts that have nothing to do with each other.
    spread: The smallest distance from it that gets the full colour; larger ones in the data widen it.
    lowest: The lowest value that there can be.
    alike: Whether a value above the centre says that experts are alike, or that they are at odds.
    """

    title: str
    short: str
    note: str
    centre: float
    spread: float
    lowest: float = 0.0
    alike: bool = True


OVERLAP = (
    "Mean squared cosine of the principal angles, averaged over the matrices. Unrelated: {chance}, at these ranks."
)
MEASURE: Mapping[str, Measure] = {
    "cosine": Measure(
        "Cosine of the task vectors", "cosine", "1: the same direction. Unrelated: 0. -1: opposite.", 0, 0.1, lowest=-1
    ),
    "sign_conflict": Measure(
        "Sign conflict",
        "sign conflict",
        "Share of the entries whose signs differ, of those that both experts change. Unrelated: 0.5.",
        0.5,
        0.05,
        alike=False,
    ),
    "magnitude_conflict": Measure(
        "Sign conflict by magnitude",
        "by magnitude",
        "The same with every entry counted by its size in both experts, |x| + |y|. Unrelated: 0.5.",
        0.5,
        0.05,
        alike=False,
    ),
    "column_overlap": Measure("Column spaces: what experts write", "column overlap", OVERLAP, 0, 0.1),
    "row_overlap": Measure("Row spaces: what experts read", "row overlap", OVERLAP, 0, 0.1),
}
CENTROIDS = Measure(
    "Cosine of the centroids",
    "centroids",
    "Mean embeddings of the training texts: how alike the domains are, whatever the experts learned.",
    0,
    0.5,
    lowest=-1,
)


def similarity_data(
    bank: ExpertBank, names: Sequence[str], max_entries: Optional[int] = MAX_ENTRIES, seed: int = 0
) -> Dict[str, Any]:
    """Experts against each other, as JSON types: `None` where there is nothing to compare.

    bank (ExpertBank): The bank.
    names (Sequence[str]): The experts, in the order of rows and columns.
    max_entries (Optional[int]), seed (int): See `merge.insight.compare`.
    RETURNS (Dict[str, Any]): `experts`, `hashes`, `centroids`, what `signs` were looked at, and `groups`: each with the
        matrix of every measure, its mean over the pairs, and the overlaps that chance would make.
    RAISES: SamError S122 if there are fewer than two experts, S106, S107 or S402 if they cannot be compared.
    """
    if len(names) < 2:
        raise SamError("S122", found=", ".join(names) or "none")
    similarity = compare({name: bank.load_adapter(name) for name in names}, max_entries, seed)
    return {
        "experts": list(names),
        "hashes": {name: bank.adapter_hash(name) for name in names},
        "signs": _signs(similarity),
        "centroids": _centroids([bank[name] for name in names]),
        "groups": [_group(group) for group in similarity.groups],
    }


def similarity_tables(data: Mapping[str, Any]) -> List[Table]:
    """A table for each measure over all matrices, the centroids', and the means of all groups."""
    found = measures_of(data, data["groups"][0])
    return [*(matrix_table(measure.title, data["experts"], values) for measure, _, values in found), group_table(data)]


def expert_similarity_tables(data: Mapping[str, Any], name: str) -> List[Table]:
    """One expert against each of the others over all matrices, and its means over them for all groups."""
    names = data["experts"]
    row = names.index(name)
    others = [index for index in range(len(names)) if index != row]
    found = measures_of(data, data["groups"][0])
    columns = [format_values([values[row][other] for other in others]) for _, _, values in found]
    rows = [(names[other], *(column[index] for column in columns)) for index, other in enumerate(others)]
    header = ("expert", *(measure.short for measure, _, _ in found))
    table = Table(f"{name} against the others", rows, header, "l" + "r" * len(found))
    return [table, group_table(data, name)]


def matrix_table(title: str, names: Sequence[str], values: Matrix) -> Table:
    decimals = n_decimals([value for index, row in enumerate(values) for value in row[:index]])
    rows = [(name, *(format_value(value, decimals) for value in row)) for name, row in zip(names, values)]
    return Table(title, rows, ("", *names), "l" + "r" * len(names))


def group_table(data: Mapping[str, Any], name: Optional[str] = None) -> Table:
    """Means over the pairs by group, or over the pairs with one expert."""
    row = data["experts"].index(name) if name else None
    groups = data["groups"]
    columns = [format_values([mean_of_pairs(group[measure], row) for group in groups]) for measure in MEASURES]
    columns += [format_values([group["chance"][measure] for group in groups]) for measure in groups[0]["chance"]]
    rows = [
        (group["name"], str(group["n_matrices"]), *(column[index] for column in columns))
        for index, group in enumerate(groups)
    ]
    short = [MEASURE[measure].short for measure in MEASURES]
    header = ("part", "matrices", *short, *(f"{MEASURE[name].short.split()[0]} chance" for name in groups[0]["chance"]))
    title = f"Means of {name} over the others" if name else "Means over the pairs"
    return Table(f"{title}, by part of the model", rows, header, "l" + "r" * (len(header) - 1))


def format_values(values: Sequence[Optional[float]]) -> List[str]:
    """All with the same decimals."""
    decimals = n_decimals(values)
    return [format_value(value, decimals) for value in values]


def format_value(value: Optional[float], decimals: int) -> str:
    return "n/a" if value is None else f"{round(value, decimals) + 0.0:.{decimals}f}"  # no minus before 0


def n_decimals(values: Sequence[Optional[float]]) -> int:
    """Three where two would make all values look the same."""
    known = [value for value in values if value is not None]
    return 3 if known and max(known) - min(known) < 0.1 else 2


def sampling_note(data: Mapping[str, Any]) -> str:
    """What signs were looked at, as a sentence."""
    signs = data["signs"]
    if signs["share_of_entries"] == 1:
        return "Signs: of all entries."
    share = f"{100 * signs['share_of_entries']:.2g} percent of the entries"
    return f"Signs: estimated on random rows of large matrices ({share}, seed {signs['seed']})."


def _signs(similarity: Similarity) -> Dict[str, Any]:
    return {"share_of_entries": similarity.share_of_entries, "seed": similarity.seed}


def _group(group: Group) -> Dict[str, Any]:
    matrices = {measure: to_lists(getattr(group, measure)) for measure in MEASURES}
    chances = {"column_overlap": to_lists(group.column_chance), "row_overlap": to_lists(group.row_chance)}
    return {
        "name": group.name,
        "n_matrices": group.n_matrices,
        "shared": group.shared.tolist(),
        **matrices,
        "mean": {measure: mean_of_pairs(values) for measure, values in matrices.items()},
        "chance": {measure: mean_of_pairs(values) for measure, values in chances.items()},
    }


def mean_of_pairs(values: Matrix, row: Optional[int] = None) -> Optional[float]:
    """Mean over the pairs that can be compared, or over those of one row."""
    pairs = [(i, j) for i in range(len(values)) for j in range(i) if row is None or row in (i, j)]
    known = [value for value in (values[i][j] for i, j in pairs) if value is not None]
    return sum(known) / len(known) if known else None


def to_lists(matrix: Any) -> Matrix:
    """A tensor or array `[n, n]` as lists, with `None` for NaN."""
    return [[None if math.isnan(value) else value for value in row] for row in matrix.tolist()]


def _centroids(cards: Sequence[Expert]) -> Matrix:
    """Cosines; `None` where a centroid is missing, of another encoder or zero."""
    vectors = [np.asarray(card.centroid.vector) if card.centroid else np.zeros(0) for card in cards]
    encoders = [card.centroid.encoder if card.centroid else None for card in cards]
    return [
        [
            cosine(x, y) if first == second and len(x) == len(y) and x.any() and y.any() else None
            for y, second in zip(vectors, encoders)
        ]
        for x, first in zip(vectors, encoders)
    ]


def measures_of(data: Mapping[str, Any], group: Mapping[str, Any]) -> List[Tuple[Measure, str, Matrix]]:
    """The measures of a group, with their notes and centres filled in; the centroids after those of all matrices."""
    found = []
    for name in MEASURES:
        measure, chance = MEASURE[name], group["chance"].get(name)
        note = measure.note.format(chance="n/a" if chance is None else f"{chance:.3f}")
        found.append((replace(measure, centre=measure.centre if chance is None else chance), note, group[name]))
    return [*found, (CENTROIDS, CENTROIDS.note, data["centroids"])] if group["name"] == ALL else found
