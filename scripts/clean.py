"""Delete a folder that the project's commands made.

python scripts/clean.py runs/demo
"""

import argparse
import shutil
import sys
from pathlib import Path
from typing import Sequence


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder below the current one")
    folder = parser.parse_args(arguments).folder
    if Path.cwd() not in folder.resolve().parents:
        parser.error(f"{folder} is not below {Path.cwd()}: nothing was deleted")
    if folder.is_dir():
        shutil.rmtree(folder)
        print(f"Deleted {folder}")
    else:
        print(f"There is no {folder}")


if __name__ == "__main__":
    main(sys.argv[1:])
