"""Where every visual token stands: frame, row, column, video and tube, read from the token ids alone.

`input_ids` is the only carrier of geometry that survives generate(), beams, continuations and remote
callers, so nothing else is trusted. Letters: `B` samples, `N` tokens, `P` patches, `F` frames, `L` rows.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from .errors_elva import PlaceholderError
from .layout_elva import FrameLayout
from .merging_elva import Tubes, cut_tubes
from .transfer_elva import to_device

FULL_LAYOUT = FrameLayout()

TEXT, VIDEO_START, VIDEO_END, PATCH, FRAME, LINE = range(6)

_PADDED = 8  # added to the kind of a padding token, to copy kinds and mask as one small tensor
_GRID_BITS = 12  # rows and columns of a frame stay below 4096, so a tube id fits in 64 bits


@dataclass(frozen=True)
class VisualGeometry:
    """Positions of the visual tokens of a batch, flat over `B * N`, and how they hang together.

    Args:
        patch_index: `(P,)` flat index of each patch token.
        frame_index: `(F,)` flat index of each `<FRAME>` token; empty where the layout has none.
        line_index: `(L,)` flat index of each `<LINE>` token; likewise.
        patch_frame: `(P,)` frame of each patch, `0..F-1` over the batch.
        patch_line: `(P,)` row of each patch, `0..L-1` over the batch.
        patch_row: `(P,)` row of each patch in its frame.
        patch_column: `(P,)` column of each patch in its row.
        patch_video: `(P,)` video of each patch, counted over the batch.
        line_frame: `(L,)` frame of each row.
        frame_rows: `(F,)` rows of each frame.
        frame_columns: `(F,)` patches in a row of each frame.
        tube_ids: `(B, N)` equal for patches at the same place of the same grid of the same video;
            every other token has a tube of its own (negative).
        valid: `(B, N)` bool, False for padding.
        host: The same in the host's memory, for what must be known before a kernel starts; None if it is there.
    """

    patch_index: Tensor
    frame_index: Tensor
    line_index: Tensor
    patch_frame: Tensor
    patch_line: Tensor
    patch_row: Tensor
    patch_column: Tensor
    patch_video: Tensor
    line_frame: Tensor
    frame_rows: Tensor
    frame_columns: Tensor
    tube_ids: Tensor
    valid: Tensor
    host: VisualGeometry | None = None

    @property
    def num_patches(self) -> int:
        """Patch tokens of the batch, `P`."""
        return self.patch_index.shape[0]

    @property
    def num_frames(self) -> int:
        """Frames of the batch, `F`."""
        return self.frame_rows.shape[0]

    @property
    def num_lines(self) -> int:
        """Rows of patches of the batch, `L`."""
        return self.line_frame.shape[0]

    @property
    def frame_numbers(self) -> Tensor:
        """`(B, N)` frame of each visual token, counted in its sample from 0; -1 for every other token."""
        length = self.tube_ids.shape[1]
        flat = torch.full((self.tube_ids.numel(),), -1, dtype=torch.long, device=self.tube_ids.device)
        frame_sample = torch.zeros_like(self.frame_rows).scatter(0, self.patch_frame, self.patch_index // length)
        earlier = torch.searchsorted(frame_sample, frame_sample)  # frames of the batch before the sample's first
        number = torch.arange(self.num_frames, device=flat.device) - earlier
        flat[self.patch_index] = number[self.patch_frame]
        if len(self.frame_index):
            flat[self.frame_index] = number
        if len(self.line_index):
            flat[self.line_index] = number[self.line_frame]
        return flat.view_as(self.tube_ids)

    def tubes(self, window: int | None = None, max_run: int | None = None) -> Tubes:
        """What may merge into what; computed on the host, without a copy from the device.

        Args:
            window: Frames of a video after which every run is cut; None for no cut.
            max_run: Most frames a run may hold; None for no bound.

        Raises:
            PlaceholderError: A patch is masked as padding: what the decoder does not see cannot be counted or merged.
        """
        host = self.host or self
        hidden = ~host.valid.flatten()[host.patch_index]
        if bool(hidden.any()):
            sample, position = divmod(int(host.patch_index[hidden][0]), host.valid.shape[1])
            raise PlaceholderError(
                f"sample {sample}, token {position}: attention_mask hides a patch of a video that is to be merged. "
                "Mask padding only, or use merge_schedule='none'."
            )
        batch, length = host.tube_ids.shape
        place = host.tube_ids.flatten()[host.patch_index]
        first = torch.full((int(host.patch_video.max()) + 1,), host.num_frames).scatter_reduce(
            0, host.patch_video, host.patch_frame, "amin"
        )
        frame = host.patch_frame - first[host.patch_video]
        ids = cut_tubes(place, frame, window, max_run)
        part = frame // window if window else torch.zeros_like(frame)
        _, groups = (host.patch_video * (host.num_frames + 1) + part).unique(return_inverse=True)
        first_of_tube = torch.full((int(ids.max()) + 1,), len(ids)).scatter_reduce(
            0, ids, torch.arange(len(ids)), "amin"
        )
        samples = torch.zeros(int(groups.max()) + 1, dtype=torch.long)
        samples[groups] = host.patch_index // length
        rows = (host.tube_ids.flatten(), ids), (torch.full((batch * length,), -1), groups)
        rows = [row.index_copy(0, host.patch_index, own).view(batch, length) for row, own in rows]
        tube_ids, group_ids = to_device(rows, self.tube_ids.device)
        return Tubes(
            ids=tube_ids,
            groups=group_ids,
            samples=samples.tolist(),
            patches=groups.bincount().tolist(),
            floors=groups[first_of_tube].bincount().tolist(),
            tail=length - 1 - int((host.patch_index % length).max()),
        )

    def to(self, device: torch.device) -> VisualGeometry:
        """The same on another device, which keeps the host's copy."""
        if device == self.tube_ids.device:
            return self
        names = [field.name for field in fields(self) if field.name != "host"]
        moved = to_device([getattr(self.host or self, name) for name in names], device)
        return VisualGeometry(**dict(zip(names, moved, strict=True)), host=self.host or self)


