"""Each expert's scores on the dev sets of its own domain, written into its card."""

from dataclasses import replace
from typing import Callable, Dict

from spacy.language import Language

from ..bank import ExpertBank
from ..component import SamNer
from ..corpora import Dataset, load_dataset
from ..evaluate import make_pipeline, plan_of, score
from ..plan import Score
from .config import TrainConfig, expand


def score_bank(bank: ExpertBank, config: TrainConfig, *, report: Callable[[str], None]) -> None:
    """Score every adapter that has dev sets and no scores yet: experts on their own, baselines on all.

    bank (ExpertBank): The bank; its cards are rewritten.
    config (TrainConfig): Names the dev sets; the first `dev_texts` of each are scored.
    report (Callable[[str], None]): Told of each score.
    """
    domains = {name: [load_dataset(path) for path in expand(section.dev)] for name, section in config.domains.items()}
    nlp, component = make_pipeline(bank.path, labels=["any"])
    for card in [*bank.experts, *bank.baselines]:
        datasets = domains.get(card.name, [d for found in domains.values() for d in found])
        if card.scores or not datasets:
            continue
        scores: Dict[str, Score] = {}
        for dataset in datasets:
            scores[dataset.name] = _score_one(nlp, component, bank, card.name, dataset, config.dev_texts)
            report(f"'{card.name}' on {dataset.name}: F1 {scores[dataset.name].f:.3f}")
        bank.update_card(replace(card, scores=scores))


def _score_one(nlp: Language, component: SamNer, bank: ExpertBank, name: str, dataset: Dataset, n_texts: int) -> Score:
    component.set_labels(dataset.labels)
    records = dataset.records[:n_texts]
    result = score(nlp, component, records, plan_of(bank, [name]))
    return Score(round(result.p, 4), round(result.r, 4), round(result.f, 4), result.n_docs)
