"""Definitions of a written answer's score compared, on a bank of a causal model or an encoder-decoder with inline answers.

Example: python -m benchmarks.written_scores --bank runs/causal/bank --corpus runs/causal/corpora/written.jsonl
"""

import math
import random
from pathlib import Path
from typing import Dict, List, Sequence

import numpy as np
import typer
from wasabi import msg

from benchmarks import reliability as rel
from benchmarks.common import write_results
from spacy_sam.bank import ExpertBank
from spacy_sam.corpora import Record, read_records
from spacy_sam.generate.engine import Completion, Request
from spacy_sam.generate.torch_engine import TorchEngine
from spacy_sam.plan import TaskModelSpec
from spacy_sam.prompts import Mention
from spacy_sam.registered import resolve_method

CHOSEN = "surface and marks, product"  # what `Completion.score` gives


def definitions(completion: Completion, mention: Mention, before: int) -> Dict[str, float]:
    """Every definition of an entity's score. before: Where the entity before it ends in the answer."""
    mark = completion.text.index("⟨", mention.start)
    scores: Dict[str, float] = {}
    for name, start in (("since the last mark", before), ("surface and marks", mention.start), ("marks", mark)):
        begins = (0, *completion.ends[:-1])
        logs = [
            log
            for log, begin, end in zip(completion.logprobs, begins, completion.ends)
            if begin < mention.end and end > start
        ]
        scores[f"{name}, mean"] = math.exp(sum(logs) / len(logs))
        scores[f"{name}, product"] = math.exp(sum(logs))
        scores[f"{name}, minimum"] = math.exp(min(logs))
    return scores


def main(
    bank: Path = typer.Option(..., help="Bank folder."),
    corpus: Path = typer.Option(..., help="Annotated texts, of which a random sample is taken."),
    limit: int = typer.Option(500, help="Texts."),
    entity_bias: float = typer.Option(
        0.5, help="Added to the logit of beginning an entity: a weak model then finds something."
    ),
) -> None:
    """Measure the base's answers, and write `results/written_scores.json`."""
    records: List[Record] = [record for record in read_records(corpus) if record.entities and record.labels]
    random.Random(0).shuffle(records)
    engine = TorchEngine(ExpertBank(bank), resolve_method, entity_bias=entity_bias)
    prompt_format = engine.encoder.format
    asked = [Request(TaskModelSpec(), tuple(record.labels or ()), record.text) for record in records[:limit]]
    scores: Dict[str, List[float]] = {}
    right: List[bool] = []
    for record, completion in zip(records, engine.generate(asked)):
        text = completion.text if completion.finished else prompt_format.whole_part(completion.text)
        before = 0
        for mention in prompt_format.parse(text, record.labels or ()).mentions:
            for name, score in definitions(completion, mention, before).items():
                scores.setdefault(name, []).append(score)
            begin = mention.at if mention.at is not None else -1
            right.append((begin, begin + len(mention.surface), mention.label) in record.entities)
            before = mention.end
    report(scores, np.array(right), limit)


def report(scores: Dict[str, List[float]], right: rel.Array, limit: int) -> None:
    even = np.ones(len(right))
    table: Dict[str, Sequence[float]] = {
        name: (
            rel.auroc(np.array(values), right),
            rel.average_precision(np.array(values), right),
            rel.calibration_error(np.array(values), right, even),
            rel.brier(np.array(values), right, even),
        )
        for name, values in scores.items()
    }
    names = ("auroc", "average_precision", "ece", "brier")
    msg.table([(name, *(f"{x:.3f}" for x in line)) for name, line in table.items()], header=("", *names), divider=True)
    figures = {f"{name}/{measure}": round(x, 4) for name, line in table.items() for measure, x in zip(names, line)}
    found = {"limit": limit, "found": len(right), "right": int(right.sum()), "chosen": CHOSEN}
    print(write_results("written_scores", figures, **found))


if __name__ == "__main__":
    typer.run(main)
