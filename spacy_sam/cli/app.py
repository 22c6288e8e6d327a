"""The Typer application and what all commands share.

Exit codes: 0 all went well; 1 something the user can mend (a coded error); 2 wrong usage; 3 `apply` has finished, with
problems that it reported.
"""

import os
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional

import typer
from wasabi import msg

from ..errors import SamError

app = typer.Typer(
    name="sam",
    help="Select domain experts for a corpus, merge them, annotate. No labels, no training.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
bank_app = typer.Typer(help="List, check and change a bank of experts.", no_args_is_help=True)
app.add_typer(bank_app, name="bank")


@app.callback()
def _before_any_command() -> None:
    if not progress_wanted():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # read when transformers is imported


BankOption = typer.Option(None, "--bank", "-b", help="Bank folder. Default: the bank that comes with the package.")


@contextmanager
def mendable() -> Iterator[None]:
    """Print a coded error without its traceback, and leave with exit code 1."""
    try:
        yield
    except SamError as error:
        msg.fail(str(error), spaced=True)
        raise typer.Exit(1) from error


def progress_wanted() -> bool:
    """Bars only on a terminal, so that logs stay readable."""
    return sys.stderr.isatty()


def read_all_texts(paths: List[Path]) -> List[str]:
    """Texts of several files. RAISES: SamError S602, S603 or S801."""
    from ..corpora import read_texts

    texts = [text for path in find_files(paths) for text in read_texts(path)]
    if not texts:
        raise SamError("S801", path=", ".join(map(str, paths)))
    return texts


def find_files(paths: List[Path]) -> List[Path]:
    """Files, and those of glob patterns, for shells that leave patterns alone. RAISES: SamError S602 if there are none."""
    from ..train.config import expand

    return [file for path in paths for file in ([path] if path.is_file() else expand([str(path)]))]


def write_text(path: Path, text: str) -> None:
    """Write a file, and its folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf8")


def read_overrides(args: List[str]) -> Dict[str, Any]:
    """`--section.name value` pairs, as in `spacy train`. RAISES: typer.BadParameter for anything else."""
    from spacy.cli._util import parse_config_overrides

    value_may_follow = False
    for arg in args:
        named = arg.startswith("--") and "." in arg.split("=")[0]
        if not named and not value_may_follow:
            raise typer.BadParameter(f"'{arg}' is no option, nor a value of the config: --section.name VALUE")
        value_may_follow = named and "=" not in arg
    return parse_config_overrides(list(args), env_var=None)


def split(names: Optional[str]) -> List[str]:
    """Comma-separated names as a list."""
    return [name.strip() for name in (names or "").split(",") if name.strip()]


def engine_on(device: Optional[str]) -> Dict[str, Any]:
    """The engine's config block for a device."""
    return {"@misc": "spacy_sam.TorchEngine.v1", "device": device}


def main() -> None:
    """Entry point of the `spacy-sam` script."""
    from . import apply_command, bank_commands, commands, show  # noqa: F401 (registers the commands)

    app(prog_name="spacy-sam")
