"""What `sam_ner` works with beside spaCy: the bank, the engine and the encoder, each opened on first use, and selection."""

import logging
import shutil
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, Mapping, Optional, Sequence, Tuple

from .adapters import Adapter
from .annotate import Annotator
from .bank import ExpertBank, bundled_bank_path
from .errors import SamError
from .locks import ProcessLock
from .plan import Plan
from .prompts import make_format
from .select.base import SelectionContext
from .select.encoder import SentenceEncoder

logger = logging.getLogger("spacy_sam")
logger.addHandler(logging.NullHandler())
MAX_GIVEN = 4  # plans for single calls whose experts stay in memory, for the next call
MAX_SELECTIONS = 5  # of one sample, if the bank is changed each time


@dataclass(eq=False)
class HeldPlan:
    """A plan, and its experts in memory: it can be run as long as this is kept, whatever happens to the bank.

    adapters: By name of the expert; None for a plan that was loaded, until it is held against the bank.
    types: Those that experts of the bank shared then: what is asked if the component has no labels.
    """

    plan: Plan
    adapters: Optional[Mapping[str, Adapter]] = None
    types: Tuple[str, ...] = ()

    def __getstate__(self) -> Dict[str, Any]:
        """Another process holds experts of its own."""
        return {"plan": self.plan, "adapters": None, "types": ()}


class Parts:
    """Opens a bank and its models when they are needed, once for all threads, and makes plans with them."""

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
        self._given: OrderedDict[str, HeldPlan] = OrderedDict()
        self._lock = ProcessLock()

    @property
    def bank(self) -> ExpertBank:
        """The bank, opened on first use."""
        with self._lock.held():
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
        ExpertBank(new)  # raises if experts were added or removed by another process meanwhile
        shutil.rmtree(folder, ignore_errors=True)
        new.rename(folder)

    def use_bank(self, folder: Path) -> None:
        """Work with the bank in this folder from now on."""
        with self._lock.held():
            self.bank_path = str(folder)
            self._bank = self._annotator = self._encoder = None
            self._given.clear()

    @property
    def annotator(self) -> Annotator:
        """The engine with its model, loaded on first use."""
        with self._lock.held():
            if self._annotator is None:
                engine = self.make_engine(self.bank)
                logger.info(
                    "Engine %s on device %s", type(engine).__name__, getattr(engine, "device", "of its own choice")
                )
                self._annotator = Annotator(engine, make_format(self.bank.prompt))
            return self._annotator

    @property
    def encoder(self) -> SentenceEncoder:
        """The encoder that the bank's centroids were made with."""
        with self._lock.held():
            if self._encoder is None:
                self._encoder = SentenceEncoder(self.bank.encoder, path=self.encoder_path)
            return self._encoder

    def __getstate__(self) -> Dict[str, Any]:
        """Opened parts stay behind when the component goes to another process."""
        return {**self.__dict__, "_bank": None, "_annotator": None, "_encoder": None, "_given": OrderedDict()}

    def refuse_foreign_cuda(self) -> None:
        """RAISES: SamError S504 if a model is on a CUDA device, for use in a forked process."""
        device = getattr(self._annotator.engine, "device", None) if self._annotator else None
        if device is not None and device.type == "cuda":
            raise SamError("S504", device=device)

    def hold(self, plan: Plan) -> HeldPlan:
        """Hold a plan against the bank, and its experts in memory.

        RAISES: SamError S108, S112 or S116 if it is for another bank, or for experts that are gone or were changed.
        """
        bank = self.bank.snapshot()
        bank.check_plan(plan)
        return HeldPlan(plan, bank.hold(plan), shared_types(bank))

    def check(self, held: HeldPlan) -> None:
        """Make up for what a loaded plan still lacks. RAISES: As `hold`."""
        if held.adapters is None:
            found = self.hold(held.plan)
            held.types, held.adapters = found.types, found.adapters

    def hold_given(self, plan: Plan) -> HeldPlan:
        """As `hold`, for a plan that may be given again with the next call."""
        self.bank.check_plan(plan)
        key = plan.fingerprint
        held = self._given.get(key) or self.hold(plan)
        with self._lock.held():
            self._given[key] = held
            self._given.move_to_end(key)
            if len(self._given) > MAX_GIVEN:
                self._given.popitem(last=False)
        return held

    def select(self, sample: Sequence[str], labels: Sequence[str], window_size: int) -> HeldPlan:
        """Select experts for a sample of texts, by the strategy: again, if the bank was changed meanwhile and it fails for that.

        sample (Sequence[str]): Texts of the corpus; empty ones are left out.
        labels (Sequence[str]): What will be asked; empty for the types that experts share.
        window_size (int): Tokens of each text that experts annotate.
        RAISES: SamError S301 to S305 if nothing can be selected, S202 without labels, S705 if the bank is changed on and on.
        """
        for _ in range(MAX_SELECTIONS):
            bank = self.bank.snapshot()
            types = shared_types(bank)
            try:
                plan = self._make_plan(bank, sample, tuple(labels) or some_types(types), window_size)
                return HeldPlan(plan, bank.hold(plan), types)
            except SamError as error:
                if not self.bank.has_moved(bank):
                    raise
                logger.warning("The bank was changed while experts were selected from it, which failed: %s", error)
        raise SamError("S705", path=self.bank.path, times=MAX_SELECTIONS)

    def _make_plan(self, bank: ExpertBank, sample: Sequence[str], phrases: Tuple[str, ...], window_size: int) -> Plan:
        annotator = self.annotator
        size = annotator.window_size(phrases, window_size)
        context = SelectionContext(
            texts=tuple(text for text in sample if text.strip()),
            labels=phrases,
            bank=bank,
            encode=self.encoder,
            encoder=bank.encoder,
            annotate=lambda spec, texts: annotator.found(
                bank.of_versions(spec), phrases, [annotator.first_window(text, size) for text in texts]
            ),
        )
        plan = self.strategy(context)
        logger.info("Plan %s from %d texts\n%s", plan.fingerprint, len(sample), plan)
        return plan


def shared_types(bank: ExpertBank) -> Tuple[str, ...]:
    """The types that at least two experts of a bank know, sorted."""
    counts: Dict[str, int] = {}
    for card in bank.experts:
        for label in card.labels:
            counts[label] = counts.get(label, 0) + 1
    return tuple(sorted(label for label, n in counts.items() if n > 1))


def some_types(shared: Tuple[str, ...]) -> Tuple[str, ...]:
    """These types. RAISES: SamError S202 if there are none."""
    if not shared:
        raise SamError("S202", expected="at least one name", found="none, and no two experts share a type")
    return shared
