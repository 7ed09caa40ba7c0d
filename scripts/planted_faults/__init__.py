"""Faults that the tests must see, as small replacements of text in the source."""

from .data import DATA
from .decoding import DECODING
from .fault import Fault
from .guiding import GUIDING
from .merging import MERGING
from .running import RUNNING

FAULTS: tuple[Fault, ...] = (*MERGING, *DECODING, *GUIDING, *RUNNING, *DATA)
