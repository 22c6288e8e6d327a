"""The main job on two small corpora of different domains, for a first look. The texts were written for this package."""

import time
from pathlib import Path
from typing import Dict, List, Optional, Tuple

from wasabi import msg

from .evaluate import make_pipeline
from .report import render_report

POLITICS = [
    "Maria Holm won the 2019 Lisberg mayoral election for the Green Alliance, ahead of Peter Lang of the Liberal Party.",
    "In Norway, the Centre Party lost eleven seats at the parliamentary election in September.",
    "President Anna Kovac met the prime minister of Slovenia in Ljubljana on Monday.",
    "The Social Democrats in Finland elected Juha Niemi as their new leader last Saturday.",
    "After the general election of 2005, the Labour Party formed a government with the Liberals.",
    "Senator Paul Greene of Ohio said he would not stand in the next presidential election.",
    "The European Union and Japan signed a trade agreement in Brussels.",
    "Councillor Ruth Adams left the Conservative Party and joined the Independents.",
    "Voters in Chile rejected the draft constitution, and President Luis Ortega spoke in Santiago.",
    "The National Front opposed the treaty, while the Christian Democrats voted for it.",
    "Elena Rossi was the first woman to lead the Republican Party of Italy.",
    "Turnout at the Irish local elections fell below fifty percent in Dublin and Cork.",
]
MEDICINE = [
    "Metformin lowers blood glucose in patients with type 2 diabetes.",
    "Mutations of the BRCA1 gene raise the risk of breast cancer and ovarian cancer.",
    "The patient was given ibuprofen for fever and developed acute renal failure.",
    "Expression of the p53 protein was reduced in lung tumour cells after cisplatin.",
    "Aspirin may cause gastric bleeding in people who take warfarin.",
    "Interleukin-6 levels were high in children with severe malaria.",
    "Hypertension and obesity were the most common conditions in the cohort.",
    "Tamoxifen binds to the oestrogen receptor and slows tumour growth.",
    "Two patients on lithium developed hypothyroidism within a year.",
    "The CFTR gene is mutated in cystic fibrosis.",
    "Penicillin was stopped because of a severe allergic reaction.",
    "Insulin resistance precedes type 2 diabetes by many years.",
]
CORPORA: Dict[str, Tuple[List[str], List[str]]] = {
    "Politics": (["person", "organization", "country", "city"], POLITICS),
    "Medicine": (["disease", "chemical", "gene"], MEDICINE),
}


def run_demo(out: Path, *, bank: Optional[Path] = None, device: Optional[str] = None) -> None:
    """Stream both corpora through `nlp.pipe`, print what is selected and found, and write a page beside `out` for each.

    out (Path): Page to write; the domain's name is put before its suffix.
    bank (Optional[Path]): Bank folder; None for the bundled one.
    device (Optional[str]): Where to run; None for the best there is.
    """
    for domain, (labels, texts) in CORPORA.items():
        msg.divider(f"{domain}: {', '.join(labels)}")
        engine = {"@misc": "spacy_sam.TorchEngine.v1", "device": device}
        nlp, component = make_pipeline(bank, labels, engine=engine)
        start = time.perf_counter()
        docs = list(nlp.pipe(texts))
        seconds = time.perf_counter() - start
        plan = component.plan
        assert plan is not None
        for selection in plan.selections:
            rows = [(name, f"{value:.3f}", "*" if name in selection.chosen else "") for name, value in selection.scores]
            msg.table(rows, header=(selection.selector, "score", ""), divider=True, aligns=("l", "r", "l"))
        for number, spec in enumerate(plan.task_models, 1):
            msg.text(f"Task model {number}: {spec.name}")
        print()
        for doc in docs:
            found = ", ".join(f"{ent.text} [{ent.label_}]" for ent in doc.ents)
            print(f"  {doc.text}\n    {found or '-'}")
        page = out.with_name(f"{out.stem}_{domain.lower()}{out.suffix}")
        page.write_text(render_report(docs, plan, title=f"sam_ner: {domain}"), encoding="utf8")
        msg.good(f"{len(docs)} documents in {seconds:.1f} s, with loading and selection. Page: {page}")
