"""Heat maps and the HTML page of a bank: tables with coloured cells, without scripts or network, for light and dark."""

from dataclasses import dataclass
from html import escape
from typing import Any, Iterator, List, Mapping, Optional, Sequence

from .comparison import Matrix, Measure, format_value, group_table, measures_of, n_decimals, sampling_note
from .overview import Table
from .report import STYLE as REPORT_STYLE

# Colours of values above and below the centre, as red, green, blue. They lie over the page's own background.
ALIKE, AT_ODDS = "38, 118, 178", "222, 102, 40"
STRONGEST = 0.62  # opacity; the text stays readable on white and on black
STYLE = (
    REPORT_STYLE
    + """
body { max-width: 66rem; } h2 { margin-top: 2.5rem; } h3 { margin: 2rem 0 0; } td { vertical-align: top; }
.wide { overflow-x: auto; } .note { margin: .2rem 0; opacity: .8; font-size: .9rem; max-width: 46rem; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.wide :not(.heat) > tbody td:last-child:not(.number) { min-width: 13rem; overflow-wrap: anywhere; }
.wide th, .wide td { padding-right: .7rem; } .fact { white-space: nowrap; opacity: .7; }
thead th { border-bottom: 1px solid var(--line); vertical-align: bottom; font-size: .9rem; }
.heat { border-collapse: separate; border-spacing: 2px; margin: .8rem 0 .3rem; }
.heat th { font-weight: 500; font-size: .85rem; border: 0; padding: .1rem .5rem .1rem 0; white-space: nowrap; }
.heat thead th { vertical-align: bottom; padding: .3rem 0; }
.heat thead span { writing-mode: vertical-rl; transform: rotate(180deg); display: block; margin: 0 auto; line-height: 1.2; }
.heat td { min-width: 2.9rem; padding: .35rem .2rem; text-align: center; border-radius: 3px; font-size: .85rem; }
.heat td { font-variant-numeric: tabular-nums; } .heat .self { opacity: .45; } .heat .none { opacity: .6; }
.legend { display: flex; gap: .6rem; align-items: center; font-size: .8rem; margin-bottom: 1.2rem; }
.legend span { opacity: .8; } .ramp { width: 9rem; height: .8rem; border-radius: 3px; border: 1px solid var(--line); }
details { border-top: 1px solid var(--line); padding: .5rem 0; } summary { cursor: pointer; } details h3 { margin-top: 1rem; }
.maps { display: flex; flex-wrap: wrap; gap: 0 3rem; } .maps > div { flex: 0 0 auto; max-width: 100%; }
.maps .note { max-width: 27rem; min-height: 2.9rem; }
@media (max-width: 40rem) {
.heat td { min-width: 2.3rem; font-size: .72rem; } .heat th { font-size: .75rem; } body { margin: 1rem auto; }
}
"""
)


@dataclass(frozen=True)
class Scale:
    """Colours of values: none at `centre`, full at `centre` plus or minus `spread`. No value is below `lowest`."""

    centre: float
    spread: float
    lowest: float
    alike: bool

    @classmethod
    def fit(cls, measure: Measure, values: Matrix) -> "Scale":
        """The measure's own scale, widened if values off the diagonal lie outside it."""
        distances = [abs(v - measure.centre) for i, row in enumerate(values) for v in row[:i] if v is not None]
        return cls(measure.centre, max([measure.spread, *distances]), measure.lowest, measure.alike)

    def colour(self, value: float) -> str:
        distance = max(-1.0, min(1.0, (value - self.centre) / self.spread))
        rgb = ALIKE if (distance > 0) == self.alike else AT_ODDS
        return f"rgba({rgb}, {STRONGEST * abs(distance):.3f})"


def render_heatmap(names: Sequence[str], values: Matrix, measure: Measure, scale: Optional[Scale] = None) -> str:
    """A square table with coloured cells, and its legend.

    names (Sequence[str]): Of rows and columns.
    values (Matrix): `[n, n]`; `None` is shown as n/a.
    measure (Measure): Its title, and its colours if there is no `scale`.
    scale (Optional[Scale]): The colours, for maps that are to be compared.
    RETURNS (str): HTML.
    """
    scale = scale or Scale.fit(measure, values)
    decimals = n_decimals([value for index, row in enumerate(values) for value in row[:index]])
    head = "".join(f"<th scope='col'><span>{escape(name)}</span></th>" for name in names)
    body = ""
    for row, (name, line) in enumerate(zip(names, values)):
        cells = (
            _cell(value, decimals, scale, f"{name} and {names[column]}", column == row)
            for column, value in enumerate(line)
        )
        body += f"<tr><th scope='row'>{escape(name)}</th>{''.join(cells)}</tr>"
    table = f"<table class='heat'><thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f"<div class='wide'>{table}</div>{_legend(scale)}"


