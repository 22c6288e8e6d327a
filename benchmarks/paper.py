"""The paper's comparison (arXiv 2506.22813) on a bank: SaM against one unified model, single experts and other merges.

Example: python -m benchmarks.paper --data DATA
Nothing is chosen by the targets' labels, save in the two rows marked as oracle. Answers are kept in `.cache/paper`, so
that a run that was stopped goes on where it was.
"""

from itertools import combinations
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import numpy as np
import typer
from wasabi import msg

from benchmarks import rows as r
from benchmarks.common import write_results
from benchmarks.norms import matched_methods
from benchmarks.predictions import Predictions, Target, bootstrap, f1, read_target
from benchmarks.results_page import write_page
from spacy_sam import evaluate as ev
from spacy_sam.registered import make_mean, make_ties
from spacy_sam.settings import DENSITY, LEAD, SCALE

SEEDS = (0, 1, 2)
N_DRAWS = 1000
SAMPLE_SIZES = (1, 3, 10, 30, 100)
# A corpus that each expert was trained on, as a target: the paper's appendix finds that one expert is best there.
SOURCES = ("ncbi_disease", "inlegalner", "conll2003", "broad_twitter", "matscholar", "sgd_transport")


class Comparison:
    """Situations of every target and seed, and the rows measured on them."""

    def __init__(self, predictions: Predictions, targets: Sequence[Target], merge: Any) -> None:
        self.predictions = predictions
        self.targets = list(targets)
        self.situations = {t.name: [r.Situation(predictions, t, seed, merge) for seed in SEEDS] for t in targets}

    def run_subsets(self, most: int) -> None:
        """Run every set of up to `most` experts on all targets: set by set, so that each is merged once."""
        sets = [names for size in range(1, most + 1) for names in combinations(self.experts, size)]
        for names in sets:
            for places in self.situations.values():
                self.predictions.candidates(places[0].spec(names), places[0].target)

    @property
    def experts(self) -> List[str]:
        return [card.name for card in self.predictions.bank.experts]

    def tallies(self, row: r.Row) -> Dict[str, List[np.ndarray]]:
        """By target, the tallies of each seed."""
        return {name: [at.tally(row.choose(at)) for at in places] for name, places in self.situations.items()}

    def mean(self, choose: Any) -> float:
        """Mean F1 over targets and seeds."""
        return float(np.mean([at.f1(choose(at)) for places in self.situations.values() for at in places]))

    def models(self, row: r.Row) -> Dict[str, List[List[str]]]:
        """By target, the task models of the first seed."""
        return {n: [list(spec.experts) for spec in row.choose(p[0]).specs] for n, p in self.situations.items()}


def main_table(comparison: Comparison, rows: Sequence[r.Row]) -> Dict[str, Any]:
    """F1 per target and mean, with 95 % bootstrap intervals, also relative to unified (drawn with the same texts)."""
    table: Dict[str, Any] = {}
    draws: Dict[str, np.ndarray] = {}
    for row in rows:
        by_target = comparison.tallies(row)
        scores = {name: float(np.mean([f1(t.sum(0)) for t in tallies])) for name, tallies in by_target.items()}
        draws[row.name] = np.mean(
            [bootstrap(tallies, N_DRAWS, seed) for seed, tallies in enumerate(by_target.values())], axis=0
        )
        sums = np.mean([np.mean([t.sum(0) for t in tallies], axis=0) for tallies in by_target.values()], axis=0)
        table[row.name] = {
            "f1": scores,
            "mean": float(np.mean(list(scores.values()))),
            "interval": _interval(draws[row.name]),
            "oracle": row.oracle,
            "precision": float(sums[0] / max(sums[1], 1)),
            "recall": float(sums[0] / max(sums[2], 1)),
            "task_models": comparison.models(row),
        }
        print(f"{row.name}: {100 * table[row.name]['mean']:.2f}", flush=True)
    unified = draws.get("unified")
    for name, line in table.items():
        if unified is not None and table["unified"]["mean"]:
            line["relative"] = line["mean"] / table["unified"]["mean"]
            line["relative_interval"] = _interval(draws[name] / np.maximum(unified, 1e-9))
    return table


