"""One static HTML page of a run: what was selected and why, entity counts, and the documents in displaCy."""

from collections import Counter
from html import escape
from typing import Any, Dict, List, Optional, Sequence

from spacy import displacy
from spacy.tokens import Doc

from .plan import Plan, Selection

COLOURS = ("#8ecae6", "#ffd166", "#95d5b2")  # first task model, second, found by both
ENTITY = '<mark class="entity" title="{title}" style="background: {bg}">{text}<span class="label">{label}</span></mark>'
STYLE = """
:root { color-scheme: light dark; --line: #8884; --bar: #457b9d; }
body { font: 16px/1.6 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: .5rem 0 1.5rem; } th, td { text-align: left; padding: .2rem .8rem .2rem 0; }
.bar { background: var(--bar); height: .7rem; border-radius: 2px; } .chosen td { font-weight: 600; }
.entities { border-top: 1px solid var(--line); padding: .8rem 0; line-height: 2.2; }
.entity { box-decoration-break: clone; -webkit-box-decoration-break: clone; }
.entity { color: #111; padding: .2rem .4rem; border-radius: .3rem; }
.key { padding: .1rem .6rem; border-radius: .3rem; color: #111; }
.label { font-size: .7em; font-weight: 600; margin-left: .4rem; text-transform: uppercase; }
"""


def render_docs(docs: Sequence[Doc], spans_key: str = "sc") -> str:
    """displaCy markup of the documents' entities, coloured by task model, with scores in the tooltips."""
    return "".join(_render_doc(doc, spans_key) for doc in docs)


def _render_doc(doc: Doc, spans_key: str) -> str:
    facts = _facts(doc, spans_key)
    entities = []
    for ent in doc.ents:
        score, sources = facts.get((ent.start, ent.end, ent.label), (None, []))
        found_by = " and ".join(f"task model {number + 1}" for number in sources) or "another component"
        title = found_by + (f", score {score:.2f}" if score is not None else "")
        colour = COLOURS[2] if len(sources) > 1 else COLOURS[min(sources[0], 1)] if sources else "#ddd"
        params = {"title": title, "bg": colour}
        entities.append({"start": ent.start_char, "end": ent.end_char, "label": escape(ent.label_), "params": params})
    manual = {"text": doc.text, "ents": entities, "title": None}
    return displacy.render(manual, style="ent", manual=True, jupyter=False, options={"template": ENTITY})


def _facts(doc: Doc, spans_key: str) -> Dict[Any, Any]:
    if spans_key not in doc.spans:
        return {}
    group = doc.spans[spans_key]
    scores, sources = group.attrs.get("scores", []), group.attrs.get("sources", [])
    return {(s.start, s.end, s.label): (score, source) for s, score, source in zip(group, scores, sources)}


def render_report(docs: Sequence[Doc], plan: Optional[Plan], spans_key: str = "sc", title: str = "sam_ner") -> str:
    """The whole page.

    docs (Sequence[Doc]): Annotated documents.
    plan (Optional[Plan]): The plan they were annotated by.
    spans_key (str): Where the component wrote its candidates.
    title (str): Heading.
    RETURNS (str): HTML with its style inside: no script, no network.
    """
    parts = [f"<h1>{escape(title)}</h1>"]
    if plan:
        parts += ["<h2>Selection</h2>", *map(_render_selection, plan.selections), _render_plan(plan)]
    counts = Counter(ent.label_ for doc in docs for ent in doc.ents)
    rows = "".join(f"<tr><td>{escape(label)}</td><td>{count}</td></tr>" for label, count in counts.most_common())
    parts += [
        f"<h2>{len(docs)} documents, {sum(counts.values())} entities</h2><table>{rows}</table>",
        _legend(plan),
        render_docs(docs, spans_key),
    ]
    head = (
        f"<meta charset='utf-8'><meta name='viewport' content='width=device-width'><title>{escape(title)}</title>"
        f"<style>{STYLE}</style>"
    )
    return f"<!doctype html>\n<html lang='en'><head>{head}</head><body>{''.join(parts)}</body></html>\n"


def _render_selection(selection: Selection) -> str:
    top = max((abs(value) for _, value in selection.scores), default=0.0) or 1.0
    rows = []
    for name, value in selection.scores:
        chosen = " class='chosen'" if name in selection.chosen else ""
        width = max(0.0, value / top) * 12
        bar = f"<div class='bar' style='width: {width:.2f}rem'></div>"
        rows.append(f"<tr{chosen}><td>{escape(name)}</td><td>{value:.3f}</td><td>{bar}</td></tr>")
    return f"<h3>{escape(selection.selector.replace('_', ' '))}</h3><table>{''.join(rows)}</table>"


def _render_plan(plan: Plan) -> str:
    items = "".join(f"<li>{escape(spec.name)}</li>" for spec in plan.task_models)
    return f"<h2>Task models</h2><ol>{items}</ol>"


def _legend(plan: Optional[Plan]) -> str:
    if plan is None or len(plan.task_models) < 2:
        return ""
    names: List[str] = ["first task model", "second task model", "both"]
    keys = (f"<span class='key' style='background: {c}'>{n}</span>" for c, n in zip(COLOURS, names))
    return f"<p>{' '.join(keys)}</p>"
