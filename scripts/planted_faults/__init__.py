"""Faults that the tests must see, as small replacements of text in the source."""

from .data import DATA
from .decoding import DECODING
from .fault import Fault
from .losses import LOSS_TERMS
from .merging import MERGING
from .orders import ORDERS
from .recipes import RECIPES
from .running import RUNNING
from .siblings import SIBLINGS
from .teaching import TEACHING
from .toy import TOY

FAULTS: tuple[Fault, ...] = (
    *MERGING,
    *DECODING,
    *LOSS_TERMS,
    *TEACHING,
    *RUNNING,
    *RECIPES,
    *DATA,
    *ORDERS,
    *SIBLINGS,
    *TOY,
)
