"""What spaCy may do to a component, as cases that run in a process of their own: `python contract.py METHOD N_PROCESS BANK`.

Prints one line of JSON: for each case its result, or what went wrong. Each case has its own time limit.
"""

import itertools
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Dict, Iterator, List

import torch
from fakes import plan_of
from pipelines import TEXTS, ents, group, make_nlp
from spacy.tokens import Doc, Span

from spacy_sam.bank import ExpertBank
from spacy_sam.component import SamNer

LIMIT = 240  # seconds, for each case, on a busy machine
BATCH = 3


class Report:
    """An error handler that may be sent to other processes: writes what it got to a file, and may warn of it."""

    def __init__(self, path: Path, warn: bool = False) -> None:
        self.path = path
        self.warn = warn

    def __call__(self, name: Any, component: Any, docs: Any, error: Exception) -> None:
        with self.path.open("a", encoding="utf8") as file:
            file.write(json.dumps([name, [doc.text for doc in docs or ()], str(error)]) + "\n")
        if self.warn:
            warnings.warn(f"{name}: {error}", stacklevel=2)

    @property
    def got(self) -> List[Any]:
        lines = self.path.read_text(encoding="utf8").splitlines() if self.path.exists() else []
        return sorted((json.loads(line) for line in lines), key=lambda row: row[1])


class Contract:
    """The cases: each method without an underscore is one, and its result is JSON."""

    def __init__(self, n_process: int, bank: str) -> None:
        self.bank = ExpertBank(bank)
        self.settings: Dict[str, Any] = {"n_process": n_process, "batch_size": BATCH}
        self.folder = Path(tempfile.mkdtemp())

    def _make(self, **config: Any) -> Any:
        nlp, sam = make_nlp(self.bank, selection="manual", **config)
        sam.plan = plan_of(self.bank, "expert0")
        return nlp, sam

    def order_and_contexts(self) -> Any:
        """Blank texts too, and Docs among texts."""
        nlp, _ = self._make()
        texts = ["", *TEXTS, " ", "\n\t", *TEXTS, ""]
        stream: List[Any] = [(nlp.make_doc(text) if n % 2 else text, n) for n, text in enumerate(texts)]
        pairs = list(nlp.pipe(stream, as_tuples=True, **self.settings))
        same = [doc is given for (doc, _), (given, _) in zip(pairs, stream) if isinstance(given, Doc)]
        return {
            "texts": [doc.text for doc, _ in pairs] == texts,
            "contexts": [context for _, context in pairs] == list(range(len(texts))),
            "same": all(same),
            "ents": [ents(doc) for doc, _ in pairs],
            "wanted": [ents(nlp(text)) for text in texts],
        }

    def empty_stream(self) -> Any:
        return len(list(self._make()[0].pipe([], **self.settings)))

    def early_close(self) -> Any:
        """Of an endless stream, of which no more is pulled than is bounded."""
        nlp, _ = self._make(batch_size=BATCH)
        pulled: List[int] = []
        stream = nlp.pipe(_endless(pulled), **self.settings)
        found = [ents(next(stream)) for _ in range(7)]
        stream.close()
        n_pulled = len(pulled)
        return {"found": found, "pulled": n_pulled, "again": len(list(nlp.pipe(TEXTS)))}

    def interleaved_streams(self) -> Any:
        nlp, sam = self._make()
        plans = [plan_of(self.bank, f"expert{n}") for n in (1, 2)]
        streams = [nlp.pipe(TEXTS, component_cfg={sam.name: {"plan": plan}}, **self.settings) for plan in plans]
        rows = [[[doc[0].ent_type_ for doc in docs], [_plan(doc) for doc in docs]] for docs in zip(*streams)]
        prints = [plan.fingerprint for plan in plans]
        return {"rows": len(rows), "plans": all(row[1] == prints for row in rows), "kept": _kept(sam, self.bank)}

    def call_settings(self) -> Any:
        """Plan, labels and threshold of a call; the next call is without them."""
        nlp, sam = self._make()
        plan = plan_of(self.bank, "expert1")
        call = {sam.name: {"plan": plan, "labels": {"WHO": "someone"}, "threshold": 0.21}}
        text = "Anna Bella Zoe Zanzibar"
        docs = list(nlp.pipe([text], component_cfg=call, **self.settings))
        return {"call": _named(docs[0]), "after": _named(nlp(text)), "kept": _kept(sam, self.bank)}

    def failing_documents(self) -> Any:
        return self._fail(warn=False)

    def failing_documents_warn(self) -> Any:
        return self._fail(warn=True)

    def _fail(self, warn: bool) -> Any:
        nlp, _ = self._make()
        report = Report(self.folder / f"failed{warn}", warn)
        nlp.set_error_handler(report)
        texts = [f"{text} BOOM {n}" if n in (1, 6) else text for n, text in enumerate(TEXTS * 2)]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            pairs = list(nlp.pipe(zip(texts, itertools.count()), as_tuples=True, **self.settings))
        return {
            "contexts": [context for _, context in pairs],
            "whole": all(ents(doc) == group(doc) != [] and doc.text == texts[n] for doc, n in pairs),
            "got": report.got,
            "warned": len(caught),
        }

    def failing_document_raises(self) -> Any:
        nlp, _ = self._make()
        try:
            list(nlp.pipe([*TEXTS, "BOOM", *TEXTS], **self.settings))
        except Exception as error:
            message = str(error)
        return {"error": message, "next": len(list(nlp.pipe(TEXTS)))}

    def memory_zones(self) -> Any:
        """As services do: a zone for each request. Labels are readable in it; plan and weights outlive it."""
        nlp, sam = self._make(labels=["person", "place"])
        found = []
        for _ in range(3):
            with nlp.memory_zone():
                found.append([[ent.label_ for ent in doc.ents] for doc in nlp.pipe(TEXTS[:2], **self.settings)])
        return {"found": found, "kept": _kept(sam, self.bank), "engines": len(sam.parts.make_engine.made)}

    def existing_entities(self) -> Any:
        nlp, _ = self._make()
        docs = []
        for _ in range(4):
            doc = nlp.make_doc("Anna Bell met Carl")
            doc.set_ents([Span(doc, 0, 2, "OLD", kb_id="Q1")])
            doc.spans["mine"] = [Span(doc, 2, 3, "verb")]
            docs.append(doc)
        out = list(nlp.pipe(docs, **self.settings))
        return [[*_named(doc), doc.ents[0].kb_id_, [span.text for span in doc.spans["mine"]]] for doc in out]

    def without_a_plan(self) -> Any:
        """Workers must not select; one process does."""
        nlp, sam = make_nlp(self.bank, min_docs=2)
        try:
            docs = list(nlp.pipe(TEXTS, **self.settings))
        except Exception as error:
            return str(error)
        return {_plan(doc) for doc in docs} == {sam.plan.fingerprint if sam.plan else None}

    def cuda_model_of_the_parent(self) -> Any:
        """Simulated: the engine says that it is on a CUDA device."""
        nlp, sam = self._make()
        nlp(TEXTS[0])
        engine: Any = sam.parts.annotator.engine
        engine.device = SimpleNamespace(type="cuda", index=0)
        try:
            return [ents(doc) for doc in nlp.pipe(TEXTS, **self.settings)] == [ents(nlp(text)) for text in TEXTS]
        except Exception as error:
            return str(error)


