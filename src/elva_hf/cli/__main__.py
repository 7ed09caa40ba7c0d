"""`python -m elva_hf.cli`: the command `elva`, for launchers that start a module."""

from elva_hf.cli import main

main()
