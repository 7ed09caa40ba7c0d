"""Write `docs/inputs.md`, the table of odd and hostile inputs and of what comes out of each.

python scripts/inputs_table.py
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "inputs.md"


def main() -> int:
    """Make and read every input, and write the page; returns the exit code."""
    sys.path.insert(0, str(ROOT / "tests"))
    from odd_files import CASES, Place
    from odd_files.checking import examine
    from odd_files.table import render
    from odd_files.watching import Listener

    with tempfile.TemporaryDirectory() as root, Listener() as listener:

        def outcome(name: str) -> Any:
            folder = Path(root) / name
            folder.mkdir()
            os.chdir(folder)
            return examine(CASES[name], Place(folder, listener.port))

        page = render(outcome)
        os.chdir(ROOT)
    changed = not PAGE.is_file() or PAGE.read_text() != page
    PAGE.write_text(page)
    print(f"{PAGE.relative_to(ROOT)}: {'written' if changed else 'unchanged'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
