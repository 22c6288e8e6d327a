"""The command `bank show`: a bank, one expert, or experts against each other."""

import json
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Iterator, List, Optional, Sequence

import typer
from wasabi import msg

from .app import BankOption, bank_app, mendable, write_text

if TYPE_CHECKING:
    from ..overview import Table

LAST_COLUMN = 60  # characters; longer texts go on below


@bank_app.command("show")
def bank_show(
    name: Optional[str] = typer.Argument(None, help="One expert. Default: the whole bank."),
    similarity: bool = typer.Option(False, "--similarity", "-s", help="Compare the experts' task vectors."),
    baselines: bool = typer.Option(False, "--baselines", help="Compare with the baselines, too."),
    every_entry: bool = typer.Option(False, "--every-entry", help="Signs of all entries, of large matrices too."),
    seed: int = typer.Option(0, min=0, help="Of the rows of large matrices whose signs are compared."),
    bank: Optional[Path] = BankOption,
    json_path: Optional[Path] = typer.Option(None, "--json", help="Write all of it here (JSON)."),
    html_path: Optional[Path] = typer.Option(None, "--html", help="Write a page here (HTML)."),
) -> None:
    """Show a bank or an expert, and how alike the experts are.

    Example: python -m spacy sam bank show --similarity --html similarity.html
    """
    from ..bank import ExpertBank, bundled_bank_path
    from ..comparison import expert_similarity_tables, sampling_note, similarity_data, similarity_tables
    from ..heatmap import render_bank_page
    from ..merge.insight import MAX_ENTRIES
    from ..overview import bank_overview, expert_overview

    with mendable():
        opened = ExpertBank(bank or bundled_bank_path())
        overview = expert_overview(opened, name) if name else bank_overview(opened)
        found, tables = None, overview.tables
        if similarity:
            cards = [*opened.experts, *(opened.baselines if baselines else [])]
            if name and name not in [card.name for card in cards]:
                cards.append(opened[name])
            found = similarity_data(opened, [card.name for card in cards], None if every_entry else MAX_ENTRIES, seed)
            tables = expert_similarity_tables(found, name) if name else similarity_tables(found)
        for table in tables:
            print_table(table)
        if found:
            msg.text(sampling_note(found))
        if json_path:
            data = {**overview.data, **({"similarity": found} if found else {})}
            write_text(json_path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")
            msg.good(f"Data: {json_path}")
        if html_path:
            write_text(html_path, render_bank_page(overview.title, overview.tables, found))
            msg.good(f"Page: {html_path}")


def print_table(table: "Table") -> None:
    """A table under its title, the last column wrapped."""
    print(f"\n{table.title}")
    rows = [line for row in table.rows for line in _wrapped(row)]
    aligns: Sequence[str] = table.aligns or "l" * len(rows[0])
    msg.table(rows, header=table.header or None, divider=bool(table.header), aligns=tuple(aligns), max_col=200)


def _wrapped(row: Sequence[str]) -> Iterator[List[str]]:
    lines = textwrap.wrap(row[-1], LAST_COLUMN, break_on_hyphens=False) or [""]
    yield [*row[:-1], lines[0]]
    for line in lines[1:]:
        yield [*[""] * (len(row) - 1), line]
