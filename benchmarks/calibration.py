"""What a score means: definitions of an entity's score compared, and the map to probabilities fitted, on dev sets alone.

Example: python -m benchmarks.calibration --data DATA --limit 60
Each source domain in turn plays a new one (SaM's plan without the domain's own expert) and a known one (with it). Maps are
measured on domains that they were not fitted on. Corpora of `--check` are looked at after everything is chosen.
"""

import math
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import numpy as np
import typer
from wasabi import msg

from benchmarks import reliability as rel
from benchmarks import rows as r
from benchmarks.common import write_results
from benchmarks.evidence import CHOSEN, Evidence, gold_of
from benchmarks.predictions import Predictions, Target, read_target
from benchmarks.tune import NewDomain
from spacy_sam import evaluate as ev
from spacy_sam.calibration import Calibration, fit_calibration, is_single_expert, logistic, logit
from spacy_sam.registered import make_ties
from spacy_sam.select.base import Found, SelectionContext
from spacy_sam.settings import DENSITY, LEAD, SCALE

Array = Any  # a numpy array
COLUMNS = ("right", "n_found", "n_models", "single", "corpus", "domain")  # of a sample, in the order they are collected
THRESHOLDS = [round(0.05 * step, 2) for step in range(20)]
PICTURE = Path(__file__).parents[1] / "docs" / "img" / "calibration.png"


class Sampled(r.Situation):
    """A situation in which the experts annotate no more texts than selection asks for."""

    def context(self, size: int = r.LOOK_AHEAD) -> SelectionContext:
        records = {record.text: record for record in self.target.records}

        def annotate(spec: Any, texts: Sequence[str]) -> List[Found]:
            some = Target(self.target.name, tuple(records[text] for text in texts), self.target.labels)
            found = self.predictions.candidates(spec, some)
            return [frozenset((c.start, c.end, c.label) for c in row) for row in found]

        return replace(super().context(size), annotate=annotate)


class SampledNew(Sampled, NewDomain):
    """The same without one of the experts."""


@dataclass
class Sample:
    """Entities that plans found in some corpora: arrays [n].

    logs: By definition of a score, the natural logarithm of the highest one. right: Type and both boundaries are. n_found: Task
    models that found it. n_models: Those of the plan. single: The plan is one expert. corpus and domain: Where it was found.
    weights: Every corpus weighs as much as every other. n_gold: Entities that are there, by corpus.
    """

    logs: Dict[str, Array]
    right: Array
    n_found: Array
    n_models: Array
    single: Array
    corpus: Array
    domain: Array
    n_gold: Dict[str, int]

    @property
    def weights(self) -> Array:
        _, place, counts = np.unique(self.corpus, return_inverse=True, return_counts=True)
        return len(self.corpus) / (len(counts) * counts[place])

    @property
    def shares(self) -> Array:
        """What each adds to the mean recall over corpora if it is right."""
        return np.array([1 / (len(self.n_gold) * max(self.n_gold[corpus], 1)) for corpus in self.corpus])

    def scores(self, definition: str = CHOSEN) -> Array:
        return np.exp(self.logs[definition])

    def without(self, domain: str) -> "Sample":
        return self.where(self.domain != domain)

    def where(self, kept: Array) -> "Sample":
        logs = {name: values[kept] for name, values in self.logs.items()}
        arrays = {name: getattr(self, name)[kept] for name in COLUMNS}
        return Sample(logs=logs, n_gold=self.n_gold, **arrays)

    @classmethod
    def join(cls, *samples: "Sample") -> "Sample":
        """Of several kinds. Corpora of one name are apart only where their names are."""
        logs = {name: np.concatenate([s.logs[name] for s in samples]) for name in samples[0].logs}
        arrays = {name: np.concatenate([getattr(s, name) for s in samples]) for name in COLUMNS}
        return cls(logs=logs, n_gold={k: n for s in samples for k, n in s.n_gold.items()}, **arrays)


