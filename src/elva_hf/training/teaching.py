"""Run a teacher over rows once and keep its features: what `elva teach` does."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from elva_hf.data.datasets import BAD, BadSamples, describe_row
from elva_hf.data.encoding import encode_row
from elva_hf.guidance_elva import check_frame_features
from elva_hf.processing_elva import ElvaProcessor
from elva_hf.training.teacher import VisualTeacher, denormalize, summarize, unpatchify
from elva_hf.training.teacher_cache import TeacherCacheWriter, content_key


@dataclass(frozen=True)
class VideoToTeach:
    """One video as the student sees it.

    Args:
        key: Of its features.
        patches: `(P, 3 * patch_size**2)` uint8.
        grids: Rows and columns of patches of each frame.
        sample_id: Of its row.
    """

    key: str
    patches: Tensor
    grids: tuple[tuple[int, int], ...]
    sample_id: str

    def frames(self, patch_size: int) -> list[Tensor]:
        """`(3, H, W)` uint8 each."""
        parts = self.patches.split([rows * cols for rows, cols in self.grids])
        return [unpatchify(part, *grid, patch_size) for part, grid in zip(parts, self.grids, strict=True)]


@dataclass(frozen=True)
class Taught:
    """Counts of a run.

    Args:
        rows: Rows read.
        bad_rows: Of them, those that cannot be.
        videos: Videos in the others; a video that several rows show counts for each.
        added: Videos whose features were new.
        num_bytes: Bytes written.
    """

    rows: int
    bad_rows: int
    videos: int
    added: int
    num_bytes: int


class RowsToTeach(Dataset):
    """Videos of rows, decoded as for training; a row that cannot be read is written down and has none.

    Args:
        rows: Anything with `__getitem__` that gives rows.
        indices: Which of them.
        processor: Of the student.
        bad_samples: Takes rows that cannot be read.
        **options: Of the video processor.
    """

    def __init__(
        self,
        rows: Sequence[Mapping[str, Any]],
        indices: Sequence[int],
        processor: ElvaProcessor,
        bad_samples: BadSamples,
        **options: Any,
    ):
        check_frame_features(processor.video_processor.layout)
        self.rows, self.indices, self.processor = rows, indices, processor
        self.bad_samples, self.options = bad_samples, options

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, number: int) -> list[VideoToTeach] | None:
        index, row = self.indices[number], None
        try:
            row = self.rows[index]
            sample = encode_row(row, self.processor, index=index, **self.options)
        except BAD as error:
            self.bad_samples.add(error, **describe_row(row, error, index=index, epoch=0))
            return None
        self.bad_samples.count()
        if sample.pixel_values_videos is None:
            return []
        pixels = self.processor.video_processor.resolve_options(**self.options)
        patches = denormalize(sample.pixel_values_videos, pixels.image_mean, pixels.image_std)
        return [
            VideoToTeach(content_key(part, grids), part.clone(), grids, sample.sample_id)
            for part, grids in zip(patches.split(sample.patches_per_video), sample.grids, strict=True)
        ]


def teach(
    rows: RowsToTeach,
    teacher: VisualTeacher,
    writer: TeacherCacheWriter,
    *,
    num_workers: int = 0,
    tick: Callable[[], Any] | None = None,
) -> Taught:
    """Write the features of all videos of rows that a cache lacks.

    Args:
        rows: Of this process.
        teacher: Whose features they are.
        writer: Of the cache.
        num_workers: Processes that decode.
        tick: Called after each row.

    Raises:
        TooManyBadSamples: More rows than may be cannot be read.
        ConfigurationError: Features that the cache's dtype cannot hold.
    """
    loader = DataLoader(rows, batch_size=None, num_workers=num_workers, collate_fn=_as_it_is)
    pending: deque[VideoToTeach] = deque()
    counts = {"rows": 0, "bad_rows": 0, "videos": 0}
    added, written = writer.num_added, writer.num_bytes

    def missing() -> Iterator[list[Tensor]]:
        for videos in loader:
            counts["rows"] += 1
            counts["bad_rows"] += videos is None
            for video in videos or ():
                counts["videos"] += 1
                if video.key not in writer:
                    pending.append(video)
                    yield video.frames(writer.manifest.patch_size)
            if tick is not None:
                tick()

    for maps in teacher.each(missing()):
        video = pending.popleft()
        targets = summarize(maps, video.grids)
        writer.add(video.key, targets.tubes, targets.frames, video.grids, video.sample_id)
    writer.flush()
    return Taught(**counts, added=writer.num_added - added, num_bytes=writer.num_bytes - written)


def _as_it_is(item: Any) -> Any:
    return item
