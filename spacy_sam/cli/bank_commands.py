"""The commands of `bank`: list, check and change a bank of experts."""

import json
from pathlib import Path
from typing import Any, Dict, Optional

import typer
from wasabi import msg

from ..errors import SamError
from .app import BankOption, bank_app, mendable, split


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
    adapter: Path = typer.Argument(
        ..., help="PEFT adapter folder; with a card.json, as in another bank, nothing more is needed."
    ),
    domain: Optional[str] = typer.Option(None, help="Of an adapter made elsewhere: what it knows, in words."),
    texts: Optional[Path] = typer.Option(None, help="Texts of that domain, best those it was trained on."),
    labels: Optional[str] = typer.Option(
        None, "--labels", "-l", help="The types it knows. Default: those annotated in the texts."
    ),
    encoder: Optional[str] = typer.Option(None, help="Path of the bank's sentence encoder, if not found by name."),
    same_base: bool = typer.Option(
        False, "--same-base", help="It was trained on this bank's base, whatever its config names."
    ),
) -> None:
    """Add an expert to a bank. No other expert is touched.

    Example: python -m spacy sam bank add bank/ chemistry adapter/ --domain chemistry --texts chemistry.jsonl
    """
    from ..bank import CARD_FILE, ExpertBank
    from ..foreign import import_adapter
    from ..plan import Expert, from_json

    with mendable():
        path = adapter / CARD_FILE
        if domain is not None and texts is not None:
            import_adapter(
                ExpertBank(bank),
                name,
                adapter,
                domain=domain,
                texts=texts,
                labels=split(labels),
                encoder=encoder,
                same_base=same_base,
            )
        elif domain or texts or labels or encoder or same_base:
            raise SamError("S802", problem="An adapter made elsewhere needs both --domain and --texts.")
        elif adapter.is_dir() and not path.is_file():
            problem = f"{adapter} has no '{CARD_FILE}'. Give --domain and --texts, and one is made."
            raise SamError("S802", problem=problem)
        elif not path.is_file():
            raise SamError("S104", name=name, path=path)
        else:
            card = from_json(Expert, _read_json(path), "S102", path=path)
            ExpertBank(bank).add(name, adapter, card)
        msg.good(f"'{name}' is in {bank}")


@bank_app.command("compress")
def bank_compress(
    bank: Path = typer.Argument(..., help="Bank folder."),
    out: Path = typer.Argument(..., help="Folder of the new bank."),
    bits: float = typer.Option(2, help="Bits for each number of an adapter: 1, 2 or 4; it has 16 or 32 in PEFT files."),
    share_base: bool = typer.Option(False, "--share-base", help="Refer to the base in BANK and do not copy it."),
) -> None:
    """Write a bank whose adapters take a fraction of the space, and lose a little. BANK stays as it is.

    Example: python -m spacy sam bank compress bank/ small_bank/ --bits 2
    """
    from ..bank import ExpertBank
    from ..compress import compress_bank

    with mendable():
        rows = []
        new = compress_bank(
            ExpertBank(bank),
            out,
            bits,
            share_base=share_base,
            report=lambda name, compressed: rows.append((name, f"{compressed.head.error:.3f}")),
        )
        msg.table(rows, header=("name", "relative error"), divider=True, aligns=("l", "r"))
        msg.good(
            f"{len(rows)} adapters are in {new.path}. They have no dev scores: measure them with `spacy sam evaluate`."
        )


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