def collect(evidence: Evidence, places: Sequence[Tuple[str, r.Situation]], kind: str) -> Sample:
    """What SaM's plans find. places: Domain and situation of each corpus. kind: Put before the corpus's name."""
    lines: List[Tuple[Any, ...]] = []
    logs: Dict[str, List[float]] = defaultdict(list)
    n_gold: Dict[str, int] = {}
    for domain, at in places:
        specs = r.sam(lead=LEAD)(at).specs
        answers = [evidence(spec, at.target) for spec in specs]
        corpus = f"{kind}/{at.target.name}"
        n_gold[corpus] = sum(len(gold) for gold in gold_of(at.target))
        n_before = len(lines)
        for gold, *said in zip(gold_of(at.target), *answers):
            for entity in sorted({entity for one in said for entity in one}):
                found = [one[entity] for one in said if entity in one]
                for name in found[0]:
                    logs[name].append(max(log[name] for log in found))
                single = is_single_expert(specs)
                lines.append((entity in gold, len(found), len(specs), single, corpus, domain))
        n_right = sum(line[0] for line in lines[n_before:])
        print(f"{corpus}: {len(specs)} task models, {len(lines) - n_before} found, {n_right} right", flush=True)
    columns = {name: np.array(column) for name, column in zip(COLUMNS, zip(*lines))}
    return Sample(logs={name: np.array(values) for name, values in logs.items()}, n_gold=n_gold, **columns)


# Maps: from a sample to fit on and one to apply to, to probabilities of the latter

Map = Callable[[Sample, Sample, str], Array]


def raw(fit: Sample, to: Sample, definition: str) -> Array:
    return to.scores(definition)


def platt(single: bool = True, agreement: bool = False) -> Map:
    """Log-odds linear in those of the score, with offsets for plans of one expert and for how many task models agree."""

    def inputs(sample: Sample, definition: str) -> Array:
        columns = [np.array([logit(score) for score in sample.scores(definition)]), np.ones(len(sample.right))]
        agree = np.where(sample.n_models == 1, 0, np.where(sample.n_found == sample.n_models, 1, -1))
        return np.stack(columns + [sample.single] * single + [agree] * agreement, axis=1).astype(float)

    def apply(fit: Sample, to: Sample, definition: str) -> Array:
        found = logistic(inputs(fit, definition), fit.right.astype(float), fit.weights)
        return 1 / (1 + np.exp(-inputs(to, definition) @ found))

    return apply


def temperature(fit: Sample, to: Sample, definition: str) -> Array:
    """Log-odds times one number."""
    given, asked = (np.array([[logit(score)] for score in sample.scores(definition)]) for sample in (fit, to))
    return 1 / (1 + np.exp(-asked @ logistic(given, fit.right.astype(float), fit.weights)))


def any_monotone(fit: Sample, to: Sample, definition: str) -> Array:
    """Isotonic regression, one for plans of one expert and one for others."""
    chance = np.zeros(len(to.right))
    for single in (False, True):
        some, asked = fit.where(fit.single == single), to.single == single
        if len(some.right) and asked.any():
            scores = some.scores(definition)
            order = np.argsort(scores, kind="stable")
            fitted = rel.isotonic(scores, some.right, some.weights)
            chance[asked] = np.interp(to.scores(definition)[asked], scores[order], fitted[order])
    return chance


def apart(fit: Sample, to: Sample, definition: str) -> Array:
    """Platt scaling with a slope and an offset of their own for plans of one expert and for others."""
    chance = np.zeros(len(to.right))
    for single in (False, True):
        some, asked = fit.where(fit.single == single), to.single == single
        if len(some.right) and asked.any():
            chance[asked] = platt(single=False)(some, to.where(asked), definition)
    return chance


MAPS: Dict[str, Map] = {
    "raw": raw,
    "temperature": temperature,
    "Platt": platt(single=False),
    "Platt, single": platt(),
    "Platt, single, agreement": platt(agreement=True),
    "Platt, single apart": apart,
    "isotonic, single apart": any_monotone,
}
FITTED = "Platt, single"


def held_out(everything: Sample, to: Sample, make: Map, definition: str) -> Array:
    """Probabilities of entities by a map that was fitted on other domains."""
    chance = np.zeros(len(to.right))
    for domain in np.unique(to.domain):
        here = to.domain == domain
        chance[here] = make(everything.without(domain), to.where(here), definition)
    return chance


def errors(chance: Array, sample: Sample) -> Dict[str, float]:
    given = (chance, sample.right, sample.weights)
    return {"ece": round(rel.calibration_error(*given), 4), "brier": round(rel.brier(*given), 4)}


