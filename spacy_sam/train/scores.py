"""What dev sets decide and tell: the bank's entity bias and calibration, and each expert's scores on its own dev sets."""

from dataclasses import replace
from typing import Callable, Dict, List, Tuple

from spacy.language import Language

from ..bank import ExpertBank
from ..component import SamNer
from ..corpora import Dataset, load_dataset
from ..evaluate import Result, make_pipeline, plan_of, score
from ..plan import Score
from .calibrate import calibrate
from .config import TrainConfig, expand

# Logits. Trained for likelihood, a model begins an entity that is more likely than not; for F1 the best threshold is half
# of the F1 that can be reached (Lipton et al. 2014, arXiv 1402.1892): between .5 and .18 here.
ENTITY_BIASES = (0.0, 0.5, 1.0, 1.5)


def score_bank(bank: ExpertBank, config: TrainConfig, *, report: Callable[[str], None]) -> None:
    """Choose the bank's entity bias by its experts, fit its calibration, and score every adapter that has none and dev sets.

    bank (ExpertBank): The bank; `bank.json` and its cards are rewritten. Experts are scored on their own dev sets, baselines
        on all.
    config (TrainConfig): Names the dev sets; the first `dev_texts` of each are used, for both.
    report (Callable[[str], None]): Told of each bias and score.
    """
    domains = {name: [load_dataset(path) for path in expand(section.dev)] for name, section in config.domains.items()}
    nlp, component = make_pipeline(bank.path, labels=["any"])
    scorer = _Scorer(bank, nlp, component, config.dev_texts)
    if any(domains.get(card.name) for card in bank.experts) and not any(card.scores for card in bank.experts):
        scorer.choose_bias(domains, report)
        calibrate(bank, domains, nlp, component, n_texts=config.dev_texts, report=report)
    for card in [*bank.experts, *bank.baselines]:
        datasets = domains.get(card.name, [d for found in domains.values() for d in found])
        if card.scores or not datasets:
            continue
        scores: Dict[str, Score] = {}
        for dataset in datasets:
            result = scorer(card.name, dataset)
            scores[dataset.name] = Score(round(result.p, 4), round(result.r, 4), round(result.f, 4), result.n_docs)
            report(f"'{card.name}' on {dataset.name}: F1 {result.f:.3f}")
        bank.update_card(replace(card, scores=scores))


class _Scorer:
    """Scores single adapters on dev sets."""

    def __init__(self, bank: ExpertBank, nlp: Language, component: SamNer, n_texts: int) -> None:
        self.bank = bank
        self.nlp = nlp
        self.component = component
        self.n_texts = n_texts
        self._bias = bank.entity_bias
        self._results: Dict[Tuple[str, str, float], Result] = {}

    def __call__(self, name: str, dataset: Dataset) -> Result:
        key = (name, dataset.name, self._bias)
        if key not in self._results:
            self.component.set_labels(dataset.labels)
            records = dataset.records[: self.n_texts]
            self._results[key] = score(self.nlp, self.component, records, plan_of(self.bank, [name]))
        return self._results[key]

    def choose_bias(self, domains: Dict[str, List[Dataset]], report: Callable[[str], None]) -> None:
        """The one of ENTITY_BIASES with the best mean F1 goes into the bank. Nothing where answers are free."""
        engine = self.component.parts.annotator.engine
        if not getattr(engine, "has_entity_bias", False):
            return
        pairs = [(card.name, dataset) for card in self.bank.experts for dataset in domains.get(card.name, [])]
        means: Dict[float, float] = {}
        for bias in ENTITY_BIASES:
            engine.entity_bias = self._bias = bias  # type: ignore[attr-defined]  # only one that has it comes here
            means[bias] = sum(self(name, dataset).f for name, dataset in pairs) / len(pairs)
            report(f"Entity bias {bias}: mean F1 {means[bias]:.3f}")
        best = max(means, key=lambda bias: means[bias])
        engine.entity_bias = self._bias = self.bank.entity_bias = best  # type: ignore[attr-defined]
