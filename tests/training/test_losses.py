import math

import pytest
import torch
import torch.nn.functional as F
from tiny_elva import END, FRAME, LINE, PATCH, START, batch, sample_inputs, tiny_model, video, words

from elva_hf.errors_elva import ConfigurationError
from elva_hf.geometry_elva import FRAME as KIND_FRAME
from elva_hf.geometry_elva import LINE as KIND_LINE
from elva_hf.geometry_elva import PATCH as KIND_PATCH
from elva_hf.geometry_elva import VIDEO_END, VIDEO_START, read_geometry, token_kinds
from elva_hf.training.losses import (
    LossComponents,
    frame_clips,
    frame_contrastive_loss,
    generative_loss,
    negative_cosine_loss,
    patch_alignment_loss,
    tube_alignment_errors,
    tube_alignment_loss,
    tubes_of_patches,
)

KINDS = {VIDEO_START: START, VIDEO_END: END, KIND_PATCH: PATCH, KIND_FRAME: FRAME, KIND_LINE: LINE}
HYBRID = ((4, 6), (2, 3), (2, 3), (4, 6), (2, 3))
SQUARE = ((3, 5), (3, 5))
IMAGE = ((2, 2),)
TALL = ((9, 2), (9, 2), (9, 2))


def geometry(*samples):
    return read_geometry(token_kinds(batch(list(samples))["input_ids"], KINDS))


def of_videos(*videos):
    """The geometry of one sample with these videos; each is the grids of its frames."""
    return geometry([*words(2), *(token for grids in videos for token in video(*grids)), *words(1)])


def clips_of(videos):
    """Per video the grids of its clips, each with the frames it has."""
    return [{grid: [i for i, other in enumerate(grids) if other == grid] for grid in grids} for grids in videos]


def num_clips(videos):
    return sum(map(len, clips_of(videos)))


def pool(maps, size):
    return F.adaptive_avg_pool2d(maps.permute(2, 0, 1), size).permute(1, 2, 0)


def loop_errors(student, teacher, videos):
    """Eq. 2 of each video by loops over clips and places."""
    grids = [grid for frames in videos for grid in frames]
    frames = [
        part.view(*grid, -1)
        for part, grid in zip(student.split([rows * columns for rows, columns in grids]), grids, strict=True)
    ]
    errors, clip, first = [], 0, 0
    for own, layout in zip(videos, clips_of(videos), strict=True):
        places = []
        for (rows, columns), members in layout.items():
            tubes = sum(frames[first + i] for i in members) / len(members)
            size = (min(rows, teacher.shape[1]), min(columns, teacher.shape[2]))
            ours, theirs = pool(tubes, size).flatten(0, 1), pool(teacher[clip], size).flatten(0, 1)
            for a, b in zip(ours, theirs, strict=True):
                places.append(2 - 2 * (a @ b) / (a.norm() * b.norm()))
            clip += 1
        errors.append(sum(places) / len(places))
        first += len(own)
    return torch.stack(errors)


