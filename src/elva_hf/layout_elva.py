"""How a frame is written in tokens: which ones it has beside its patches, and how its grid is read without them."""

from __future__ import annotations

from typing import NamedTuple


class FrameLayout(NamedTuple):
    """Which tokens a frame has beside one for each patch.

    Token ids alone carry the grid of a frame. So where `<FRAME>` or `<LINE>` is no token of its own, its id marks a
    patch: the first of the frame, or the first of each row. Such a token is a patch like any other, with its pixels and
    its embedding; only its id tells where it stands.

    Args:
        frame_token: Whether `<FRAME>` is a token of its own, before the patches.
        line_token: Whether `<LINE>` is a token of its own, after each row.
        chunk_size: Frames that stand in the text as one: their grid is written once.
    """

    frame_token: bool = True
    line_token: bool = True
    chunk_size: int = 1

    @property
    def is_full(self) -> bool:
        """Whether a frame has both tokens, as ELVA's has (section 3.1)."""
        return self.frame_token and self.line_token

    def count(self, grid: tuple[int, int]) -> int:
        """Tokens of a frame, or of a chunk of frames, with this many rows and columns."""
        rows, cols = grid
        return self.frame_token + rows * (cols + self.line_token)

    def write(self, grid: tuple[int, int], frame: str, line: str, patch: str) -> str:
        """The text that stands for a frame, from the three tokens as text.

        Example:
            >>> [FrameLayout(*flags).write((2, 2), "F", "L", ".") for flags in ((1, 1), (1, 0), (0, 0))]
            ['F..L..L', 'FL.L.', 'F.L.']
        """
        rows, cols = grid
        row = patch * cols + line if self.line_token else line + patch * (cols - 1)
        if self.frame_token:
            return frame + row * rows
        return frame + row.removeprefix(patch if self.line_token else line) + row * (rows - 1)