def ranking(sample: Sample, scores: Array) -> Dict[str, float]:
    """Means over corpora of what ranks entities within each."""
    parts = [sample.corpus == corpus for corpus in np.unique(sample.corpus)]
    measures = {"auroc": rel.auroc, "average_precision": rel.average_precision}
    return {
        name: round(float(np.nanmean([measure(scores[part], sample.right[part]) for part in parts])), 4)
        for name, measure in measures.items()
    }


def compare(everything: Sample, kinds: Dict[str, Sample]) -> Dict[str, Any]:
    """Every definition of a score, and every map of the chosen one, on domains that maps were not fitted on."""
    table: Dict[str, Any] = {"definitions": {}, "maps": {}}
    for kind, sample in kinds.items():
        table["definitions"][kind] = {
            name: {
                **ranking(sample, sample.scores(name)),
                **{f"{error}_raw": value for error, value in errors(sample.scores(name), sample).items()},
                **{
                    f"{error}_calibrated": value
                    for error, value in errors(held_out(everything, sample, MAPS[FITTED], name), sample).items()
                },
            }
            for name in sample.logs
        }
        table["maps"][kind] = {
            name: errors(held_out(everything, sample, make, CHOSEN), sample) for name, make in MAPS.items()
        }
    return table


def fit(sample: Sample) -> Calibration:
    found = fit_calibration(list(sample.scores()), list(sample.right), list(sample.single), list(sample.weights))
    return Calibration(**{name: round(value, 3) for name, value in asdict(found).items()})


def curves(sample: Sample, chance: Array) -> Dict[str, Any]:
    """For the picture: bins of raw scores and of probabilities, and precision and recall by threshold."""
    given = (sample.right, sample.weights)
    return {
        "raw": rel.bins(sample.scores(), *given),
        "calibrated": rel.bins(chance, *given),
        "thresholds": rel.precision_recall(chance, *given, sample.shares, THRESHOLDS),
    }