def example(videos, height=4, width=4, features=5, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = of_videos(*videos)
    student = torch.randn(shape.num_patches, features, dtype=dtype, generator=generator)
    teacher = torch.randn(num_clips(videos), height, width, features, dtype=dtype, generator=generator)
    return student, teacher, shape


# Clips


def test_clips_are_counted_by_video_and_grid_in_order_of_first_appearance():
    clip, owner = frame_clips(of_videos(TALL, HYBRID, IMAGE))
    assert clip.tolist() == [0, 0, 0, 1, 2, 2, 1, 2, 3]
    assert owner.tolist() == [0, 1, 1, 2]


def test_clips_of_a_finer_grid_come_second_if_it_appears_second():
    clip, owner = frame_clips(of_videos(((9, 9), (2, 2)), ((1, 1), (9, 9), (1, 1))))
    assert clip.tolist() == [0, 1, 2, 3, 2]
    assert owner.tolist() == [0, 0, 1, 1]


def test_equal_grids_of_two_videos_and_two_samples_are_different_clips():
    clip, owner = frame_clips(geometry([*video(*IMAGE), *video(*IMAGE)], [*words(1), *video(*IMAGE)]))
    assert clip.tolist() == [0, 1, 2] == owner.tolist()


def test_a_video_without_frames_has_no_number():
    clip, owner = frame_clips(geometry([START, END, *video(*IMAGE)]))
    assert clip.tolist() == [0] == owner.tolist()


# Tubes: Eq. 2


def test_tube_alignment_of_a_known_angle():
    shape = of_videos(((1, 2), (1, 2)))
    student = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 2.0], [0.0, 3.0]])  # tubes (1, 1) and (0, 2)
    teacher = torch.tensor([[[[5.0, 0.0], [0.0, 0.5]]]])
    expected = (2 - 2 * math.cos(math.pi / 4) + 0) / 2
    assert tube_alignment_loss(student, teacher, shape).item() == pytest.approx(expected, rel=1e-6)


def test_tubes_are_averaged_before_pooling_and_normalised_after():
    shape = of_videos(((1, 2),))
    student = torch.tensor([[9.0, 0.0], [0.0, 1.0]])
    teacher = torch.tensor([[[[9.0, 1.0]]]])  # the mean of both places; normalised first, it would be (1, 1)
    assert tube_alignment_loss(student, teacher, shape).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("videos", "height", "width"),
    [
        ((SQUARE,), 3, 5),
        ((SQUARE, TALL), 2, 2),
        ((((9, 16),) * 2,), 27, 27),
        ((((27, 30), (27, 30)), IMAGE), 16, 16),
        ((TALL, SQUARE), 4, 3),
        ((HYBRID,), 3, 4),
        ((HYBRID, IMAGE, HYBRID, SQUARE), 4, 5),
        ((IMAGE,), 1, 1),
    ],
    ids=["equal", "finer student", "9x16 and 27x27", "27x30 and 16x16", "unequal", "hybrid", "mixed", "one place"],
)
def test_tube_alignment_equals_a_loop(videos, height, width):
    student, teacher, shape = example(videos, height, width)
    ours, theirs = student.clone().requires_grad_(), student.clone().requires_grad_()
    errors, expected = tube_alignment_errors(ours, teacher, shape), loop_errors(theirs, teacher, videos)
    torch.testing.assert_close(errors, expected)
    (errors * torch.arange(1.0, 1 + len(errors))).sum().backward()
    (expected * torch.arange(1.0, 1 + len(errors))).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_tube_alignment_passes_gradcheck():
    student, teacher, shape = example((((2, 3), (1, 2), (2, 3)), IMAGE), 2, 2, features=3)
    torch.autograd.gradcheck(lambda x: tube_alignment_errors(x, teacher, shape), student.requires_grad_())


@pytest.mark.parametrize(("factor", "expected"), [(3.0, 0.0), (-1.0, 4.0)])
def test_tube_alignment_sees_direction_only(factor, expected):
    student, _, shape = example((SQUARE, SQUARE))
    teacher = factor * tubes_of_patches(student, shape)
    assert tube_alignment_loss(student, teacher, shape).item() == pytest.approx(expected, abs=1e-12)


def test_the_order_of_videos_does_not_matter():
    videos = [HYBRID, SQUARE, IMAGE, TALL]
    parts = [example((grids,), seed=i) for i, grids in enumerate(videos)]

    def loss(order):
        students = torch.cat([parts[i][0] for i in order])
        return tube_alignment_errors(
            students, torch.cat([parts[i][1] for i in order]), of_videos(*(videos[i] for i in order))
        )

    order = [2, 0, 3, 1]
    torch.testing.assert_close(loss(order), loss(range(4))[order])
    torch.testing.assert_close(loss(range(4)), torch.cat([tube_alignment_errors(*part) for part in parts]))


