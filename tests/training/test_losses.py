import pytest
import torch
import torch.nn.functional as F
from tiny_elva import END, FRAME, LINE, PATCH, START, batch, video, words

from elva_hf.geometry_elva import FRAME as KIND_FRAME
from elva_hf.geometry_elva import LINE as KIND_LINE
from elva_hf.geometry_elva import PATCH as KIND_PATCH
from elva_hf.geometry_elva import VIDEO_END, VIDEO_START, read_geometry, token_kinds
from elva_hf.training.losses import tube_alignment_loss, tube_means

KINDS = {VIDEO_START: START, VIDEO_END: END, KIND_PATCH: PATCH, KIND_FRAME: FRAME, KIND_LINE: LINE}


def geometry(*samples):
    return read_geometry(token_kinds(batch(list(samples))["input_ids"], KINDS))


def loop_loss(student, teacher, layout):
    """Eq. 2 by loops; `layout` lists each video as `(frames, rows, columns)`."""
    losses, at = [], 0
    for frames, rows, columns in layout:
        places = rows * columns
        s = student[at : at + frames * places].view(frames, places, -1).mean(0)
        t = teacher[at : at + frames * places].view(frames, places, -1).mean(0)
        at += frames * places
        errors = [(F.normalize(a, dim=0) - F.normalize(b, dim=0)).square().sum() for a, b in zip(s, t, strict=True)]
        losses.append(sum(errors) / places)
    return sum(losses) / len(losses)


def example():
    shape = geometry([*words(2), *video((2, 2), (2, 2), (2, 2)), *words(1), *video((1, 3))], [*video((2, 1), (2, 1))])
    layout = [(3, 2, 2), (1, 1, 3), (2, 2, 1)]
    return shape, layout, torch.randn(shape.num_patches, 5), torch.randn(shape.num_patches, 5)


def test_tube_alignment_equals_a_loop():
    shape, layout, student, teacher = example()
    torch.testing.assert_close(tube_alignment_loss(student, teacher, shape), loop_loss(student, teacher, layout))


def test_tube_alignment_gradients_equal_those_of_the_loop():
    shape, layout, student, teacher = example()
    ours, theirs = student.clone().requires_grad_(), student.clone().requires_grad_()
    tube_alignment_loss(ours, teacher, shape).backward()
    loop_loss(theirs, teacher, layout).backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize(("factor", "expected"), [(3.0, 0.0), (-1.0, 4.0)])
def test_tube_alignment_sees_direction_only(factor, expected):
    shape, _, student, _ = example()
    assert tube_alignment_loss(student, factor * student, shape).item() == pytest.approx(expected, abs=1e-5)


def test_tube_means_average_over_frames():
    means, rows = tube_means(torch.tensor([[1.0], [2.0], [5.0]]), torch.tensor([7, 3, 7]))
    assert means.flatten().tolist() == [2.0, 3.0]
    assert rows.tolist() == [1, 0, 1]