def to_host(tensor: Tensor) -> Tensor:
    """Copy to the host; every wait for the device of a forward pass goes through here."""
    return tensor.cpu()


def token_kinds(input_ids: Tensor, kind_ids: dict[int, int]) -> Tensor:
    """Classify tokens by id.

    Args:
        input_ids: `(B, N)` token ids.
        kind_ids: Token id of each kind, for example `{PATCH: 508, FRAME: 509, ...}`.

    Returns:
        `(B, N)` int64, one of `TEXT VIDEO_START VIDEO_END PATCH FRAME LINE`.
    """
    kinds = torch.zeros_like(input_ids, dtype=torch.long)
    for kind, token_id in kind_ids.items():
        kinds = kinds.masked_fill(input_ids == token_id, kind)
    return kinds


def token_kinds_from_embeddings(inputs_embeds: Tensor, kind_rows: dict[int, Tensor]) -> Tensor:
    """Classify tokens by comparing their embeddings with the rows of the special tokens.

    Args:
        inputs_embeds: `(B, N, D)` token embeddings.
        kind_rows: `(D,)` embedding row of each kind.

    Returns:
        `(B, N)` int64 kinds, as `token_kinds`.
    """
    kinds = torch.zeros(inputs_embeds.shape[:2], dtype=torch.long, device=inputs_embeds.device)
    for kind, row in kind_rows.items():
        kinds = kinds.masked_fill((inputs_embeds == row).all(-1), kind)
    return kinds


def find_patches(kinds: Tensor, layout: FrameLayout) -> Tensor:
    """`(B, N)` bool: tokens that stand for a patch, also under the id of `<FRAME>` or `<LINE>`."""
    patches = kinds == PATCH
    if not layout.frame_token:
        patches = patches | (kinds == FRAME)
    return patches if layout.line_token else patches | (kinds == LINE)