def _endless(pulled: List[int]) -> Iterator[str]:
    for number in itertools.count():
        pulled.append(number)
        yield TEXTS[number % len(TEXTS)]


def _plan(doc: Doc) -> Any:
    return doc.spans["sc"].attrs["plan"]


def _named(doc: Doc) -> List[List[str]]:
    return [[ent.text, ent.label_] for ent in doc.ents]


def _kept(sam: SamNer, bank: ExpertBank) -> bool:
    return sam.plan == plan_of(bank, "expert0") and sam.labels == ("person", "place") and sam.cfg["threshold"] == 0


def run_case(case: Callable[[], Any]) -> Any:
    """The result of a case, or what it raised; a case that hangs raises TimeoutError."""
    signal.alarm(LIMIT)
    try:
        return case()
    except BaseException:
        return {"failed": traceback.format_exc()}
    finally:
        signal.alarm(0)
        for process in multiprocessing.active_children():
            process.join(5)
            if process.is_alive():
                process.kill()


def raise_timeout(*_: Any) -> None:
    raise TimeoutError(f"over {LIMIT} s")


def main(method: str, n_process: str, bank: str) -> None:
    multiprocessing.set_start_method(method)
    torch.set_num_threads(2)
    torch.rand(400, 400).matmul(torch.rand(400, 400))  # starts a thread pool, which a forked worker must not wait for
    signal.signal(signal.SIGALRM, raise_timeout)
    contract = Contract(int(n_process), bank)
    cases = [name for name in vars(Contract) if not name.startswith("_")]
    if method == "spawn":  # where starting workers takes long: those that pickling may break
        cases = [name for name in cases if name not in ("empty_stream", "failing_documents_warn", "memory_zones")]
    print(json.dumps({name: run_case(getattr(contract, name)) for name in cases}), flush=True)
    os._exit(0)  # do not wait for what a case may have left behind


if __name__ == "__main__":
    main(*sys.argv[1:])