def _interval(draws: np.ndarray) -> List[float]:
    return [float(value) for value in np.percentile(draws, (2.5, 97.5))]


def sweeps(comparison: Comparison) -> Dict[str, Dict[str, float]]:
    """Mean F1 by number of experts and by sample size."""
    counts = range(1, len(comparison.experts) + 1)
    return {
        "n_experts/SaM": {str(n): comparison.mean(r.sam(n)) for n in counts},
        "n_experts/similarity": {str(n): comparison.mean(r.sam(n, [0])) for n in counts},
        "n_experts/sampling": {str(n): comparison.mean(r.sam(n, [1])) for n in counts},
        "n_experts/SaM-eco": {str(n): comparison.mean(r.eco(n)) for n in counts},
        "sample_size/SaM": {str(n): comparison.mean(r.sam(look_ahead=n, sample_size=n)) for n in SAMPLE_SIZES},
        "sample_size/similarity": {str(n): comparison.mean(r.sam(which=[0], look_ahead=n)) for n in SAMPLE_SIZES},
        "sample_size/sampling": {str(n): comparison.mean(r.sam(which=[1], sample_size=n)) for n in SAMPLE_SIZES},
    }


def merge_methods(predictions: Predictions, paths: Sequence[Path], limit: int, merge: Any) -> List[Dict[str, Any]]:
    """SaM-eco's choice of the first seed by other merges, each at the same norms: that of one expert (1) and shares of it."""
    places = [r.Situation(predictions, read_target(path, limit), SEEDS[0], merge) for path in paths]
    lines: List[Dict[str, Any]] = []
    for method in matched_methods(predictions.bank, places):
        scores, n_bad, n_all = [], 0, 0
        for at in places:
            spec = method.spec(at)
            scores.append(at.f1(r.Choice((spec,))))
            counts = predictions.counts(spec, at.target)
            n_bad += counts["malformed"] + counts["unfinished"]
            n_all += counts["mentions"] + counts["malformed"] + counts["unfinished"]
        line = {"method": method.name, "norm": method.norm, "mean": float(np.mean(scores))}
        lines.append({**line, "unparseable": n_bad / max(n_all, 1)})
        print(lines[-1], flush=True)
    return lines


def source_domains(predictions: Predictions, data: Path, limit: int, merge: Any) -> Dict[str, Dict[str, float]]:
    """A source domain as the target: test texts of known corpora."""
    found: Dict[str, Dict[str, float]] = {}
    for path in sorted(path for name in SOURCES for path in data.glob(f"sources/*/{name}.test.jsonl")):
        target = read_target(path, limit)
        at = r.Situation(predictions, target, 0, merge)
        choices = {
            "own expert": r.one(path.parent.name),
            "unified": r.one("unified"),
            "SaM, one expert": r.sam(1),
            "SaM": r.sam(3),
            "SaM, lead": r.sam(3, lead=LEAD),
            "weighted": r.weighted(merge=make_mean(1.0)),
        }
        found[target.name] = {name: at.f1(choose(at)) for name, choose in choices.items()}
        print(target.name, found[target.name], flush=True)
    return found