def read_geometry(
    kinds: Tensor, attention_mask: Tensor | None = None, layout: FrameLayout = FULL_LAYOUT
) -> VisualGeometry | None:
    """Derive the geometry of a batch from the kinds of its tokens, on the host after one copy from the device.

    A frame is `<FRAME>` and then rows of equally many patches, each closed by `<LINE>`. Frames stand
    between a video start and a video end; text may stand between frames.

    Args:
        kinds: `(B, N)` from `token_kinds`.
        attention_mask: `(B, N)`, 0 for padding; None if there is none.
        layout: Which of these tokens there are; one that leaves some out is read as if they stood there.

    Returns:
        The geometry on the device of `kinds`, or None if the batch holds no visual token.

    Raises:
        PlaceholderError: A frame is cut, ragged, or outside the borders of a video.
    """
    device = kinds.device
    padding = torch.zeros_like(kinds) if attention_mask is None else (attention_mask == 0).to(kinds)
    both = to_host((kinds + _PADDED * padding).to(torch.int8))
    kinds, valid = both.long() % _PADDED, both < _PADDED
    filled = None if layout.is_full else FilledTokens.fill(kinds, layout)
    kinds = kinds if filled is None else filled.kinds
    patch, frame, line = kinds == PATCH, kinds == FRAME, kinds == LINE
    starts = (kinds == VIDEO_START).cumsum(1)
    inside = starts - (kinds == VIDEO_END).cumsum(1) == 1
    video = _video_numbers(starts)
    malformed = find_malformed(patch.flatten(), frame.flatten(), line.flatten(), inside.flatten(), video)
    counts = torch.stack([patch.sum(), frame.sum(), line.sum(), malformed.sum()]).tolist()
    if not any(counts):
        return None
    if counts[-1]:
        _raise_malformed(*divmod(int(_first(malformed, filled)), valid.shape[1]), layout)
    shape = valid if filled is None else kinds > 0
    geometry = _build_geometry(patch.flatten(), frame.flatten(), line.flatten(), video, counts[:3], shape)
    return (geometry if filled is None else filled.undo(geometry, valid)).to(device)


@dataclass(frozen=True)
class FilledTokens:
    """The tokens of a compact layout with those put in that it leaves out, each row as its own sample again.

    Args:
        kinds: `(B, M)` as a full layout would have them.
        source: `(B * M,)` flat index of the token itself, or of the patch beside which it was put in.
        places: `(B * N,)` where each token is now.
        layout: What was left out.
    """

    kinds: Tensor
    source: Tensor
    places: Tensor
    layout: FrameLayout

    @classmethod
    def fill(cls, kinds: Tensor, layout: FrameLayout) -> FilledTokens:
        """Put in `<FRAME>` before the first patch of a frame, and `<LINE>` after the last patch of a row."""
        batch, length = kinds.shape
        patches = find_patches(kinds, layout)
        goes_on = torch.nn.functional.pad(kinds[:, 1:] == PATCH, (0, 1))
        before = torch.zeros_like(kinds) if layout.frame_token else (kinds == FRAME).long()
        after = torch.zeros_like(kinds) if layout.line_token else (patches & ~goes_on).long()
        ends = (1 + before + after).cumsum(1)
        width = int(ends.max()) if length else 0
        row = torch.arange(batch)[:, None] * width
        places = (row + ends - 1 - after).flatten()
        here = torch.arange(batch * length)
        filled = torch.full((batch * width,), TEXT).index_copy(0, places, kinds.masked_fill(patches, PATCH).flatten())
        source = torch.zeros(batch * width, dtype=torch.long).index_copy(0, places, here)
        for kind, put_in, step in ((FRAME, before.flatten() > 0, -1), (LINE, after.flatten() > 0, 1)):
            filled[places[put_in] + step] = kind
            source[places[put_in] + step] = here[put_in]
        return cls(filled.view(batch, width), source, places, layout)

    def undo(self, geometry: VisualGeometry, valid: Tensor) -> VisualGeometry:
        """The geometry of the tokens as they were.

        Args:
            geometry: Of `kinds`.
            valid: `(B, N)` of the tokens as they were.
        """
        return replace(
            geometry,
            patch_index=self.source[geometry.patch_index],
            frame_index=self.source[geometry.frame_index] if self.layout.frame_token else self.source[:0],
            line_index=self.source[geometry.line_index] if self.layout.line_token else self.source[:0],
            tube_ids=geometry.tube_ids.flatten()[self.places].view_as(valid),
            valid=valid,
        )


