"""`docs/results.md` and its plots, from a results file of `benchmarks.paper`.

Example: python -m benchmarks.results_page benchmarks/results/paper.json docs/results.md
"""

import json
from pathlib import Path
from typing import Any, Dict, List

import typer

from benchmarks.card import table

SHORT = {"crossner_": "", "mit_": "", "sec_loans_fin": "sec_loans"}
GOALS = {
    "in_domain_f1": 0.60,
    "sam/unified": 1.10,
    "sam/selector_best_single": 1.05,
    "eco/sam": 0.98,
    "adaptive/fixed": 1.02,
}


def write_page(results: Path, page: Path) -> None:
    """Write the page, and its plots into `img/` beside it.

    results (Path): A file that `benchmarks.paper` wrote.
    page (Path): The markdown file.
    """
    data = json.loads(results.read_text(encoding="utf8"))
    plots: List[str] = []
    if data["sweeps"]:
        images = page.parent / "img"
        images.mkdir(parents=True, exist_ok=True)
        plots = _plots(data, images)
    sections = [
        _head(data, results),
        _goals(data),
        _main(data),
        _by_group(data),
        _by_target(data),
        *plots,
        _methods(data),
        _sources(data),
    ]
    page.write_text("\n\n".join(section for section in sections if section) + "\n", encoding="utf8")


def _head(data: Dict[str, Any], results: Path) -> str:
    machine, settings = data["machine"], data["settings"]
    texts = ", ".join(f"{_short(name)} {count}" for name, count in data["n_texts"].items())
    return f"""# Results: selecting and merging against one unified model

Written by `{data["command"]}` on {machine["cores"]} cores of an {machine["cpu"]}
(commit {data["commit"]}); the figures are in `benchmarks/results/{results.name}`.

Strict spans: type and both boundaries must be right; micro F1 in percent. CrossNER's "miscellaneous" is left out. Sentences
of each target: {texts}. What is sampled (the texts that selectors see, the three experts at
random) is drawn with seeds {", ".join(map(str, settings["seeds"]))}; F1 is their mean. Intervals hold 95 % of
1,000 bootstrap draws of the sentences; unified is drawn with the same sentences. No row is chosen by the targets' labels,
save those marked as oracle."""


def _goals(data: Dict[str, Any]) -> str:
    rows = [["figure", "value", "goal"]]
    for name, value in data["figures"].items():
        rows.append([name, f"{value:.3f}", f">= {GOALS[name]:.2f}" if name in GOALS else ""])
    return "## In short\n\n" + table(rows)


def _main(data: Dict[str, Any]) -> str:
    rows = [["row", "F1", "95 % interval", "relative to unified", "95 % interval", "P", "R"]]
    for name, line in data["table"].items():
        low, high = line["interval"]
        relative, around = "", ""
        if "relative" in line:
            relative = f"{line['relative']:.2f}"
            around = "{:.2f} to {:.2f}".format(*line["relative_interval"])
        p, r = (f"{100 * line[key]:.1f}" for key in ("precision", "recall"))
        rows.append([name, f"{100 * line['mean']:.1f}", f"{100 * low:.1f} to {100 * high:.1f}", relative, around, p, r])
    return "## Mean over the targets\n\n" + table(rows)


def _by_group(data: Dict[str, Any]) -> str:
    names = list(data["groups"])
    rows = [["row", *(f"{name} ({len(data['groups'][name])})" for name in names), *(f"{n}, relative" for n in names)]]
    means = {
        row: [sum(line["f1"][target] for target in targets) / len(targets) for targets in data["groups"].values()]
        for row, line in data["table"].items()
    }
    unified = means.get("unified", [0.0] * len(names))
    for row, values in means.items():
        relative = (f"{value / one:.2f}" if one else "-" for value, one in zip(values, unified))
        rows.append([row, *(f"{100 * value:.1f}" for value in values), *relative])
    return (
        "## By group\n\nDensity and scale of TIES, the lead and the temperature of the weights were chosen on dev sets and on "
        "`extra/` (experiments.md, trials 13 and 30), by its labels: `targets/` is the fairer measure. Relative: to unified."
        "\n\n" + table(rows)
    )


