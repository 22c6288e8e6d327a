"""The bank of a component that is in use: experts are added and removed while it runs."""

import logging
from pathlib import Path
from typing import Optional, Tuple, Union

from .bank import ExpertBank
from .errors import SamError
from .parts import Parts
from .plan import Expert, Plan
from .versions import Changes

logger = logging.getLogger("spacy_sam")


class LiveBank:
    """What `SamNer` offers for its bank. Other threads may annotate meanwhile.

    No change of the bank changes the plan: what runs goes on with the experts it was selected with, which are in memory, until
    the next selection.
    """

    name: str
    parts: Parts

    @property
    def plan(self) -> Optional[Plan]:
        raise NotImplementedError

    @property
    def bank(self) -> ExpertBank:
        """The bank, opened on first use. RAISES: SamError S101 to S106 or S115 if that cannot be done."""
        return self.parts.bank

    @property
    def plan_is_stale(self) -> bool:
        """Whether an expert of the plan is gone from the bank, or there in another version: the plan runs, and a new selection
        would be another one. A pipeline that is saved with a stale plan cannot use it when it is loaded."""
        return self.plan is not None and bool(_outdated(self.bank, self.plan))

    def add_expert(self, name: str, adapter: Union[str, Path], card: Optional[Expert] = None) -> None:
        """Add an expert to the bank. The next selection sees it.

        name (str): Its name in the bank.
        adapter (Union[str, Path]): A PEFT folder, which is copied.
        card (Optional[Expert]): Its card; None for the `card.json` in the folder.
        RAISES: SamError S104 without a card, and as `ExpertBank.add`. The bank is then unchanged.
        """
        self.refresh()
        self.bank.add(name, adapter, card if card is not None else self.bank.read_card(Path(adapter), name))

    def remove_expert(self, name: str) -> None:
        """Remove an expert and its folder from the bank. The next selection does not see it; a plan with it goes on.

        name (str): Its name in the bank.
        RAISES: SamError S108 if there is none of that name.
        """
        self.refresh()
        self.bank.remove(name)
        self._warn_if_stale()

    def refresh(self) -> Changes:
        """See what other processes have changed in the bank's folder.

        RETURNS (Changes): The names of experts that were added, removed and changed.
        RAISES: As `ExpertBank.refresh`.
        """
        changes = self.bank.refresh()
        if changes:
            logger.info("%s: the bank has changed: %s", self.name, changes)
            self._warn_if_stale()
        return changes

    def _warn_if_stale(self) -> None:
        names = _outdated(self.bank, self.plan) if self.plan is not None else ()
        if names:
            logger.warning(
                "%s: the plan uses %s, which the bank does not hold in that version any more. It goes on with what is in memory, "
                "until the next selection.",
                self.name,
                ", ".join(names),
            )


def _outdated(bank: ExpertBank, plan: Plan) -> Tuple[str, ...]:
    """The experts of a plan that the bank does not have in the plan's version."""
    return tuple(name for name, version in sorted(plan.adapter_hashes.items()) if _version(bank, name) != version)


def _version(bank: ExpertBank, name: str) -> Optional[str]:
    try:
        return bank.adapter_hash(name)
    except SamError:
        return None
