"""`bank show`: what it prints, its JSON, its page, and what it refuses."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Callable, List

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import spacy_sam.cli.show  # noqa: F401 (registers the command)
from spacy_sam.cli import app
from spacy_sam.comparison import MEASURE, Measure, format_values, mean_of_pairs, similarity_data
from spacy_sam.heatmap import Scale, render_bank_page, render_heatmap
from spacy_sam.merge.insight import MEASURES

Run = Callable[..., Any]
VOID = ("meta", "br")


@pytest.fixture
def run() -> Run:
    def run_command(*args: Any) -> Any:
        result = CliRunner().invoke(app, ["bank", "show", *map(str, args)], env={"COLUMNS": "200", "NO_COLOR": "1"})
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
        return result

    return run_command


class _Page(HTMLParser):
    """Checks that every tag is closed, and collects cells."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: List[str] = []
        self.tags: List[str] = []
        self.cells: List[str] = []
        self.attributes: List[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "td":
            self.cells.append(data)


def silence(bank: Any, name: str) -> None:
    """Make an expert's task vector zero."""
    path = bank.path / "experts" / name / "adapter_model.safetensors"
    save_file({key: 0 * tensor for key, tensor in load_file(path).items()}, path)


def test_show_bank(run, bank_copy, tmp_path):
    result = run("-b", bank_copy.path, "--json", tmp_path / "new" / "bank.json")
    assert result.exit_code == 0
    assert bank_copy.base_hash in result.output
    assert "base (a folder of the bank)" in result.output
    assert str(bank_copy.path) not in result.output
    assert re.search(r"expert1\s+domain1\s+2\s+10\s+50\.0\s+corpus1", result.output)
    data = json.loads((tmp_path / "new" / "bank.json").read_text(encoding="utf8"))
    assert [card["name"] for card in data["experts"]] == ["expert0", "expert1", "expert2"]
    assert data["experts"][1]["hash"] == bank_copy.adapter_hash("expert1")
    assert data["experts"][1]["mean_dev_f"] == 0.5
    assert "similarity" not in data


def test_show_bank_lists_many_types_in_short(run, bank_copy):
    labels = tuple(f"type{n:02}" for n in range(40))
    bank_copy.update_card(replace(bank_copy["expert0"], labels=labels))
    assert "and 25 more" in " ".join(run("-b", bank_copy.path).output.split())
    assert "type39" in run("expert0", "-b", bank_copy.path).output


def test_show_expert(run, bank_copy, tmp_path):
    bank_copy.update_card(replace(bank_copy["expert1"], training={"max_steps": 7}, centroid=None, scores={}))
    result = run("expert1", "-b", bank_copy.path, "--json", tmp_path / "e.json", "--html", tmp_path / "e.html")
    assert result.exit_code == 0
    for word in ("domain1", "person, place", "corpus1", "max_steps 7", "rank 4", bank_copy.adapter_hash("expert1")):
        assert word in result.output, word
    assert re.search(r"attention\s+8\s+4\s+\d+\s+[\d.]+\s+self_attn\.k_proj", result.output)
    data = json.loads((tmp_path / "e.json").read_text(encoding="utf8"))
    assert data["changes"][0]["n_matrices"] == 8
    assert data["training"] == {"max_steps": 7}
    page = (tmp_path / "e.html").read_text(encoding="utf8")
    assert _Page(page).cells[:2] == ["domain", "domain1"]
    assert page.count("Expert expert1") == 2  # title and heading


def test_show_similarity(run, bank_copy, tmp_path):
    args = ["-b", bank_copy.path, "--similarity", "--json", tmp_path / "s.json", "--html", tmp_path / "s.html"]
    result = run(*args)
    assert result.exit_code == 0
    data = json.loads((tmp_path / "s.json").read_text(encoding="utf8"))["similarity"]
    assert data["experts"] == ["expert0", "expert1", "expert2"]
    assert data["signs"] == {"share_of_entries": 1.0, "seed": 0}
    assert "Signs: of all entries." in result.output
    names = [group["name"] for group in data["groups"]]
    # peft's "all-linear" leaves the head alone.
    assert names == ["all", "attention", "feed-forward", "layer 0", "layer 1"]
    for measure in MEASURES:
        value = data["groups"][0][measure][1][0]
        assert value == data["groups"][0][measure][0][1]
        assert data["groups"][0]["mean"][measure] == pytest.approx(mean_of_pairs(data["groups"][0][measure]))
        _, (first, *_), (third, fourth, _) = data["groups"][0][measure]
        text = format_values([first, third, fourth])
        assert first == value
        assert re.search(rf"^expert1 +{text[0]} .*\nexpert2 +{text[1]} +{text[2]} ", result.output, re.MULTILINE), (
            measure
        )
    page = (tmp_path / "s.html").read_text(encoding="utf8")
    found = _Page(page)
    assert not {"script", "link", "img", "iframe"} & set(found.tags)
    assert not {"src", "href"} & set(found.attributes)
    assert page.count("<table class='heat'>") == len(names) * len(MEASURES) + 1


def test_show_similarity_of_one_expert(run, bank_copy):
    result = run("expert1", "-b", bank_copy.path, "-s")
    assert result.exit_code == 0
    assert "expert1 against the others" in result.output
    assert "Means of expert1 over the others" in result.output
    rows = re.findall(r"^(expert\d) +-?\d", result.output, re.MULTILINE)
    assert rows == ["expert0", "expert2"]


def test_show_similarity_leaves_baselines_out_unless_asked(run, bank_copy):
    bank_copy.update_card(replace(bank_copy["expert2"], role="baseline"))
    assert "expert2" not in run("-b", bank_copy.path, "-s").output
    assert "expert2" in run("-b", bank_copy.path, "-s", "--baselines").output
    assert "expert2 against the others" in run("expert2", "-b", bank_copy.path, "-s").output


def test_show_similarity_with_nothing_to_compare(run, bank_copy, tmp_path):
    silence(bank_copy, "expert1")
    bank_copy.update_card(replace(bank_copy["expert2"], centroid=None))
    result = run("-b", bank_copy.path, "-s", "--html", tmp_path / "s.html", "--json", tmp_path / "s.json")
    assert result.exit_code == 0
    assert "n/a" in result.output
    assert "nan" not in result.output
    data = json.loads((tmp_path / "s.json").read_text(encoding="utf8"))["similarity"]
    assert data["groups"][0]["cosine"][0][1] is None
    assert data["groups"][0]["cosine"][0][2] is not None
    assert data["centroids"][0][2] is None
    page = (tmp_path / "s.html").read_text(encoding="utf8")
    assert "n/a" in _Page(page).cells
    assert "nan" not in page


def test_show_similarity_says_when_rows_were_sampled(bank_copy):
    names = [card.name for card in bank_copy]
    data = similarity_data(bank_copy, names, max_entries=64, seed=4)
    assert 0 < data["signs"]["share_of_entries"] < 0.2
    page = render_bank_page("x", [], data)
    assert "random rows of large matrices" in page
    assert "seed 4" in page


def test_show_centroids_of_other_encoders_are_not_compared(bank_copy):
    card = bank_copy["expert0"]
    bank_copy.update_card(replace(card, centroid=replace(card.centroid, encoder="another")))
    centroids = similarity_data(bank_copy, ["expert0", "expert1", "expert2"])["centroids"]
    assert centroids[0][1] is None
    first, second = (torch.tensor(bank_copy[name].centroid.vector) for name in ("expert1", "expert2"))
    assert centroids[1][2] == pytest.approx(float(torch.cosine_similarity(first, second, dim=0)), abs=1e-5)


@pytest.mark.parametrize(("removed", "args"), [(2, ["-s"]), (2, ["expert0", "-s"]), (3, ["-s"])])
def test_show_similarity_needs_two_experts(run, bank_copy, removed, args):
    for number in range(removed):
        bank_copy.remove(f"expert{2 - number}")
    result = run(*args, "-b", bank_copy.path)
    assert result.exit_code == 1
    assert "[S122]" in result.output


def test_show_refuses_what_is_not_there_and_writes_nothing(run, bank_copy, tmp_path):
    args = ["--json", tmp_path / "a.json", "--html", tmp_path / "a.html"]
    result = run("nobody", "-b", bank_copy.path, *args)
    assert (result.exit_code, "[S108]" in result.output) == (1, True)
    (bank_copy.path / "experts" / "expert1" / "adapter_model.safetensors").write_bytes(b"damaged")
    result = run("-s", "-b", bank_copy.path, *args)
    assert (result.exit_code, "[S107]" in result.output) == (1, True)
    assert not list(tmp_path.glob("a.*"))


# Heat maps


def test_heatmap_prints_every_value_and_escapes_names():
    html = render_heatmap(["<a>", "b&c"], [[1.0, 0.256], [0.256, 1.0]], MEASURE["cosine"])
    assert _Page(html).cells == ["1.000", "0.256", "0.256", "1.000"]
    assert "<a>" not in html
    assert "&lt;a&gt; and b&amp;c: 0.2560" in html


def test_heatmap_colours_by_the_distance_from_unrelated():
    measure = Measure("x", "x", "", centre=0.5, spread=0.1, alike=False)
    scale = Scale.fit(measure, [[0.0, 0.52], [0.52, 0.0]])
    opacity = [float(scale.colour(value).rpartition(" ")[2].rstrip(")")) for value in (0.5, 0.52, 0.6, 0.4, 0.9)]
    assert opacity[0] == 0
    assert 0 < opacity[1] < opacity[2] == opacity[3] == opacity[4]
    assert scale.colour(0.6)[:9] != scale.colour(0.4)[:9]
    assert Scale.fit(measure, [[0.0, 0.9], [0.9, 0.0]]).spread == pytest.approx(0.4)  # the diagonal does not count


def test_heatmap_of_nothing_to_compare():
    cells = _Page(render_heatmap(["a", "b"], [[None, None], [None, None]], MEASURE["sign_conflict"])).cells
    assert cells == ["n/a"] * 4


def test_show_is_in_the_bundled_bank(run):
    """The numbers of docs/bank_insight.md come from here."""
    text = (Path(__file__).parent.parent / "docs" / "bank_insight.md").read_text(encoding="utf8")
    result = run("-s")
    (line,) = re.findall(r"^all +37 .*", result.output, re.MULTILINE)
    assert line.strip() in text
