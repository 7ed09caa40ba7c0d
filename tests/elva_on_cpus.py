"""`elva` in one of several CPU processes; FSDP included, which accelerate leaves out where it sees no GPUs."""

import os

from accelerate.state import DistributedType, PartialState

from elva_hf.cli import main

_start = PartialState.__init__


def start(self, *args, **kwargs):
    _start(self, *args, **kwargs)
    seen = PartialState._shared_state["distributed_type"]  # shared: once it is FSDP it must stay so
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and seen == DistributedType.MULTI_CPU:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


PartialState.__init__ = start

if __name__ == "__main__":
    main()
