"""FLOPs of benchmarks/table5_efficiency.py: what is counted is what torch counts, and what Table 5 prints."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
PEERS = ("llava-all-logits", "llava", "llava-equal-tokens", "videollama3", "qwen2.5-vl")
GEMMA = ("gemma4-front-end", "gemma4-front-end-square", "gemma4")
ROWS = (*PEERS, *GEMMA, "elva", "elva+merge", "elva+merge+hybrid")


@pytest.fixture(scope="module")
def scripts():
    """The modules of `benchmarks/`, imported as the scripts import each other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        import measuring
        import peers
        import pipelines
        import table5_efficiency
        import table5_flops

        patch.setattr(measuring, "run_in_fresh_process", lambda function, *arguments: function(*arguments))
        yield SimpleNamespace(peers=peers, pipelines=pipelines, main=table5_efficiency, flops=table5_flops)


@pytest.fixture(scope="module")
def tiny(scripts):
    return scripts.peers.make_pipelines(scripts.pipelines.make_scale("tiny"))


@pytest.fixture(scope="module")
def derived(scripts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("derived")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["table5_efficiency.py", "--derived", "--out", str(folder)])
        assert scripts.main.main() == 0
    return {
        "json": json.loads((folder / "table5-flops.json").read_text()),
        "text": (folder / "table5-flops.md").read_text(),
    }


def find(rows, **wanted):
    [row] = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
    return row


def _count_attention(query, key, value, *args, out_shape=None, **kwargs):
    return sdpa_flop_count(query, key, value)


def run_under_the_counter(pipeline, frames=8):
    """FLOPs of attention and of all else, as torch counts a prefill in float32."""
    model, inputs = pipeline.build("cpu", torch.float32, "sdpa"), pipeline.inputs(frames, 1, torch.float32)
    mapping = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _count_attention}
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        pipeline.prefill(model, inputs)
    counts = counter.get_flop_counts()["Global"]
    attention = sum(count for operator, count in counts.items() if "scaled_dot_product" in str(operator))
    return attention, counter.get_total_flops() - attention


def counted(scripts, pipeline, frames=8):
    num_logits = None if getattr(pipeline, "all_logits", False) else 1
    flops = scripts.flops.count_flops(pipeline, frames, num_logits=num_logits, attention="full")
    return (
        flops.encoder_attention + flops.attention,
        flops.encoder_linear + flops.linear + flops.lm_head,
    )


@pytest.mark.parametrize("name", ROWS)
def test_flops_are_those_torch_counts(scripts, tiny, name):
    assert counted(scripts, tiny[name]) == run_under_the_counter(tiny[name])


@pytest.mark.parametrize(
    ("name", "tower", "fault"),
    [
        ("llava", "clip", {"num_hidden_layers": 1}),
        ("videollama3", "siglip", {"gated": True}),
        ("qwen2.5-vl", "qwen", {"full_attention": (0, 1)}),
    ],
    ids=["a layer forgotten", "a third matrix in the MLP", "windows counted whole"],
)
def test_a_tower_counted_wrongly_is_caught(scripts, tiny, name, tower, fault):
    scale = tiny[name].scale
    wrong = replace(tiny[name], scale=replace(scale, **{tower: replace(getattr(scale, tower), **fault)}))
    assert counted(scripts, wrong) != run_under_the_counter(tiny[name])


def test_pixels_pooled_too_late_are_caught(scripts, tiny):
    early, late = tiny["llava-equal-tokens"], replace(tiny["llava-equal-tokens"], stride=1)
    assert scripts.flops.count_flops(late, 8).encoder != scripts.flops.count_flops(early, 8).encoder


