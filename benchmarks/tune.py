"""Settings of merge and selection, chosen without any target: each source domain in turn plays the target.

Example: python -m benchmarks.tune --data DATA
On its dev sets the domain's own expert is left out (a domain that nobody trained on), or is there (a known one). `targets/` and
`extra/` are not read.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, List, Optional

import numpy as np
import typer

from benchmarks import rows as r
from benchmarks.common import write_results
from benchmarks.predictions import Predictions, Target, read_target
from spacy_sam import evaluate as ev
from spacy_sam.bank import ExpertBank
from spacy_sam.plan import Expert
from spacy_sam.registered import make_mean, make_ties
from spacy_sam.select.base import SelectionContext
from spacy_sam.settings import DENSITY, LEAD, SCALE

MERGES = {
    **{f"TIES, density {d}, scale {s}": make_ties(d, s) for d in (0.2, 0.5, 1.0) for s in (0.7, 1.0, 1.4, 2.0)},
    **{f"mean, scale {s}": make_mean(s) for s in (0.7, 1.0, 1.4, 2.0)},
}

TEMPERATURES = (0.05, 0.1, 0.2, 0.5)  # of the softmax over similarities


class Without:
    """A bank as it would be without one of its experts."""

    def __init__(self, bank: ExpertBank, left_out: str) -> None:
        self._bank = bank
        self._left_out = left_out

    @property
    def experts(self) -> List[Expert]:
        return [card for card in self._bank.experts if card.name != self._left_out]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bank, name)


class NewDomain(r.Situation):
    """A situation in which the bank lacks an expert."""

    def __init__(self, predictions: Predictions, target: Target, seed: int, merge: Any, left_out: str) -> None:
        super().__init__(predictions, target, seed, merge)
        self.left_out = left_out
        self.experts = [name for name in self.experts if name != left_out]

    def context(self, size: int = r.LOOK_AHEAD) -> SelectionContext:
        context = super().context(size)
        return replace(context, bank=Without(context.bank, self.left_out))  # type: ignore[arg-type]


def scan(places: List[r.Situation], rows: Dict[str, Any]) -> Dict[str, Dict[str, float]]:
    """F1 of each row at each place, and the mean."""
    table: Dict[str, Dict[str, float]] = {}
    for name, choose in rows.items():
        table[name] = {at.target.name: at.f1(choose(at)) for at in places}
        table[name]["mean"] = float(np.mean(list(table[name].values())))
        print(name.ljust(40), *(f"{100 * f:6.1f}" for f in table[name].values()), flush=True)
    return table


def selection_rows() -> Dict[str, Any]:
    rows: Dict[str, Any] = {"first by similarity": r.sam(1, [0]), "first by mean rank": r.eco(1)}
    rows |= {f"{n} experts": r.eco(n) for n in (2, 3, 4, 5)}
    rows |= {f"weighted, temperature {t}": r.weighted(t) for t in TEMPERATURES}
    rows |= {f"weighted mean, temperature {t}": r.weighted(t, make_mean(1.0)) for t in TEMPERATURES}
    return {**rows, "SaM": r.sam(), "SaM, lead": r.sam(lead=LEAD), "adaptive": r.adaptive()}


def leads(places: List[r.Situation]) -> Dict[str, float]:
    """At each place, how far the first expert by similarity is ahead of the second: what `lead` is compared with."""
    scores = {at.target.name: at.selections()[0].scores for at in places}
    return {name: round(ranked[0][1] - ranked[1][1], 3) for name, ranked in scores.items()}


def main(
    data: Path = typer.Option(..., help="Folder with sources/DOMAIN/*.dev.jsonl."),
    bank: Optional[Path] = typer.Option(None, help="Bank folder; the bundled one by default."),
    limit: int = typer.Option(100, help="Sentences of each dev set; of longer ones a random sample."),
    dtype: str = typer.Option("bfloat16", help="Of the task models: float32 or bfloat16."),
    cache: Path = typer.Option(Path(".cache/paper"), help="Where answers are kept."),
) -> None:
    """Measure, and write `results/tune.json`."""
    engine = {"@misc": "spacy_sam.TorchEngine.v1", "dtype": dtype}
    nlp, component = ev.make_pipeline(bank, labels=["any"], engine=engine)
    predictions = Predictions(nlp, component, cache, say=lambda line: None)
    found = [(card.name, corpus.name) for card in predictions.bank.experts for corpus in card.corpora]
    paths = [(domain, path) for domain, name in found for path in data.glob(f"sources/{domain}/{name}.dev.jsonl")]
    targets = [(domain, read_target(path, limit)) for domain, path in paths]
    merge = make_ties(DENSITY, SCALE)
    new: List[r.Situation] = [NewDomain(predictions, t, 0, merge, domain) for domain, t in targets]
    known = [r.Situation(predictions, target, 0, merge) for _, target in targets]
    baselines = {card.name: r.one(card.name) for card in predictions.bank.baselines}
    ahead = {"new": leads(new), "known": leads(known)}
    print("Leads", ahead, flush=True)
    print("SaM-eco of three experts, the domain's own left out")
    merges = scan(new, {name: r.eco(merge=merge) for name, merge in MERGES.items()})
    print("Numbers of experts, the domain's own left out")
    counts = scan(new, selection_rows())
    print("The domain's own expert among them")
    own = scan(known, {**baselines, **selection_rows()})
    figures = {name: round(line["mean"], 4) for name, line in merges.items()}
    figures |= {"largest lead, new": max(ahead["new"].values()), "smallest lead, known": min(ahead["known"].values())}
    details = {"limit": limit, "dtype": dtype, "new": {**merges, **counts}, "known": own, "leads": ahead}
    print(write_results("tune", figures, **details))


if __name__ == "__main__":
    typer.run(main)
