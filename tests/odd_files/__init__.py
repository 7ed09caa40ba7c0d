"""Odd and hostile inputs, made on the fly; see `docs/inputs.md` for what comes out of each."""

from . import arrays, beside, containers, damaged, hostile, strangers, timing
from .records import Case, Fails, Place, Shows

SECTIONS = {
    section: cases
    for module in (containers, beside, timing, damaged, strangers, hostile, arrays)
    for section, cases in module.CASES.items()
}
CASES = {case.name: case for cases in SECTIONS.values() for case in cases}

__all__ = ["CASES", "SECTIONS", "Case", "Fails", "Place", "Shows"]