def test_every_video_weighs_the_same_whatever_its_size():
    student, teacher, shape = example((TALL, IMAGE))
    errors = tube_alignment_errors(student, teacher, shape)
    torch.testing.assert_close(tube_alignment_loss(student, teacher, shape), errors.mean())


def test_parts_of_a_batch_add_up_under_a_common_count():
    videos = [HYBRID, SQUARE, IMAGE]
    parts = [example((grids,), seed=i) for i, grids in enumerate(videos)]
    whole = tube_alignment_loss(
        torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts]), of_videos(*videos)
    )
    pieces = sum(
        tube_alignment_loss(*part, num_videos=count)
        for part, count in zip(parts, (3, torch.tensor(3), 3.0), strict=True)
    )
    torch.testing.assert_close(pieces, whole)


def test_a_mean_over_features_would_carry_no_weight():
    width = 1152  # of SigLIP-so400m
    student, teacher, shape = example((SQUARE,), 3, 5, features=width)
    student.requires_grad_()
    summed = tube_alignment_loss(student, teacher, shape)
    (of_sum,) = torch.autograd.grad(summed, student)
    tubes = F.normalize(tubes_of_patches(student, shape), dim=-1)
    averaged = F.mse_loss(tubes, F.normalize(teacher, dim=-1))
    (of_mean,) = torch.autograd.grad(averaged, student)
    assert 1.5 < summed < 2.5  # random directions are orthogonal: an error of the order of L_Gen
    assert averaged <= 4 / width
    assert averaged.item() == pytest.approx(summed.item() / width)
    torch.testing.assert_close(of_mean * width, of_sum)


@pytest.mark.parametrize("shape", [None, "text"])
@pytest.mark.parametrize("num_videos", [None, 0, 3])
def test_no_video_is_a_zero_with_gradient(shape, num_videos):
    student = torch.randn(0, 5, requires_grad=True)
    loss = tube_alignment_loss(student, torch.randn(0, 2, 2, 5), geometry(words(3)) if shape else None, num_videos)
    assert loss.shape == () and loss.item() == 0
    loss.backward()
    assert student.grad.shape == (0, 5)


def test_zero_vectors_give_finite_gradients():
    student, teacher, shape = example((SQUARE,), dtype=torch.float32)
    student = torch.zeros_like(student).requires_grad_()
    tube_alignment_loss(student, teacher, shape).backward()
    assert student.grad.isfinite().all() and student.grad.abs().max() < 1e7
    frames = torch.zeros(3, 5, requires_grad=True)
    frame_contrastive_loss(frames, torch.zeros(3, 5), torch.tensor(100.0)).backward()
    assert frames.grad.isfinite().all()


def test_low_precision_and_autocast_are_computed_in_float32():
    student, teacher, shape = example((HYBRID, SQUARE), features=64, dtype=torch.bfloat16)
    exact = tube_alignment_loss(student.float(), teacher.float(), shape)
    frames, targets = torch.randn(9, 64).bfloat16(), torch.randn(9, 64).bfloat16()
    contrast = frame_contrastive_loss(frames.float(), targets.float(), torch.tensor(14.3))
    with torch.autocast("cpu", torch.bfloat16):
        assert tube_alignment_loss(student, teacher, shape).equal(exact)
        assert frame_contrastive_loss(frames, targets, torch.tensor(14.3)).equal(contrast)
    assert exact.dtype == contrast.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_teacher_of_another_type_is_brought_to_the_student(dtype):
    student, teacher, shape = example((SQUARE, HYBRID), dtype=torch.float32)
    teacher = teacher.to(dtype)
    frames, targets = torch.randn(4, 5), torch.randn(4, 5).to(dtype)
    for ours, theirs in (
        (tube_alignment_loss(student, teacher, shape), tube_alignment_loss(student, teacher.float(), shape)),
        (negative_cosine_loss(frames, targets), negative_cosine_loss(frames, targets.float())),
        *[[frame_contrastive_loss(frames, part, torch.ones(1)) for part in (targets, targets.float())]],
    ):
        assert ours.dtype == torch.float32
        assert ours.equal(theirs)


