"""What all benchmarks share: where they ran, and the file they write."""

import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any, Dict

PACKAGES = ("spacy-sam", "spacy", "torch", "transformers", "peft", "sentence-transformers")
RESULTS = Path(__file__).parent / "results"


def machine() -> Dict[str, Any]:
    """Processor, cores and system."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    return {"cpu": cpu, "cores": os.cpu_count(), "system": platform.platform(), "python": platform.python_version()}


def commit() -> str:
    """The commit that ran, with a plus if the tree had changes."""
    try:
        done = subprocess.run(["git", "describe", "--always", "--dirty=+"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def _without_folders(argument: str) -> str:
    """A path outside the project says nothing to others: its last part in capitals stands for it."""
    path = Path(argument)
    return path.name.upper() if path.is_absolute() or ".." in path.parts else argument


def write_results(name: str, figures: Dict[str, float], **details: Any) -> Path:
    """Write `results/NAME.json`: machine, versions, commit, command, figures, and the benchmark's own details."""
    module = Path(sys.argv[0]).stem
    data = {
        "machine": machine(),
        "versions": {package: version(package) for package in PACKAGES},
        "commit": commit(),
        "command": " ".join(["python -m", f"benchmarks.{module}", *map(_without_folders, sys.argv[1:])]),
        "figures": figures,
        **details,
    }
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf8")
    return path