def _cell(value: Optional[float], decimals: int, scale: Scale, title: str, is_self: bool) -> str:
    if value is None:
        return f"<td class='none' title='{escape(title)}: nothing to compare'>n/a</td>"
    text = format_value(value, decimals)
    if is_self:
        return f"<td class='self'>{text}</td>"
    return f"<td style='background: {scale.colour(value)}' title='{escape(title)}: {value:.4f}'>{text}</td>"


def _legend(scale: Scale) -> str:
    """From the lowest value that a colour stands for to the highest."""
    low, high = max(scale.lowest, scale.centre - scale.spread), scale.centre + scale.spread
    points = sorted({low, scale.centre, high})
    stops = [f"{scale.colour(point)} {100 * (point - low) / (high - low):.1f}%" for point in points]
    ramp = f"<span class='ramp' style='background: linear-gradient(90deg, {', '.join(stops)})'></span>"
    return f"<div class='legend'><span>{low:.2f}</span>{ramp}<span>{high:.2f}</span></div>"


def render_table(table: Table, page: str = "") -> str:
    """A table under its title, which is left out if it is the page's."""
    heading = "" if table.title == page else f"<h2>{escape(table.title)}</h2>"
    if not table.header:
        fact = [("fact", *[""] * 9) if len(row) > 1 else ("",) for row in table.rows]
        body = "".join(_row(row, classes) for row, classes in zip(table.rows, fact))
        return f"{heading}<div class='wide'><table>{body}</table></div>"
    classes = ["number" if align == "r" else "" for align in table.aligns]
    head = "".join(f"<th class='{kind}'>{escape(name)}</th>" for name, kind in zip(table.header, classes))
    body = "".join(_row(row, classes) for row in table.rows)
    return f"{heading}<div class='wide'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _row(cells: Sequence[str], classes: Sequence[str]) -> str:
    return f"<tr>{''.join(f'<td class={kind!r}>{escape(cell)}</td>' for cell, kind in zip(cells, classes))}</tr>"


def render_similarity(data: Mapping[str, Any]) -> str:
    """The heat maps of all matrices, the means by part of the model, and each part's heat maps, folded.

    data (Mapping[str, Any]): See `comparison.similarity_data`.
    RETURNS (str): HTML.
    """
    groups = data["groups"]
    parts = [
        f"<h2>Similarity over all {groups[0]['n_matrices']} matrices</h2>",
        f"<p class='note'>Blue: experts are alike. Orange: they are at odds. No colour: unrelated. {sampling_note(data)}</p>",
        f"<div class='maps'>{''.join(_figures(data, groups[0]))}</div>",
        render_table(group_table(data)),
        "<h2>Parts of the model</h2>",
    ]
    for group in groups[1:]:
        maps = "".join(_figures(data, group))
        parts.append(f"<details><summary>{escape(group['name'])}</summary><div class='maps'>{maps}</div></details>")
    return "".join(parts)


def _figures(data: Mapping[str, Any], group: Mapping[str, Any]) -> Iterator[str]:
    for measure, note, values in measures_of(data, group):
        figure = render_heatmap(data["experts"], values, measure)
        yield f"<div><h3>{escape(measure.title)}</h3><p class='note'>{escape(note)}</p>{figure}</div>"


def render_bank_page(title: str, tables: Sequence[Table], similarity: Optional[Mapping[str, Any]] = None) -> str:
    """The whole page.

    title (str): Heading.
    tables (Sequence[Table]): What is said of the bank or an expert.
    similarity (Optional[Mapping[str, Any]]): See `comparison.similarity_data`.
    RETURNS (str): HTML with its style inside: no script, no network.
    """
    parts: List[str] = [f"<h1>{escape(title)}</h1>", *(render_table(table, title) for table in tables)]
    if similarity:
        parts.append(render_similarity(similarity))
    head = (
        f"<meta charset='utf-8'><meta name='viewport' content='width=device-width'><title>{escape(title)}</title>"
        f"<style>{STYLE}</style>"
    )
    return f"<!doctype html>\n<html lang='en'><head>{head}</head><body>{''.join(parts)}</body></html>\n"