@pytest.mark.parametrize(
    ("patches", "teacher"), [(3, (1, 2, 2, 5)), (4, (2, 2, 2, 5)), (4, (1, 2, 2, 6)), (4, (1, 4, 5)), (4, (4, 5))]
)
def test_tubes_that_do_not_belong_together_are_refused(patches, teacher):
    with pytest.raises(ConfigurationError, match=r"expected \("):
        tube_alignment_loss(torch.randn(patches, 5), torch.randn(teacher), of_videos(IMAGE))


def test_tubes_of_patches_are_means_over_frames():
    shape = of_videos(((1, 2), (1, 2)), ((1, 2),))
    tubes = tubes_of_patches(torch.tensor([[1.0], [2.0], [5.0], [6.0], [7.0], [9.0]]), shape)
    assert tubes.tolist() == [[[[3.0], [4.0]]], [[[7.0], [9.0]]]]


def test_tubes_of_unequal_grids_are_refused():
    shape = of_videos(HYBRID)
    with pytest.raises(ConfigurationError, match="4x6, 2x3"):
        tubes_of_patches(torch.randn(shape.num_patches, 5), shape)


# Frames: Eq. 3


def loop_contrast(student, teacher, scale, hidden=()):
    """Eq. 3 by loops, mean over pairs; `hidden` lists the (i, j) left out."""
    student, teacher = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
    count, total = len(student), 0
    for i in range(count):
        others = [j for j in range(count) if (i, j) not in hidden]
        right = torch.exp(scale * student[i] @ teacher[i])
        total = total - 0.5 * torch.log(right / sum(torch.exp(scale * student[i] @ teacher[j]) for j in others))
        total = total - 0.5 * torch.log(right / sum(torch.exp(scale * student[j] @ teacher[i]) for j in others))
    return total / count


def pairs(count=6, features=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, count, features, dtype=torch.float64, generator=generator).unbind()


def test_contrast_of_two_orthogonal_pairs():
    loss = frame_contrastive_loss(torch.eye(2), 3 * torch.eye(2), torch.tensor(2.0))
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-2)), rel=1e-6)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_contrast_equals_a_double_loop(shape):
    student, teacher = pairs()
    values = []
    for function in (frame_contrastive_loss, loop_contrast):
        features = [student.clone().requires_grad_(), teacher.clone().requires_grad_()]
        scale = torch.full(shape, 3.0, dtype=torch.float64, requires_grad=True)
        loss = function(*features, scale)
        values.append([loss.reshape(()), *torch.autograd.grad(loss, [*features, scale])])
    torch.testing.assert_close(*values)
    assert frame_contrastive_loss(*features, scale).shape == ()