def _by_target(data: Dict[str, Any]) -> str:
    names = list(data["n_texts"])
    rows = [["row", *map(_short, names)]]
    rows += [[row, *(f"{100 * line['f1'][name]:.1f}" for name in names)] for row, line in data["table"].items()]
    unified = data["table"].get("unified", {}).get("f1", {})
    text = "## By target\n\n" + table(rows)
    if unified:
        relative = [["relative to unified", *map(_short, names)]]
        for row in ("SaM", "SaM, lead", "SaM-eco", "adaptive", "weighted"):
            if row in data["table"]:
                line = data["table"][row]["f1"]
                relative.append([row, *(f"{line[n] / unified[n]:.2f}" if unified[n] else "-" for n in names)])
        text += "\n\n" + table(relative)
    chosen = [["target", "SaM's task models (first seed)"]]
    for name in names:
        models = data["table"]["SaM"]["task_models"][name]
        chosen.append([_short(name), "; ".join(" + ".join(experts) for experts in models)])
    return text + "\n\n" + table(chosen)


def _methods(data: Dict[str, Any]) -> str:
    if not data["methods"]:
        return ""
    rows = [["merge of SaM-eco's three", "norm", "F1", "unparseable lines"]]
    for line in data["methods"]:
        norm = f"{line['norm']:.2f}" if line["norm"] else "as it comes"
        rows.append([line["method"], norm, f"{100 * line['mean']:.1f}", f"{100 * line['unparseable']:.2f} %"])
    return (
        "## Merge methods at matched norm\n\nThe norm is that of the merged weight change over all matrices; 1 is the mean "
        "of the three experts' own. "
        f"{data['settings']['method_limit']} sentences of each target, first seed.\n\n" + table(rows)
    )


def _sources(data: Dict[str, Any]) -> str:
    if not data["sources"]:
        return ""
    names = list(next(iter(data["sources"].values())))
    rows = [["corpus", *names]]
    rows += [[corpus, *(f"{100 * line[name]:.1f}" for name in names)] for corpus, line in data["sources"].items()]
    return "## A source domain as the target\n\nTest texts of a corpus of each source domain.\n\n" + table(rows)


def _plots(data: Dict[str, Any], images: Path) -> List[str]:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "spacy-sam", "font.size": 10, "axes.spines.top": False})
    matplotlib.rcParams.update({"axes.spines.right": False, "savefig.bbox": "tight", "figure.figsize": (6.4, 3.6)})
    return [
        "## By number of experts and by sample size",
        _lines(data, "n_experts", "experts in a task model", images / "n_experts.svg", log=False),
        _lines(data, "sample_size", "texts that selection sees", images / "sample_size.svg", log=True),
    ]


def _lines(data: Dict[str, Any], kind: str, label: str, path: Path, *, log: bool) -> str:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots()
    for name, points in data["sweeps"].items():
        if name.startswith(f"{kind}/"):
            axes.plot(
                [int(n) for n in points], [100 * f for f in points.values()], marker="o", label=name.split("/")[1]
            )
    unified = data["table"].get("unified", {}).get("mean")
    if unified is not None:
        axes.axhline(100 * unified, color="grey", linestyle="--", label="unified")
    if log:
        axes.set_xscale("log")
        ticks = [int(n) for n in next(p for name, p in data["sweeps"].items() if name.startswith(kind))]
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
    axes.set(xlabel=label, ylabel="mean F1, %")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return f"![Mean F1 by {label}](img/{path.name})"


def _short(name: str) -> str:
    for long, short in SHORT.items():
        name = name.replace(long, short)
    return name


def main(results: Path, page: Path) -> None:
    """Write the page again from a results file."""
    write_page(results, page)


if __name__ == "__main__":
    typer.run(main)