def draw(shown: Dict[str, Any], path: Path) -> None:
    """Write the picture: reliability of both kinds of domains, and precision and recall by threshold."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 4.4), constrained_layout=True)
    colours = {"raw": "#c44e52", "calibrated": "#2a6f97"}
    for axis, (kind, part) in zip(axes, shown.items()):
        axis.plot([0, 1], [0, 1], color="#999999", linewidth=1, linestyle=":")
        for name, colour in colours.items():
            points = np.array([[b.score, b.right] for b in part[name]])
            axis.plot(points[:, 0], points[:, 1], color=colour, marker="o", markersize=5, label=f"{name} score")
        axis.set(title=f"{kind.capitalize()} domains", xlabel="score", ylabel="share of entities that are right")
        axis.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
        axis.legend(loc="upper left", frameon=False)
    styles = {"new": "-", "known": "--"}
    names = {"precision": "#2a6f97", "recall": "#e09f3e"}
    for kind, part in shown.items():
        for name, colour in names.items():
            label = f"{name}, {kind} domains"
            axes[2].plot(THRESHOLDS, part["thresholds"][name], color=colour, linestyle=styles[kind], label=label)
    axes[2].set(title="Precision and recall by threshold", xlabel="threshold (calibrated)", xlim=(0, 1), ylim=(0, 1))
    axes[2].legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncol=2, frameon=False, fontsize=9)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def situations(predictions: Predictions, data: Path, limit: int, kind: str) -> List[Tuple[str, r.Situation]]:
    """The dev sets of the corpora that experts were trained on, with their own expert ("known") or without it ("new")."""
    merge = make_ties(DENSITY, SCALE)
    made: List[Tuple[str, r.Situation]] = []
    for card in predictions.bank.experts:
        for corpus in card.corpora:
            for path in data.glob(f"sources/{card.name}/{corpus.name}.dev.jsonl"):
                target = read_target(path, limit)
                new = SampledNew(predictions, target, 0, merge, card.name) if kind == "new" else None
                made.append((card.name, new or Sampled(predictions, target, 0, merge)))
    return made


def check(evidence: Evidence, data: Path, groups: Sequence[str], limit: int, by: Calibration) -> Dict[str, Any]:
    """Raw scores and probabilities on corpora that nothing was chosen on."""
    merge = make_ties(DENSITY, SCALE)
    checked: Dict[str, Any] = {}
    for group in groups:
        paths = sorted((data / group).glob("*.test.jsonl"))
        places = [(p.name, Sampled(evidence.predictions, read_target(p, limit), 0, merge)) for p in paths]
        sample = collect(evidence, places, group)
        chance = np.array([by(score, bool(single)) for score, single in zip(sample.scores(), sample.single)])
        corpora = {
            corpus: {
                "raw": errors(part.scores(), part),
                "calibrated": errors(chance[sample.corpus == corpus], part),
                "auroc": ranking(part, part.scores())["auroc"],
                "mean_calibrated": round(float(chance[sample.corpus == corpus].mean()), 4),
                "right": round(float(part.right.mean()), 4),
            }
            for corpus in np.unique(sample.corpus)
            for part in [sample.where(sample.corpus == corpus)]
        }
        totals = {"raw": errors(sample.scores(), sample), "calibrated": errors(chance, sample)}
        checked[group] = {**totals, "ranking": ranking(sample, sample.scores()), "corpora": corpora}
    return checked


def main(
    data: Path = typer.Option(..., help="Folder with sources/DOMAIN/*.dev.jsonl."),
    bank: Optional[Path] = typer.Option(None, help="Bank folder, of a tagger; the bundled one by default."),
    limit: int = typer.Option(60, help="Sentences of each corpus; of longer ones a random sample."),
    checks: str = typer.Option(
        "", "--check", help="Comma-separated folders of `data` to report on, such as extra,targets."
    ),
    write: bool = typer.Option(False, help="Keep the fitted calibration in the bank."),
    dtype: str = typer.Option("float32", help="Of the task models: float32 or bfloat16."),
    cache: Path = typer.Option(Path(".cache/calibration"), help="Where answers are kept."),
) -> None:
    """Measure, write `results/calibration.json` and `docs/img/calibration.png`."""
    nlp, component = ev.make_pipeline(
        bank, labels=["any"], engine={"@misc": "spacy_sam.TorchEngine.v1", "dtype": dtype}
    )
    predictions = Predictions(nlp, component, cache, say=lambda line: None)
    evidence = Evidence(predictions)
    kinds = {kind: collect(evidence, situations(predictions, data, limit, kind), kind) for kind in ("new", "known")}
    everything = Sample.join(*kinds.values())
    table = compare(everything, kinds)
    calibration = fit(everything)
    shown = {kind: curves(s, held_out(everything, s, MAPS[FITTED], CHOSEN)) for kind, s in kinds.items()}
    draw(shown, PICTURE)
    figures: Dict[str, float] = {}
    for kind, by_name in table["definitions"].items():
        rows = [(name, *(f"{value:.3f}" for value in line.values())) for name, line in by_name.items()]
        msg.table(rows, header=(kind, *next(iter(by_name.values()))), divider=True)
        rows = [(name, *(f"{value:.3f}" for value in line.values())) for name, line in table["maps"][kind].items()]
        msg.table(rows, header=(f"{kind}, {CHOSEN}", "ece", "brier"), divider=True)
        figures |= {f"{kind}/{name}/{key}": value for name, line in by_name.items() for key, value in line.items()}
    print(calibration)
    checked = check(evidence, data, checks.split(","), limit, calibration) if checks else {}
    for group, part in checked.items():
        figures |= {
            f"{group}/{which}/{k}": value for which in ("raw", "calibrated") for k, value in part[which].items()
        }
        print(group, part["raw"], part["calibrated"], part["ranking"])
    if write:
        predictions.bank.calibration = calibration
    figures = {name: value for name, value in figures.items() if math.isfinite(value)}
    shares = {
        kind: {
            f"found by {m} of {n}": [int(part.sum()), round(float(s.right[part].mean()), 4)]
            for n, m in sorted({*zip(s.n_models.tolist(), s.n_found.tolist())})
            for part in [(s.n_models == n) & (s.n_found == m)]
        }
        for kind, s in kinds.items()
    }
    details = {
        "limit": limit,
        "dtype": dtype,
        "chosen": CHOSEN,
        "calibration": asdict(calibration),
        "maps": table["maps"],
    }
    curves_ = {kind: {"thresholds": THRESHOLDS, **part["thresholds"]} for kind, part in shown.items()}
    print(write_results("calibration", figures, **details, found_by=shares, thresholds=curves_, checked=checked))


if __name__ == "__main__":
    typer.run(main)
