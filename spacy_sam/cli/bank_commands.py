"""The commands of `bank`: list, check and change a bank of experts."""

import json
from pathlib import Path
from typing import Any, Dict, Optional

import typer
from wasabi import msg

from ..errors import SamError
from .app import BankOption, bank_app, mendable


@bank_app.command("list")
def bank_list(bank: Optional[Path] = BankOption) -> None:
    """List the experts of a bank.

    Example: python -m spacy sam bank list
    """
    from ..bank import ExpertBank, bundled_bank_path

    with mendable():
        opened = ExpertBank(bank or bundled_bank_path())
        rows = []
        for card in [*opened.experts, *opened.baselines]:
            scores = [score.f for score in card.scores.values()]
            mean = f"{100 * sum(scores) / len(scores):.1f}" if scores else ""
            rows.append((card.name, card.role, str(len(card.corpora)), str(len(card.labels)), mean))
        msg.text(f"{opened.name}: base {opened.base[0]} ({opened.base_hash})")
        msg.table(
            rows, header=("name", "role", "corpora", "types", "dev F1"), divider=True, aligns=("l", "l", "r", "r", "r")
        )


@bank_app.command("check")
def bank_check(bank: Optional[Path] = BankOption) -> None:
    """Validate a bank, weights included.

    Example: python -m spacy sam bank check --bank bank/
    """
    from ..bank import ExpertBank, bundled_bank_path

    with mendable():
        names = ExpertBank(bank or bundled_bank_path()).check()
        msg.good(f"Base and {len(names)} adapters are sound: {', '.join(names)}")


@bank_app.command("add")
def bank_add(
    bank: Path = typer.Argument(..., help="Bank folder."),
    name: str = typer.Argument(..., help="Name of the expert."),
    adapter: Path = typer.Argument(..., help="PEFT adapter folder with a card.json, as in another bank."),
) -> None:
    """Add an expert to a bank. No other expert is touched.

    Example: python -m spacy sam bank add bank/ chemistry other_bank/experts/chemistry
    """
    from ..bank import CARD_FILE, ExpertBank
    from ..plan import Expert, from_json

    with mendable():
        path = adapter / CARD_FILE
        if not path.is_file():
            raise SamError("S104", name=name, path=path)
        card = from_json(Expert, _read_json(path), "S102", path=path)
        ExpertBank(bank).add(name, adapter, card)
        msg.good(f"'{name}' is in {bank}")


@bank_app.command("remove")
def bank_remove(
    bank: Path = typer.Argument(..., help="Bank folder."),
    name: str = typer.Argument(..., help="Name of the expert."),
) -> None:
    """Remove an expert from a bank. No other expert is touched.

    Example: python -m spacy sam bank remove bank/ chemistry
    """
    from ..bank import ExpertBank

    with mendable():
        ExpertBank(bank).remove(name)
        msg.good(f"'{name}' is no longer in {bank}")


def _read_json(path: Path) -> Dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf8"))
    except ValueError as error:
        raise SamError("S102", path=path, reason=error) from error
