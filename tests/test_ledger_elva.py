"""The ledger against the counter of torch, what a run kept, a loop over places, and Table 5 of the paper."""

import json
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from merging_cases import BUSY, MERGING, SCHEDULES, deep_model, movie, movies
from tiny_elva import FRAME, LINE, PATCH, START, TEXT_TYPES, tiny_config, video, words
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers import AutoConfig, AutoModel

from elva_hf.configuration_elva import ElvaConfig
from elva_hf.errors_elva import ConfigurationError
from elva_hf.geometry_elva import read_geometry
from elva_hf.ledger_elva import (
    Bounds,
    DecoderShape,
    count_groups,
    exact_plan,
    plan_table5,
    plan_tokens,
    table5_flops,
)

DEEP = {"num_hidden_layers": 6}
FIXED = {name: value for name, value in MERGING.items() if name in ("ratio", "ratios", "table5", "window and max_run")}
GRIDS = st.lists(st.sampled_from([(1, 1), (2, 2), (3, 2), (1, 3)]), min_size=1, max_size=9)
CUT = st.none() | st.integers(1, 5)


def grids_of(ids):
    """Per video of a sample, rows and columns of its frames, read token by token."""
    videos, frames = [], []
    for token in [*ids, START]:
        if token == START:
            videos.append([(rows, patches // rows) for rows, patches in frames])
            frames = []
        elif token == FRAME:
            frames.append([0, 0])
        elif token in (PATCH, LINE):
            frames[-1][token == PATCH] += 1
    return [grids for grids in videos if grids]


def plan_of(ids, config, schedule=None):
    """The plan of a hand-built sample."""
    videos = grids_of(ids)
    return plan_tokens(videos, config, schedule, len(ids) - plan_tokens(videos).num_tokens)


def run(model, inputs, schedule="none", **options):
    """Output of a run and its FLOPs as torch counts them: attention, and all else."""
    attention = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _count_attention}
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=attention) as counter:
        output = model(**inputs, merge_schedule=schedule, **options)
    counts = counter.get_flop_counts()["Global"]
    attended = sum(count for operator, count in counts.items() if "scaled_dot_product" in str(operator))
    return output, attended, counter.get_total_flops() - attended


def _count_attention(query, key, value, *args, out_shape=None, **kwargs):
    return sdpa_flop_count(query, key, value)


def parts(plan, num_logits):
    """FLOPs of an exact plan: attention as torch counts it, and all else."""
    flops = plan.count_flops(num_logits, attention="full")
    assert flops.is_exact
    return flops.maximum.attention, flops.maximum.total - flops.maximum.attention


@pytest.mark.parametrize("model_type", TEXT_TYPES)
def test_without_merging_the_flops_are_those_torch_counts(model_type):
    model = deep_model(model_type)
    for ids in BUSY:
        _, attention, rest = run(model, movie(ids, dtype=torch.float32))
        planned_attention, planned_rest = parts(plan_of(ids, model.config), num_logits=len(ids))
        assert attention == planned_attention
        assert rest == pytest.approx(planned_rest, rel=1e-3)


@pytest.mark.parametrize("name", FIXED)
def test_with_ratios_the_plan_alone_knows_the_flops(name):
    model = deep_model()
    for ids in BUSY:
        _, attention, rest = run(model, movie(ids, dtype=torch.float32), FIXED[name], logits_to_keep=1)
        planned_attention, planned_rest = parts(plan_of(ids, model.config, FIXED[name]), num_logits=1)
        assert attention == planned_attention
        assert rest == pytest.approx(planned_rest, rel=1e-3)


@pytest.mark.parametrize("name", MERGING)
def test_the_flops_of_a_merged_batch_are_the_sum_of_its_rows(name):
    model = deep_model()
    output, attention, rest = run(model, movies(BUSY, dtype=torch.float32), MERGING[name], logits_to_keep=1)
    kept = output.past_key_values.tokens_per_layer
    plans = [exact_plan(plan_of(ids, model.config, MERGING[name]), kept[:, i]) for i, ids in enumerate(BUSY)]
    planned = torch.tensor([parts(plan, num_logits=1) for plan in plans]).sum(0)
    assert attention == planned[0]
    assert rest == pytest.approx(int(planned[1]), rel=1e-3)
    assert [plan.layers[0].maximum for plan in plans] == [len(ids) for ids in BUSY]


@pytest.mark.parametrize("options", [{"patch_embed_type": "naive"}, {"patch_embed_output_projection": True}])
def test_the_patch_embedding_is_counted_as_configured(options):
    model = deep_model(**options)
    ids = video(*6 * [(3, 4)], *2 * [(2, 2)])
    features = model.get_video_features
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        encoded = features(movie(ids, dtype=torch.float32)["pixel_values_videos"])
        geometry = read_geometry(model.model.token_kinds(torch.tensor([ids])))
        model.model.patch_embed(encoded.last_hidden_state, geometry)
    assert plan_of(ids, model.config).flops.maximum.patch_embed == counter.get_total_flops()
    assert plan_of(words(5), model.config).flops.maximum.patch_embed == 0


@pytest.mark.parametrize("name", SCHEDULES)
def test_what_a_run_keeps_lies_within_the_bounds(name):
    model = deep_model()
    for i, ids in enumerate(BUSY):
        plan = plan_of(ids, model.config, SCHEDULES[name])
        output, *_ = run(model, movie(ids, i, torch.float32), SCHEDULES[name])
        cache = output.past_key_values
        kept = cache.tokens_per_layer[:, 0].tolist() if hasattr(cache, "tokens_per_layer") else 6 * [len(ids)]
        assert all(bound.minimum <= tokens <= bound.maximum for bound, tokens in zip(plan.layers, kept, strict=True))
        has_threshold = any(step.target_ratio is None for step in plan.schedule.steps)
        if not has_threshold or name == "never" or not grids_of(ids):
            assert all(bound.is_exact for bound in plan.layers)


def test_the_bounds_of_a_threshold_are_reached_by_still_and_by_unlike_frames():
    model = deep_model()
    ids = words(3) + video(*5 * [(2, 3)]) + words(2)
    inputs = movie(ids, dtype=torch.float32)
    still = {**inputs, "pixel_values_videos": inputs["pixel_values_videos"][:1].expand(30, -1)}
    for threshold, pixels, end in ((-0.99, still, "minimum"), (0.9999, inputs, "maximum")):
        schedule = [{"layer": 1, "similarity_threshold": threshold}, {"layer": 3, "target_ratio": 0.5}]
        cache = run(model, pixels, schedule)[0].past_key_values
        planned = [getattr(layer, end) for layer in plan_of(ids, model.config, schedule).layers]
        assert cache.tokens_per_layer[:, 0].tolist() == planned


@pytest.mark.parametrize("name", ["paper", "table5"])
def test_bytes_of_keys_and_values_are_those_of_the_cache(name):
    for dtype in (torch.float32, torch.bfloat16):
        model = deep_model(dtype=dtype).to(dtype)
        ids = BUSY[0]
        cache = run(model, movie(ids, dtype=dtype), SCHEDULES[name])[0].past_key_values
        plan = exact_plan(plan_of(ids, model.config, SCHEDULES[name]), cache.tokens_per_layer)
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        assert plan.kv_cache_bytes == Bounds(held, held)


def test_generated_tokens_are_counted_by_the_exact_plan():
    model = deep_model()
    ids = BUSY[3]
    inputs = {key: value for key, value in movie(ids, dtype=torch.float32).items() if key != "position_ids"}
    attention = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _count_attention}
    with FlopCounterMode(display=False, custom_mapping=attention) as counter:
        output = model.generate(
            **inputs, max_new_tokens=9, merge_schedule="table5", return_dict_in_generate=True, do_sample=False
        )
    plan = plan_of(ids, model.config, "table5")
    after = exact_plan(plan, output.past_key_values.tokens_per_layer)
    assert after.text_tokens == plan.text_tokens + 8
    flops = after.count_flops(num_logits=9).maximum
    prefill = plan.count_flops(attention="full").maximum.attention - plan.flops.maximum.attention
    assert counter.get_total_flops() == pytest.approx(flops.total + prefill, rel=1e-3)


