"""Task models as model folders in a cache, for engines that read models from disk."""

import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Dict

from ..bank import ExpertBank
from ..plan import Plan, TaskModelSpec
from .export import write_task_model
from .methods import MergeMethod

NAME = re.compile(r"[0-9a-f]{16}")  # of a plan's fingerprint


class TaskModelFolders:
    """Writes each task model of a bank once, and keeps those that were used last.

    A folder is named after everything that decides its weights, so that a cache can be used by later runs, for other banks, and
    after an expert was replaced.
    """

    def __init__(
        self, bank: ExpertBank, resolve: Callable[[Dict[str, Any]], MergeMethod], root: Path, max_kept: int
    ) -> None:
        """Nothing is written yet.

        bank (ExpertBank): The bank.
        resolve (Callable): Makes the merge method of a task model's config block.
        root (Path): The cache, made if it is not there.
        max_kept (int): Task models in it; those used longest ago are removed.
        """
        self.bank = bank
        self.resolve = resolve
        self.root = root
        self.max_kept = max_kept

    def folder(self, spec: TaskModelSpec) -> Path:
        """The folder of a task model, written if it is not in the cache. The base of a bank that holds it is its own folder.

        RAISES: SamError S108 if an expert is not in the bank, S413 if its version is not, and what merging it raises.
        """
        base = Path(self.bank.base[0])
        if not spec.experts and base.is_dir():
            return base
        hashes = dict(zip(spec.experts, self.bank.of_versions(spec).adapter_hashes))
        plan = Plan(self.bank.base_hash, (replace(spec, adapter_hashes=()),), hashes)
        folder = self.root / plan.fingerprint
        if not folder.is_dir():
            self._make_room()
            # What somebody holds in memory can be written, also when it is not in the bank any more.
            bank = self.bank.snapshot(plan.adapter_hashes)
            write_task_model(bank, plan, folder, self.resolve, keep_existing=True)
        os.utime(folder)
        return folder

    def _make_room(self) -> None:
        """For one more."""
        if not self.root.is_dir():
            return
        kept = [path for path in self.root.iterdir() if NAME.fullmatch(path.name) and path.is_dir()]
        kept.sort(key=lambda path: path.stat().st_mtime)
        for path in kept[: max(0, len(kept) + 1 - self.max_kept)]:
            shutil.rmtree(path)
