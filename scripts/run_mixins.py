"""Run transformers' own common model, configuration and training tests on the classes of this package.

The tests come from the sdist of the installed transformers version, which is downloaded from the package
index into `.mixins/` (ignored by git) and never copied into the repository:

    python scripts/run_mixins.py [pytest arguments]
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import transformers

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".mixins"
VERSION = transformers.__version__
SDIST = CACHE / f"transformers-{VERSION}"
SITE = CACHE / "site"

log = logging.getLogger("run_mixins")


def pip(*arguments: str) -> None:
    """Run pip of this environment quietly."""
    subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments], check=True)


def fetch_tests() -> None:
    """Download the sdist and unpack its `tests` folder; nothing is done if it is there."""
    if (SDIST / "tests").is_dir():
        return
    CACHE.mkdir(exist_ok=True)
    (CACHE / ".gitignore").write_text("*\n")
    log.info("downloading the sdist of transformers %s (17 MB) ...", VERSION)
    wanted = ["--no-deps", "--no-binary", ":all:", "--no-build-isolation", f"transformers=={VERSION}"]
    pip("download", *wanted, "--dest", str(CACHE))
    with tarfile.open(CACHE / f"transformers-{VERSION}.tar.gz") as archive:
        prefix = f"transformers-{VERSION}/tests/"
        members = [member for member in archive.getmembers() if member.name.startswith(prefix)]
        archive.extractall(CACHE, members=members, filter="data")
    (SDIST / "tests" / "__init__.py").touch()  # not in the sdist


def fetch_requirements() -> None:
    """Install what the tests import and this package does not need, beside the environment."""
    if not (SITE / "parameterized").is_dir():
        pip("install", "--no-deps", "--target", str(SITE), "parameterized")


def main() -> int:
    """Fetch what is missing and run pytest; returns its exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    fetch_tests()
    fetch_requirements()
    folder = ROOT / "tests" / "mixins"
    path = [SDIST, SITE, folder.parent, ROOT / "src", os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(str(part) for part in path if part),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }
    pytest = [sys.executable, "-m", "pytest", "-c", str(folder / "pytest.ini"), "--rootdir", str(folder)]
    pytest += ["--confcutdir", str(folder)]
    arguments = sys.argv[1:] or ["-rfE"]
    return subprocess.run([*pytest, str(folder / "run_common_mixins.py"), *arguments], env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
