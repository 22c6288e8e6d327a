"""The HTML page: what is on it, and that nothing in a document can break it."""

import re
from html.parser import HTMLParser

import pytest
from fakes import plan_of

from spacy_sam.plan import Plan, Selection, TaskModelSpec
from spacy_sam.report import render_docs, render_report


@pytest.fixture
def page_parts(make_case):
    parts = make_case()
    plan = plan_of(parts.bank, "expert0", "expert1")
    docs = list(parts.sam.pipe([parts.nlp.make_doc(t) for t in ("Anna <b>met</b> Bella & Co .", "")], plan=plan))
    return docs, plan


class _Marks(HTMLParser):
    """Collects what stands in the marks of a page, and their tooltips."""

    def __init__(self):
        super().__init__()
        self.found, self.titles, self.tags, self.inside = [], [], set(), False

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag == "mark":
            self.inside = True
            self.titles.append(dict(attrs)["title"])

    def handle_data(self, data):
        if self.inside:
            self.found.append(data)
            self.inside = False


def test_report_shows_every_entity_once(page_parts):
    docs, _ = page_parts
    marks = _Marks()
    marks.feed(render_docs(docs))
    assert marks.found == [ent.text for doc in docs for ent in doc.ents]
    assert len(marks.found) >= 2


def test_report_tooltips_name_task_models_and_scores(page_parts):
    docs, _ = page_parts
    marks = _Marks()
    marks.feed(render_docs(docs))
    assert all(re.fullmatch(r"task model \d( and task model \d)?, score \d\.\d\d", title) for title in marks.titles)
    assert any("and" in title for title in marks.titles)


def test_report_escapes_text(page_parts):
    docs, plan = page_parts
    page = render_report(docs, plan, title="<script>")
    marks = _Marks()
    marks.feed(page)
    assert "script" not in marks.tags
    assert "b" not in marks.tags
    assert "&lt;b&gt;met&lt;/b&gt;" in page


def test_report_entities_of_other_components(make_case):
    parts = make_case()
    doc = parts.nlp.make_doc("Anna came")
    doc.ents = [doc.char_span(0, 4, label="OTHER")]
    assert 'title="another component"' in render_docs([doc])


def test_report_selection_and_plan():
    selection = Selection("domain_similarity", (("news", 0.8), ("law", 0.4), ("sea", -0.2)), ("news", "law"))
    plan = Plan("base", (TaskModelSpec(("news", "law")), TaskModelSpec(("sea",))), selections=(selection,))
    page = render_report([], plan)
    assert page.index("news") < page.index("0.800") < page.index("law") < page.index("0.400") < page.index("-0.200")
    assert "<li>law + news</li><li>sea</li>" in page
    widths = [float(width) for width in re.findall(r"'width: ([\d.]+)rem'", page)]
    assert widths == [12, 6, 0]


def test_report_needs_no_network(page_parts):
    docs, plan = page_parts
    assert not re.search(r"https?:|<script|<link|@import|url\(", render_report(docs, plan))