def test_the_encoder_based_rows_of_table_5_are_vicuna_with_its_tower(scripts):
    baseline = scripts.flops.paper_baseline()
    tera = {frames: scripts.flops.table5_accounting(baseline, frames) / 1e12 for frames in (32, 64, 128)}
    assert {frames: round(flops) for frames, flops in tera.items()} == {32: 260, 64: 517, 128: 1030}
    assert (tera[128] - tera[32]) / 96 == pytest.approx(8.017, abs=0.001)
    frame = scripts.flops.count_flops(baseline, 1)
    assert frame.encoder / 1e12 == pytest.approx(0.348 + 0.033 + 0.024, abs=0.002)
    without_tower = (tera[128] - tera[32]) / 96 - frame.encoder / 1e12
    assert abs(without_tower - 8.021) > 0.01, "outside what the printed digits allow"


@pytest.mark.parametrize("name", ["elva", "elva+merge, table5", "elva+merge+hybrid, table5"])
@pytest.mark.parametrize("frames", [32, 64])
def test_encoder_free_rows_are_within_5_percent_of_table_5(scripts, derived, name, frames):
    row = find(derived["json"]["rows"], pipeline=name, frames=frames)
    assert row["paper_flops"] == scripts.flops.PAPER[name.partition(",")[0]]["flops"][frames // 64] * 1e12
    assert abs(row["off_by"]) <= 0.05
    assert row["table5_flops"] == pytest.approx(row["paper_flops"], rel=0.05)


def test_four_halvings_fit_table_5_but_for_one_figure(derived):
    names = ("elva+merge, four halvings", "elva+merge+hybrid, four halvings")
    off = {
        (name, frames): find(derived["json"]["rows"], pipeline=name, frames=frames)["off_by"]
        for name in names
        for frames in (32, 64)
    }
    worst = off.pop((names[1], 32))
    assert worst == pytest.approx(0.058, abs=0.001)
    assert all(abs(value) <= 0.05 for value in off.values())


def test_the_derived_file_says_so_and_its_tables_are_made_from_it(scripts, derived):
    assert derived["json"]["kind"] == "derived" and "device" not in derived["json"]
    assert scripts.flops.as_markdown(derived["json"]) == derived["text"]
    assert "| Vicuna-7B | 18722 | 18722 |" in derived["text"]


@pytest.mark.parametrize("frames", [32, 64, 128])
def test_equal_tokens_are_equal_at_full_size(derived, frames):
    rows = [find(derived["json"]["rows"], pipeline=name, frames=frames) for name in ("llava-equal-tokens", "elva")]
    assert {row["tokens"] for row in rows} == {157 * frames + 290}
    assert len({row["kv_bytes"] for row in rows}) == 1


def test_a_word_stands_between_the_frames_of_gemma(tiny):
    ids = tiny["gemma4"].inputs(3, 2, torch.bfloat16)["input_ids"]
    frame, plain = 70 * [5], tiny["gemma4-front-end"].inputs(3, 2, torch.bfloat16)["input_ids"]
    for row in ids.tolist():
        assert [row[1:71], row[72:142], row[143:213]] == 3 * [frame]
        assert 5 not in (row[71], row[142], *row[213:])
    assert ids.sort(1).values.tolist() == plain.sort(1).values.tolist(), "the words are those of the text"
    with pytest.raises(ValueError, match="12 frames: 10 words are too few"):
        tiny["gemma4"].inputs(12, 1, torch.bfloat16)


def test_windows_are_counted_as_wide_as_they_are(scripts, tiny):
    gemma = tiny["gemma4"]
    shape, tokens = gemma.scale.shape(), gemma.layers(8)[0]
    place = torch.arange(tokens)
    frame = torch.where((place > 0) & (place < 8 * 71) & (place % 71 != 0), place // 71, -1 - place)
    sees = (place[:, None] >= place) | (frame[:, None] == frame)
    near = place[:, None] - place < gemma.scale.gemma_window
    pairs = 6 * int((sees & near).sum()) + 2 * tokens * (tokens + 1) // 2
    counted = scripts.flops.count_flops(gemma, 8).attention
    assert counted == 4 * pairs * shape.num_heads * shape.head_dim