@pytest.mark.parametrize("model_type", TEXT_TYPES)
def test_the_shape_of_a_decoder_is_that_of_its_weights(model_type):
    text = {"num_hidden_layers": 3, "head_dim": 12} if model_type in ("qwen3", "mistral", "llama") else {}
    config = tiny_config(model_type, text).text_config
    decoder = AutoModel.from_config(config)
    shape = DecoderShape.from_config(config)
    weights = sum(weight.numel() for weight in decoder.layers[0].parameters() if weight.ndim == 2)
    assert shape.layer_weights == weights
    assert shape.num_layers == len(decoder.layers) and shape.bytes_per_value == 2
    assert DecoderShape.from_config(config, "float32").bytes_per_value == 4


def test_the_7b_preset_has_the_weights_of_qwen2_7b():
    shape = DecoderShape.from_config(ElvaConfig.from_preset("elva-7b").text_config)
    assert 28 * shape.layer_weights + shape.lm_head_flops(1) // 2 == 7_070_285_824
    assert shape.kv_bytes_per_token == 2048 and shape.attention_flops([3, 1]) == 4 * (6 + 1) * 3584
    assert shape.attention_flops([3, 1], "full") == 4 * (9 + 1) * 3584


TABLE5 = {
    ("none", False): {32: 75, 64: 146, 128: 289},
    ("table5", False): {32: 25, 64: 47, 128: 104},
    ("table5", True): {32: 14, 64: 24, 128: 44},
}
"""Teraflops of the 7B model (Table 5), by schedule and hybrid resolution, for each number of frames."""
OFF_EVERY_LINE = ("table5", False, 128)


