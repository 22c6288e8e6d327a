"""What `sam_ner` works with beside spaCy: the bank, the engine and the encoder, each opened on first use, and selection."""

import logging
import shutil
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

from .annotate import Annotator
from .bank import ExpertBank, bundled_bank_path
from .errors import SamError
from .plan import Plan
from .prompts import make_format
from .select.base import SelectionContext
from .select.encoder import SentenceEncoder

logger = logging.getLogger("spacy_sam")
logger.addHandler(logging.NullHandler())


class Parts:
    """Opens a bank and its models when they are needed, and makes plans with them."""

    def __init__(
        self,
        *,
        bank: Optional[str],
        strategy: Callable[[SelectionContext], Plan],
        engine: Callable[[ExpertBank], Any],
        encoder: Optional[str],
    ) -> None:
        """bank: Folder of the bank; None for the bundled one. encoder: Path of the encoder; None to find it by name."""
        self.bank_path = bank
        self.strategy = strategy
        self.make_engine = engine
        self.encoder_path = encoder
        self._bank: Optional[ExpertBank] = None
        self._annotator: Optional[Annotator] = None
        self._encoder: Optional[SentenceEncoder] = None

    @property
    def bank(self) -> ExpertBank:
        """The bank, opened on first use."""
        if self._bank is None:
            self._bank = ExpertBank(self.bank_path if self.bank_path is not None else bundled_bank_path())
        return self._bank

    def open(self) -> None:
        """Open the bank now, so that what is wrong with it is reported before any work."""
        self._bank = self.bank

    def save_bank(self, folder: Path) -> None:
        """Copy the bank to a folder, in place of what is there. RAISES: SamError S707 if its base is a folder outside of it."""
        source, base = self.bank.path.resolve(), Path(self.bank.base[0])
        if base.is_dir() and source not in base.resolve().parents:
            raise SamError("S707", base=base)
        if folder.resolve() == source:
            return
        new = folder.with_name(f"{folder.name}.new")
        shutil.rmtree(new, ignore_errors=True)
        shutil.copytree(source, new)
        shutil.rmtree(folder, ignore_errors=True)
        new.rename(folder)

    def use_bank(self, folder: Path) -> None:
        """Work with the bank in this folder from now on."""
        self.bank_path = str(folder)
        self._bank = self._annotator = self._encoder = None

    @property
    def annotator(self) -> Annotator:
        """The engine with its model, loaded on first use."""
        if self._annotator is None:
            self._annotator = Annotator(self.make_engine(self.bank), make_format(self.bank.prompt))
        return self._annotator

    @property
    def encoder(self) -> SentenceEncoder:
        """The encoder that the bank's centroids were made with."""
        if self._encoder is None:
            self._encoder = SentenceEncoder(self.bank.encoder, path=self.encoder_path)
        return self._encoder

    def __getstate__(self) -> Dict[str, Any]:
        """Opened parts stay behind when the component goes to another process."""
        return {**self.__dict__, "_bank": None, "_annotator": None, "_encoder": None}

    def refuse_foreign_cuda(self) -> None:
        """RAISES: SamError S504 if a model is on a CUDA device, for use in a forked process."""
        device = getattr(self._annotator.engine, "device", None) if self._annotator else None
        if device is not None and device.type == "cuda":
            raise SamError("S504", device=device)

    def make_plan(self, sample: Sequence[str], phrases: Tuple[str, ...], window_size: int) -> Plan:
        """Select experts for a sample of texts, by the strategy.

        sample (Sequence[str]): Texts of the corpus; empty ones are left out.
        phrases (Tuple[str, ...]): What will be asked.
        window_size (int): Tokens of each text that experts annotate.
        RAISES: SamError S301 to S305 if nothing can be selected.
        """
        annotator = self.annotator
        size = annotator.window_size(phrases, window_size)
        context = SelectionContext(
            texts=tuple(text for text in sample if text.strip()),
            labels=phrases,
            bank=self.bank,
            encode=self.encoder,
            encoder=self.bank.encoder,
            annotate=lambda spec, texts: annotator.found(
                spec, phrases, [annotator.first_window(text, size) for text in texts]
            ),
        )
        plan = self.strategy(context)
        logger.info("Plan %s from %d texts\n%s", plan.fingerprint, len(sample), plan)
        return plan

    def shared_types(self) -> List[str]:
        """The types that at least two experts of the bank know, sorted. RAISES: SamError S202 if there are none."""
        counts: Dict[str, int] = {}
        for card in self.bank.experts:
            for label in card.labels:
                counts[label] = counts.get(label, 0) + 1
        shared = sorted(label for label, n in counts.items() if n > 1)
        if not shared:
            raise SamError("S202", expected="at least one name", found="none, and no two experts share a type")
        return shared