def test_contrast_passes_gradcheck():
    inputs = [part.clone().requires_grad_() for part in pairs(3, 2)]
    scale = torch.tensor([1.7], dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([0, 0, 1])
    torch.autograd.gradcheck(
        lambda *tensors: frame_contrastive_loss(*tensors, video_ids=ids, mask_same_video=True), (*inputs, scale)
    )


def test_frames_of_the_same_video_can_be_left_out_of_the_negatives():
    student, teacher = pairs(5)
    scale, ids = torch.tensor(3.0, dtype=torch.float64), torch.tensor([7, 7, 2, 7, 2])
    hidden = {(i, j) for i in range(5) for j in range(5) if i != j and ids[i] == ids[j]}
    masked = frame_contrastive_loss(student, teacher, scale, video_ids=ids, mask_same_video=True)
    torch.testing.assert_close(masked, loop_contrast(student, teacher, scale, hidden))
    assert masked < frame_contrastive_loss(student, teacher, scale, video_ids=ids)


def test_one_pair_is_told_apart_from_nothing():
    student, teacher = (part.requires_grad_() for part in pairs(1))
    loss = frame_contrastive_loss(student, teacher, torch.tensor(3.0, dtype=torch.float64))
    loss.backward()
    assert loss.item() == 0
    assert student.grad.abs().max() == 0


def test_contrast_without_frames_is_a_zero_with_gradient():
    student, scale = torch.randn(0, 4, requires_grad=True), torch.ones(1, requires_grad=True)
    loss = frame_contrastive_loss(student, torch.randn(0, 4), scale)
    loss.backward()
    assert loss.shape == () and loss.item() == 0
    assert student.grad.shape == (0, 4) and scale.grad.tolist() == [0]


@pytest.mark.parametrize("ids", [None, torch.zeros(3)])
def test_masking_needs_the_video_of_each_frame(ids):
    with pytest.raises(ConfigurationError, match=r"video_ids of shape \(6,\)"):
        frame_contrastive_loss(*pairs(), torch.tensor(1.0), video_ids=ids, mask_same_video=True)


def test_frames_of_another_width_are_refused():
    with pytest.raises(ConfigurationError, match="teacher_width"):
        frame_contrastive_loss(torch.randn(3, 4), torch.randn(3, 5), torch.tensor(1.0))


# The others, and their sum


def test_negative_cosine_is_minus_the_mean_cosine():
    student = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    teacher = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    assert negative_cosine_loss(student, teacher).item() == pytest.approx(-(1 + math.sqrt(0.5)) / 2)
    assert negative_cosine_loss(student[:0], teacher[:0]).item() == 0


@pytest.mark.parametrize("num_items", [None, 7])
def test_the_generative_loss_is_that_of_the_model(num_items):
    model = tiny_model().train()
    inputs = sample_inputs([*words(2), *video(*IMAGE), *words(6)])
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -4:] = inputs["input_ids"][:, -4:]
    loss = model(**inputs, labels=labels, num_items_in_batch=num_items).loss
    torch.testing.assert_close(generative_loss(model(**inputs).logits, labels, num_items), loss)
    assert generative_loss(model(**inputs).logits, torch.full_like(labels, -100)).item() == 0


def test_components_are_weighed_and_named():
    parts = LossComponents(torch.tensor(2.0, requires_grad=True), torch.tensor(3.0), torch.tensor(5.0))
    assert parts.total().item() == 10
    assert parts.total(tube_weight=0.5, frame_weight=2).item() == 13.5
    assert parts.total().requires_grad
    assert {name: value.item() for name, value in parts.detached().items()} == {
        "loss_gen": 2,
        "loss_mse": 3,
        "loss_con": 5,
    }
    assert not any(value.requires_grad for value in parts.detached().values())


def test_components_that_are_not_in_use_are_left_out():
    parts = LossComponents(loss_con=torch.tensor(5.0))
    assert parts.total(frame_weight=3).item() == 15
    assert list(parts.detached()) == ["loss_con"]
    with pytest.raises(ConfigurationError, match="labels"):
        LossComponents().total()


def test_patch_alignment_is_the_weighted_error_of_each_patch():
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 7, requires_grad=True), torch.randn(5, 7)
    weights = torch.tensor([1.0, 5.0, 1.0, 0.0, 2.0])
    errors = [float(weights[i]) * (2 - 2 * F.cosine_similarity(student[i], teacher[i], dim=0)) for i in range(5)]
    loss = patch_alignment_loss(student, teacher, weights)
    torch.testing.assert_close(loss, sum(errors) / 9)
    loss.backward()
    assert (student.grad[3] == 0).all() and (student.grad[1] != 0).any()
    torch.testing.assert_close(
        patch_alignment_loss(teacher * 3, teacher, weights), torch.tensor(0.0), atol=1e-6, rtol=0
    )