def tera(name, hybrid, frames, **text):
    config = ElvaConfig.from_preset("elva-7b", **text)
    flops = table5_flops(plan_table5(config, frames, name, hybrid))
    assert flops.is_exact
    return flops.maximum / 1e12


@pytest.mark.parametrize(
    ("name", "hybrid", "frames"),
    [(*row, frames) for row, column in TABLE5.items() for frames in column if (*row, frames) != OFF_EVERY_LINE],
)
def test_table_5_within_5_percent(name, hybrid, frames):
    assert tera(name, hybrid, frames) == pytest.approx(TABLE5[name, hybrid][frames], rel=0.05)


def test_table_5_without_merging_to_its_last_digit():
    assert {frames: round(tera("none", False, frames)) for frames in (32, 64, 128)} == TABLE5["none", False]
    assert plan_table5(ElvaConfig.from_preset("elva-7b"), 32).num_tokens == 32 * 157 + 290
    assert plan_table5(ElvaConfig.from_preset("elva-7b"), 32, hybrid=True).num_tokens == 8 * 157 + 24 * 43 + 290


def test_the_104_teraflops_of_table_5_lie_on_no_line_and_all_fixed_schedules_do():
    def predicted(rows):
        return 3 * rows[64] - 2 * rows[32]

    rounding = 0.5 * (3 + 2)
    for row, column in TABLE5.items():
        on_the_line = abs(column[128] - predicted(column)) <= rounding + 0.5
        assert on_the_line == ((*row, 128) != OFF_EVERY_LINE), row
    for name in (
        "table5",
        [{"layer": 5, "target_ratio": 0.3}],
        [{"layer": i, "target_ratio": 0.7} for i in (1, 9, 20)],
    ):
        mine = {frames: tera(name, False, frames) for frames in (32, 64, 128)}
        assert mine[128] == pytest.approx(predicted(mine), rel=1e-3)
    needed = [
        {"layer": 1, "target_ratio": 0.59},
        {"layer": 3, "target_ratio": 0.59},
        {"layer": 14, "target_ratio": 0.5},
    ]
    assert tera(needed, False, 128) == pytest.approx(104, abs=0.5)
    thresholds = table5_flops(plan_table5(ElvaConfig.from_preset("elva-7b"), 128, "paper"))
    assert [thresholds.minimum // 10**12, thresholds.maximum // 10**12] == [38, 218]


def test_no_single_merge_reaches_table_5():
    for layer, least in ((1, 43.7), (14, 57.7)):
        assert tera([{"layer": layer, "target_ratio": 0.5}], False, 32) == pytest.approx(least, abs=0.05)


def test_the_documents_print_these_teraflops():
    shown = (Path(__file__).parents[1] / "docs" / "paper-gaps.md").read_text()
    for label, (row, column) in zip(("encoder-free", "+ Merge", "+ Merge + HR"), TABLE5.items(), strict=True):
        cells = [f"{paper} / {tera(*row, frames):.1f}" for frames, paper in column.items()]
        assert f"| {label} | {' | '.join(cells)} |" in shown


@given(GRIDS, CUT, CUT)
@settings(max_examples=80, deadline=None)
def test_groups_and_floors_are_those_of_a_loop_over_places(grids, window, max_run):
    runs = defaultdict(lambda: defaultdict(int))
    for frame, (rows, cols) in enumerate(grids):
        for place in range(rows * cols):
            runs[frame // window if window else 0][rows, cols, place] += 1
    expected = [
        (sum(tubes.values()), sum(-(-length // max_run) if max_run else 1 for length in tubes.values()))
        for tubes in runs.values()
    ]
    assert count_groups(grids, window, max_run) == expected


@given(GRIDS, CUT, CUT)
@settings(max_examples=40, deadline=None)
def test_groups_and_floors_are_those_the_model_merges_by(grids, window, max_run):
    kinds = deep_model().model.token_kinds(torch.tensor([video(*grids)]))
    tubes = read_geometry(kinds).tubes(window, max_run)
    assert count_groups(grids, window, max_run) == list(zip(tubes.patches, tubes.floors, strict=True))


def tokens(videos, schedule, text_tokens=0, **config):
    plan = plan_tokens(videos, tiny_config(text=DEEP, **config), schedule, text_tokens)
    return [layer.maximum if layer.is_exact else (layer.minimum, layer.maximum) for layer in plan.layers]


def test_a_ratio_is_kept_for_each_video_alone():
    videos = [5 * [(2, 2)], 3 * [(1, 3)]]  # 20 and 9 patches; others: 5 * 3 + 3 * 2 + 4 borders + 7 words
    assert tokens(videos, [{"layer": 2, "target_ratio": 0.5}], 7) == 2 * [61] + 4 * [32 + 10 + 5]


def test_a_ratio_stops_at_one_token_per_tube_and_of_the_input_does_not_compound():
    videos = [4 * [(2, 2)]]  # 16 patches, 4 tubes, 12 others, 2 borders
    halves = [{"layer": layer, "target_ratio": 0.5} for layer in (1, 2, 3)]
    assert tokens(videos, halves) == [30, 22, 18, 18, 18, 18]
    assert tokens(videos, {"steps": halves, "ratio_of": "input"}) == [30, 22, 22, 22, 22, 22]
    assert tokens(videos, {"steps": halves, "max_run": 2}) == [30, 22, 22, 22, 22, 22]
    assert tokens(videos, {"steps": halves, "window": 3}) == [30, 24, 22, 22, 22, 22]  # 12 + 4 -> 6 + 4 -> 4 + 4


def test_thresholds_have_bounds_and_ratios_after_them_too():
    videos = [4 * [(2, 2)]]
    steps = [{"layer": 1, "similarity_threshold": 0.6}, {"layer": 3, "target_ratio": 0.5}]
    assert tokens(videos, steps) == [30, (18, 30), (18, 30), (18, 22), (18, 22), (18, 22)]
    assert tokens(videos, "paper", similarity_threshold=1.0) == [30, 30, 30, 22, 22, 22]  # no similarity exceeds 1
    assert tokens(videos, "paper", similarity_threshold=0.999)[1] == (18, 30)


def test_images_and_text_never_merge():
    images = [[(3, 3)], [(3, 3)]]
    for schedule in ("paper", "table5", [{"layer": 1, "target_ratio": 0.01}]):
        assert tokens(images, schedule, 3) == 6 * [2 * (9 + 4) + 4 + 3]
        assert tokens([], schedule, 5) == 6 * [5]


def test_the_schedule_of_the_configuration_holds_if_none_is_given():
    config = tiny_config(text=DEEP, merge_schedule="table5", target_ratio=0.25)
    videos = [8 * [(2, 2)]]
    assert plan_tokens(videos, config) == plan_tokens(videos, config, "table5")
    assert plan_tokens(videos, config).layers[1].maximum == 8 + 8 * 3 + 2
    assert plan_tokens(videos, config, "none").layers == plan_tokens(videos, config).without_merging().layers


def test_tokens_are_counted_without_a_model():
    plan = plan_tokens([[(24, 24)] * 16, [(1, 2)]], text_tokens=11)
    assert plan.num_visual_tokens == 9616 + 4 and plan.num_tokens == 9620 + 4 + 11
    assert plan.tokens_per_frame == (16 * (601,), (4,)) and plan.num_frames == 17 and plan.num_patches == 9218
    assert plan.layers is None and "flops" not in plan.to_dict()
    for use in (lambda: plan.flops, lambda: plan.kv_cache_bytes, plan.without_merging, lambda: exact_plan(plan, [1])):
        with pytest.raises(ConfigurationError, match=r"config=model\.config"):
            use()


def test_flops_add_up_and_conventions_differ_where_they_should():
    plan = plan_tokens([8 * [(2, 2)]], tiny_config(text=DEEP), "paper", 10)
    for flops in (plan.flops.minimum, plan.flops.maximum):
        assert flops.total == flops.patch_embed + flops.linear + flops.attention + flops.lm_head
    one, every = plan.flops.minimum.lm_head, plan.count_flops(num_logits=None).minimum.lm_head
    assert every == one * plan.layers[-1].minimum
    assert plan.flops.minimum.linear < plan.flops.maximum.linear
    sums = [plan.flops.maximum.attention, plan.count_flops(attention="full").maximum.attention]
    assert 1.9 < sums[1] / sums[0] < 2


def test_a_plan_is_json():
    plan = plan_tokens([8 * [(2, 2)]], tiny_config(text=DEEP), "paper", 10)
    fields = json.loads(json.dumps(plan.to_dict()))
    assert fields["tokens_per_layer"][1] == {"minimum": plan.layers[1].minimum, "maximum": plan.layers[1].maximum}
    assert fields["flops"]["maximum"]["total"] == plan.flops.maximum.total
    assert fields["kv_cache_bytes"]["minimum"] == plan.kv_cache_bytes.minimum
    assert plan_tokens([8 * [(2, 2)]], tiny_config(text=DEEP), fields["merge_schedule"], 10) == plan


def test_deeper_layers_never_hold_more():
    for schedule in SCHEDULES.values():
        plan = plan_of(BUSY[3], tiny_config(text=DEEP), schedule)
        for before, after in pairwise(plan.layers):
            assert after.minimum <= before.minimum and after.maximum <= before.maximum
        assert all(layer.minimum <= layer.maximum for layer in plan.layers)


def test_mistakes_name_the_value_and_the_fix():
    config = tiny_config(text=DEEP)
    videos = [4 * [(2, 2)]]
    plan = plan_tokens(videos, config, "paper")
    for mistake, words_of_it in (
        (lambda: plan_tokens(videos, config, "tabel5"), "'tabel5'.* none, paper, table5"),
        (lambda: plan_tokens(videos, None, "paper"), "config=model.config"),
        (lambda: plan_tokens(videos, config, text_tokens=-1), "text_tokens=-1"),
        (lambda: plan_tokens(videos, config, text_tokens=True), "text_tokens=True"),
        (lambda: plan.count_flops(attention="half"), "'half'.* causal, full"),
        (lambda: exact_plan(plan, [30, 30]), r"\(2,\); expected \(6,\)"),
        (lambda: exact_plan(plan, torch.full((6, 2), 30)), r"\(6, 2\).*tokens_per_layer\[:, i\]"),
        (lambda: exact_plan(plan, 6 * [12]), "12 tokens, fewer than the 30"),
        (lambda: DecoderShape.from_config(AutoConfig.for_model("gpt2")), "'gpt2'.*intermediate_size"),
    ):
        with pytest.raises(ConfigurationError, match=words_of_it):
            mistake()