def figures(table: Dict[str, Any], predictions: Predictions) -> Dict[str, float]:
    """The ratios that are quoted. The selector's best single expert is the first by mean rank, as SaM-eco has it."""
    mean = {name: line["mean"] for name, line in table.items()}
    in_domain = [score.f for card in predictions.bank.experts for score in card.scores.values()]
    found = {
        "in_domain_f1": float(np.mean(in_domain)) if in_domain else float("nan"),
        "sam/unified": mean["SaM"] / mean["unified"],
        "sam/selector_best_single": mean["SaM"] / mean["first by mean rank"],
        "sam/all_six": mean["SaM"] / mean["all merged"],
        "eco/sam": mean["SaM-eco"] / mean["SaM"],
        "adaptive/fixed": mean["adaptive"] / mean["SaM"],
        "adaptive/unified": mean["adaptive"] / mean["unified"],
        "lead/sam": mean["SaM, lead"] / mean["SaM"],
        "weighted/sam": mean["weighted"] / mean["SaM"],
        "weighted/unified": mean["weighted"] / mean["unified"],
        "weighted/selector_best_single": mean["weighted"] / mean["first by mean rank"],
    }
    if "best of at most three (oracle)" in mean:
        found["sam/oracle_subset"] = mean["SaM"] / mean["best of at most three (oracle)"]
    return {name: round(value, 4) for name, value in found.items()}


def main(
    data: Path = typer.Option(..., help="Folder with NAME/*.test.jsonl and sources/."),
    groups: str = typer.Option("targets,extra", help="Comma-separated folders of `data`."),
    limit: int = typer.Option(450, help="Sentences of each target; of longer ones a random sample."),
    source_limit: int = typer.Option(200, help="Sentences of each source corpus as target; 0 leaves them out."),
    bank: Optional[Path] = typer.Option(None, help="Bank folder; the bundled one by default."),
    density: float = typer.Option(DENSITY, help="Of TIES."),
    scale: float = typer.Option(SCALE, help="Of TIES."),
    method_limit: int = typer.Option(
        100, help="Sentences of each target for the comparison of merge methods; 0: none."
    ),
    quick: bool = typer.Option(
        False, "--quick", help="Without the best set of three and the sweeps, which run many sets of experts."
    ),
    dtype: str = typer.Option("bfloat16", help="Of the task models: float32 or bfloat16."),
    cache: Path = typer.Option(Path(".cache/paper"), help="Where answers are kept."),
    name: str = typer.Option("paper", help="Name of the results file."),
    page: Optional[Path] = typer.Option(None, help="Write the page here, docs/results.md for the project's own."),
) -> None:
    """Measure, and write `results/NAME.json` and the page."""
    paths = sorted(path for group in groups.split(",") for path in (data / group).glob("*.test.jsonl"))
    engine = {"@misc": "spacy_sam.TorchEngine.v1", "dtype": dtype}
    nlp, component = ev.make_pipeline(bank, labels=["any"], engine=engine)
    predictions = Predictions(nlp, component, cache, say=lambda line: print(line, flush=True))
    merge = make_ties(density, scale)
    comparison = Comparison(predictions, [read_target(path, limit) for path in paths], merge)
    if not quick:
        comparison.run_subsets(3)
    table = main_table(comparison, r.main_rows(predictions, subsets=not quick))
    details: Dict[str, Any] = {
        "settings": {
            "density": density,
            "scale": scale,
            "dtype": dtype,
            "limit": limit,
            "method_limit": method_limit,
            "seeds": list(SEEDS),
            "groups": groups,
        },
        "groups": {
            g: [t.name for t in comparison.targets if (data / g / f"{t.name}.test.jsonl").is_file()]
            for g in groups.split(",")
        },
        "n_texts": {target.name: len(target.records) for target in comparison.targets},
        "table": table,
        "sweeps": {} if quick else sweeps(comparison),
        "methods": merge_methods(predictions, paths, min(limit, method_limit), merge) if method_limit else [],
        "sources": source_domains(predictions, data, source_limit, merge) if source_limit else {},
        "targets": {
            target.name: {row: line["f1"][target.name] for row, line in table.items()} for target in comparison.targets
        },
    }
    path = write_results(name, figures(table, predictions), **details)
    if page is not None:
        write_page(path, page)
    msg.good(f"Written: {path}" + (f", {page}" if page else ""))


if __name__ == "__main__":
    typer.run(main)
