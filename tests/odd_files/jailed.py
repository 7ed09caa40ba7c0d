"""Read inputs in a process that the kernel kills when it asks for a socket, then also when it opens a file.

`tests/test_odd_files.py` runs it as `python -m odd_files.jailed FOLDER`, with `FOLDER/paths.json`: name -> path. It
prints what came out of each input, read by path and read from memory, or null where the kernel has no such jail.
"""

import json
import os
import sys
from pathlib import Path

from . import CASES, Place
from .checking import read_frames_of
from .watching import FILES, SOCKETS, die_at


def result(case, source):
    """The reason of the error, or the number of frames."""
    try:
        return len(read_frames_of(case, source).frames)
    except Exception as error:
        return getattr(error, "reason", repr(error))


def main(folder):
    paths = json.loads((folder / "paths.json").read_text())
    made = {name: case.build(Place(folder, 9)) for name, case in CASES.items() if name not in paths}
    memory = made | {name: Path(path).read_bytes() for name, path in paths.items() if os.path.isfile(path)}
    found = None
    if die_at(SOCKETS):
        found = {"path": {name: result(CASES[name], path) for name, path in paths.items()}}
        if die_at(FILES):
            found["memory"] = {name: result(CASES[name], source) for name, source in memory.items()}
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