def find_malformed(patch: Tensor, frame: Tensor, line: Tensor, inside: Tensor, video: Tensor) -> Tensor:
    """Mark the visual tokens that are in no frame, in a ragged row or outside a video; no host sync.

    Args:
        patch: `(B * N,)` bool, and so `frame`, `line`.
        inside: `(B * N,)` bool, between a video start and its end.
        video: `(B * N,)` number of the video each token is in.

    Returns:
        `(B * N,)` bool, True for a token that breaks the form of a frame.
    """
    visual = patch | frame | line
    position = torch.arange(patch.numel(), device=patch.device)
    border = torch.where(frame | line, position, 0).cummax(0).values.roll(1)  # last <FRAME> or <LINE> before a token
    patches_seen = patch.cumsum(0)
    row_length = patches_seen - patches_seen[border]

    frame_number = frame.cumsum(0)  # 0 before the first frame
    table = torch.zeros(patch.numel() + 1, dtype=torch.long, device=patch.device)
    frame_video = table.index_add(0, frame_number, video * frame)
    apart = ~frame & ~visual.roll(1)  # text inside a frame
    stray = ~inside | (frame_number == 0) | (video != frame_video[frame_number]) | apart
    patch, line = patch & ~stray, line & ~stray  # a stray token does not spoil the frame before it
    columns = table.index_add(0, frame_number, row_length * (line & frame[border]))
    rows = table.index_add(0, frame_number, line.long())
    patches = table.index_add(0, frame_number, patch.long())
    ragged = line & (row_length != columns[frame_number])
    cut = (rows * columns != patches) | (patches == 0)
    return visual & (stray | ragged | cut[frame_number])


def _build_geometry(
    patch: Tensor, frame: Tensor, line: Tensor, video: Tensor, sizes: list[int], valid: Tensor
) -> VisualGeometry:
    num_patches, num_frames, num_lines = sizes
    patch_index = torch.nonzero_static(patch, size=num_patches).squeeze(1)
    frame_index = torch.nonzero_static(frame, size=num_frames).squeeze(1)
    line_index = torch.nonzero_static(line, size=num_lines).squeeze(1)

    patch_frame = frame.cumsum(0)[patch_index] - 1
    patch_line = line.cumsum(0)[patch_index]
    line_frame = frame.cumsum(0)[line_index] - 1
    frame_rows = torch.zeros_like(frame_index).index_add(0, line_frame, torch.ones_like(line_frame))
    frame_patches = torch.zeros_like(frame_index).index_add(0, patch_frame, torch.ones_like(patch_frame))
    frame_columns = frame_patches // frame_rows

    order = torch.arange(num_patches, device=patch.device) - (frame_patches.cumsum(0) - frame_patches)[patch_frame]
    columns = frame_columns[patch_frame]
    patch_row, patch_column = order // columns, order % columns
    patch_video = video[patch_index]

    place = patch_video
    for part in (frame_rows[patch_frame], columns, patch_row, patch_column):
        place = (place << _GRID_BITS) + part
    own_tube = -1 - torch.arange(patch.numel(), device=patch.device)
    return VisualGeometry(
        patch_index=patch_index,
        frame_index=frame_index,
        line_index=line_index,
        patch_frame=patch_frame,
        patch_line=patch_line,
        patch_row=patch_row,
        patch_column=patch_column,
        patch_video=patch_video,
        line_frame=line_frame,
        frame_rows=frame_rows,
        frame_columns=frame_columns,
        tube_ids=own_tube.index_copy(0, patch_index, place).view_as(valid),
        valid=valid,
    )


def _video_numbers(starts: Tensor) -> Tensor:
    """Number the videos of all samples consecutively: `(B * N,)`, meaningful inside a video only."""
    per_sample = starts[:, -1]
    earlier = per_sample.cumsum(0) - per_sample
    return (starts - 1 + earlier[:, None]).flatten()


def _first(malformed: Tensor, filled: FilledTokens | None) -> Tensor:
    """Flat index of the first token that breaks the form of a frame, among the tokens as they were given."""
    first = malformed.nonzero()[0, 0]
    return first if filled is None else filled.source[first]


def _raise_malformed(sample: int, position: int, layout: FrameLayout) -> None:
    form = "<FRAME>, then rows of equally many patches, each closed by <LINE>,"
    if not layout.is_full:
        form = f"rows of equally many patches, as {layout} writes them,"
    raise PlaceholderError(
        f"sample {sample}, token {position}: a visual token stands outside a complete frame. A frame is {form} "
        "between a video start and a video end. Build inputs with the model's processor, and do not truncate or split "
        "them inside a video."
    )
