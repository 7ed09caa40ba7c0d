"""Real gloo processes against one process with everything; three are started, once for all tests."""

import multiprocessing

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from elva_hf.training.gathering import gather_counts, gather_rows
from elva_hf.training.losses import frame_contrastive_loss

HIDDEN, WIDTH = 3, 5
FRAMES = {"two ranks": (4, 2), "three ranks, one without frames": (3, 0, 2), "nobody has frames": (0, 0, 0)}
CASES = [(name, masked) for name in FRAMES for masked in (False, True)]


class Head(nn.Module):
    """A frame head with its temperature, and the loss inside, as in a model's forward."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(HIDDEN, WIDTH).double()
        self.logit_scale = nn.Parameter(torch.tensor([1.3], dtype=torch.float64))

    def forward(self, hidden, teacher, ids, masked, group):
        return frame_contrastive_loss(
            self.linear(hidden), teacher, self.logit_scale.exp(), video_ids=ids, mask_same_video=masked, group=group
        )


def frames(case):
    """Hidden states, targets and videos of every rank; videos are numbered from 0 on each rank."""
    generator = torch.Generator().manual_seed(1)

    def draw(count):
        return (
            torch.randn(count, HIDDEN, dtype=torch.float64, generator=generator),
            torch.randn(count, WIDTH, dtype=torch.float64, generator=generator),
            torch.arange(count) // 2,
        )

    return [draw(count) for count in FRAMES[case]]


def joined(case):
    """What one process with all frames has in a batch; videos keep apart."""
    hidden, teacher, ids = zip(*frames(case), strict=True)
    return torch.cat(hidden), torch.cat(teacher), torch.cat([part + 100 * rank for rank, part in enumerate(ids)])


def measure(head, hidden, teacher, ids, masked, group=None):
    hidden = hidden.clone().requires_grad_()
    loss = head(hidden, teacher, ids, masked, group)
    loss.backward()
    return {
        "loss": loss.detach(),
        "hidden": hidden.grad,
        **{name.removeprefix("module."): parameter.grad for name, parameter in head.named_parameters()},
    }


def gather_everything(rank, group, counts):
    """`gather_rows` on its own: each rank weighs what it got by its own numbers."""
    rows = torch.full((counts[rank], 2), float(rank), requires_grad=True)
    everyone = gather_rows(rows, counts, group)
    ((rank + 1) * everyone * torch.arange(1.0, 1 + len(everyone))[:, None]).sum().backward()
    return {"counts": gather_counts(rows, group), "rows": everyone.detach(), "gradient": rows.grad}


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=3)
    group = dist.new_group([0, 1])
    results = {"gathering": gather_everything(rank, None, [1, 0, 3])}
    for case, masked in CASES:
        if rank < len(FRAMES[case]):
            members = group if len(FRAMES[case]) == 2 else None
            ddp = DistributedDataParallel(Head(), process_group=members)
            results[case, masked] = measure(ddp, *frames(case)[rank], masked, members)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.set_forkserver_preload(["elva_hf.training.losses"])  # imported once for all three
    mp.start_processes(work, (str(folder),), nprocs=3, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt") for rank in range(3)]


@pytest.mark.parametrize(("case", "masked"), CASES)
def test_the_mean_over_ranks_is_one_process_with_all_frames(ranks, case, masked):
    expected = measure(Head(), *joined(case), masked)
    results = [result[case, masked] for result in ranks[: len(FRAMES[case])]]
    torch.testing.assert_close(torch.stack([result["loss"] for result in results]).mean(), expected["loss"])
    gradients = torch.cat([result["hidden"] for result in results]) / len(results)
    torch.testing.assert_close(gradients, expected["hidden"])
    for result in results:
        for name in ("linear.weight", "linear.bias", "logit_scale"):
            torch.testing.assert_close(result[name], expected[name])


def test_the_cases_have_something_to_find():
    for case in ("two ranks", "three ranks, one without frames"):
        plain, masked = (measure(Head(), *joined(case), flag) for flag in (False, True))
        assert plain["loss"] != masked["loss"]
        assert all(value.abs().max() > 1e-3 for value in plain.values())


def test_rows_come_in_the_order_of_ranks(ranks):
    for rank, result in enumerate(ranks):
        assert result["gathering"]["counts"] == ([1, 0, 3], rank)
        assert result["gathering"]["rows"].tolist() == [[0, 0], [2, 2], [2, 2], [2, 2]]


def test_the_gradient_of_a_row_is_the_sum_of_what_all_ranks_ask(ranks):
    gradients = torch.cat([result["gathering"]["gradient"] for result in ranks])
    assert gradients.tolist() == [[6, 6], [12, 12], [18, 18], [24, 24]]  # (1 + 2 + 3) * place


def test_one_process_keeps_its_rows():
    rows = torch.randn(4, 2)
    assert gather_counts(rows) == ([4], 0)
    assert gather_rows(rows, [4]) is rows
