"""What a run of the decoder leaves besides its result: hidden states, and who merged into whom."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from .merging_elva import MergeMap


@dataclass(frozen=True)
class StateTrace:
    """Hidden states as `output_hidden_states` asks for them: all, some by index, or none.

    Args:
        wanted: Indices of the states to keep: layer `i`'s input is state `i`, the final state comes last.
        states: Those so far, `(B, N, D)`, None for one that is not wanted.
    """

    wanted: frozenset[int]
    states: list[Tensor | None]

    @classmethod
    def start(cls, asked: bool | int | Sequence[int] | None, num_layers: int) -> StateTrace:
        """Read `output_hidden_states`: a flag, or indices of which negative ones count from the end."""
        count = num_layers + 1
        if isinstance(asked, bool) or asked is None:
            return cls(frozenset(range(count) if asked else ()), [])
        indices = [asked] if isinstance(asked, int) else asked
        return cls(frozenset(index % count for index in indices if -count <= index < count), [])

    def add(self, state: Callable[[], Tensor] | Tensor) -> None:
        """Keep the next state, or what makes it, if it is wanted."""
        wanted = len(self.states) in self.wanted
        self.states.append((state() if callable(state) else state) if wanted else None)

    def finish(self, final: Tensor) -> tuple[Tensor | None, ...] | None:
        """All states, or None if none was wanted."""
        self.add(final)
        return tuple(self.states) if self.wanted else None


@dataclass(frozen=True)
class Trace:
    """What a run leaves besides its result.

    Args:
        states: Hidden states.
        survivors: `(B, N)` column of each token's survivor, by the layer that merged; None if not wanted.
    """

    states: StateTrace
    survivors: dict[int, Tensor] | None

    def merge_map(self, frame_index: Tensor | None) -> MergeMap | None:
        """Who stands for whom after each merge, if it was asked for."""
        if self.survivors is None:
            return None
        return MergeMap(tuple(self.survivors), tuple(self.survivors.values()), frame_index)
