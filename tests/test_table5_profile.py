"""benchmarks/table5_profile.py: every row is profiled at its smallest size, and time is found where it was spent."""

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch
from torch.autograd import DeviceType
from torch.utils.flop_counter import FlopCounterMode

from elva_hf import decoder_elva, embedding_elva

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
ROWS = (
    *("llava-all-logits", "llava", "llava-equal-tokens", "videollama3", "qwen2.5-vl"),
    *("gemma4-front-end", "gemma4-front-end-square", "gemma4", "elva", "elva+merge", "elva+merge+hybrid"),
)
COUNTED = ("front end: linear", "projections", "attention", "MLP", "lm_head")


@pytest.fixture(scope="module")
def scripts():
    """The modules of `benchmarks/`, imported as the scripts import each other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        import bar_chart
        import measuring
        import pipelines
        import profiling
        import table5_flops
        import table5_profile

        patch.setattr(measuring.gc, "collect", lambda: 0)  # takes most of the time in a process as full as this
        for module in (table5_profile, measuring):
            patch.setattr(module, "run_in_fresh_process", lambda function, *arguments: function(*arguments))
        yield SimpleNamespace(
            bars=bar_chart,
            measuring=measuring,
            pipelines=pipelines,
            profiling=profiling,
            flops=table5_flops,
            main=table5_profile,
        )


def run_script(scripts, folder, *options):
    """The script's exit status."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["table5_profile.py", "--size", "tiny", "--out", str(folder), *options])
        status = scripts.main.main()
    torch.set_num_threads(threads)
    return status


def read(folder):
    stem = folder / "table5-profile-cpu"
    return {"json": json.loads(stem.with_suffix(".json").read_text()), "text": stem.with_suffix(".md").read_text()}


@pytest.fixture(scope="module")
def folder(scripts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    assert run_script(scripts, folder, "--frames", "8") == 0
    return folder


@pytest.fixture
def setting(scripts):
    return scripts.main.Setting(
        size="tiny", device="cpu", dtype="bfloat16", attention="sdpa", threads=1, processes=1, merge_schedule="table5"
    )


def parts(row):
    return {part["part"]: part for part in row["parts"]}


# What one run gives.


def test_every_row_is_profiled_and_its_parts_are_the_whole(scripts, folder):
    facts = read(folder)["json"]
    assert facts["kind"] == "measured" and facts["finished"]
    assert [row["pipeline"] for row in facts["rows"]] == list(ROWS)
    for row in facts["rows"]:
        assert "failed" not in row, row
        assert sum(part["seconds"] for part in row["parts"]) == pytest.approx(row["seconds"])
        assert sum(part["share"] for part in row["parts"]) == pytest.approx(1)
        assert row["unprofiled"]["wall_seconds"] > 0
        assert all(part["seconds"] > 0 for part in row["parts"]), row


def test_what_is_counted_was_seen_to_run(scripts, folder, setting):
    """Modules with names that nobody expected would have their products elsewhere, and nothing where the floor is."""
    facts = read(folder)["json"]
    for row in facts["rows"]:
        by_part = parts(row)
        for part in COUNTED:
            assert by_part[part]["floor_seconds"] > 0
            assert by_part[part]["times_floor"] == pytest.approx(
                by_part[part]["seconds"] / by_part[part]["floor_seconds"]
            )
        pipeline = setting.pipelines()[row["pipeline"]]
        counted = scripts.flops.count_row(pipeline, 8, row["tokens_per_layer"]).total
        assert sum(part["flops"] or 0 for part in row["parts"]) == counted == row["flops"]
        assert row["times_floor"] == pytest.approx(row["seconds"] / row["floor_seconds"])
        tower = row["pipeline"].startswith(("llava", "video", "qwen"))
        assert bool(parts(row).get("front end: attention", {}).get("flops")) == tower
        assert ("merging" in by_part) == row["pipeline"].startswith("elva")
        assert "device waits" not in by_part


def test_tables_and_picture_are_made_from_the_numbers(scripts, folder):
    result = read(folder)
    assert scripts.main.as_markdown(result["json"]) == result["text"]
    assert (folder / "table5-profile-cpu.svg").read_text() == scripts.main.draw_parts(result["json"])
    assert "](table5-profile-cpu.svg)" in result["text"]
    changed = json.loads(json.dumps(result["json"]))
    changed["rows"][0]["parts"][0]["times_floor"] = 123.4
    assert "| 123.4 |" in scripts.main.as_markdown(changed)


def test_the_published_tables_are_made_from_the_published_numbers(scripts):
    for path in sorted(scripts.measuring.RESULTS.glob("table5-profile-*.json")):
        facts = json.loads(path.read_text())
        assert facts["kind"] == "measured" and facts["setting"]["size"] != "tiny"
        assert path.with_suffix(".md").read_text() == scripts.main.as_markdown(facts)
        assert path.with_suffix(".svg").read_text() == scripts.main.draw_parts(facts)


@pytest.mark.gpu
def test_the_same_script_runs_on_a_gpu(scripts, tmp_path):
    assert run_script(scripts, tmp_path, "--device", "cuda", "--frames", "4", "8") == 0
    facts = json.loads((tmp_path / "table5-profile-cuda.json").read_text())
    for row in facts["rows"]:
        assert parts(row)["device waits"]["seconds"] > 0
        assert parts(row)["MLP"]["seconds"] > 0
        assert parts(row)["other"]["share"] < 0.2, "kernels whose launch was not found count there"


# Where time is found.


def wait(seconds):
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def slower(function, seconds=0.2):
    def call(*arguments, **options):
        wait(seconds)
        return function(*arguments, **options)

    return call


@pytest.mark.parametrize(
    ("owner", "name", "part", "calls"),
    [
        (decoder_elva, "merge_step", "merging", 3),
        (decoder_elva, "read_columns", "merging", 1),
        (decoder_elva, "pack_tokens", "masks, packing, host", 1),
        (embedding_elva, "segment_softmax", "front end: rest", 2),
    ],
)
def test_a_planted_wait_is_found_in_its_part(scripts, setting, monkeypatch, owner, name, part, calls):
    monkeypatch.setattr(owner, name, slower(getattr(owner, name)))
    row = scripts.main.profile_row(setting, "elva+merge", 8)
    assert row["part_seconds"][part] >= 0.2 * calls
    assert row["seconds"] == pytest.approx(sum(row["part_seconds"].values()))


def test_a_wait_inside_a_module_is_that_modules(scripts, setting, monkeypatch):
    from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

    monkeypatch.setattr(Qwen2MLP, "forward", slower(Qwen2MLP.forward, 0.05))
    row = scripts.main.profile_row(setting, "llava", 4)
    assert row["part_seconds"]["MLP"] >= 8 * 0.05


def hooks_of(model):
    return [
        hook
        for module in model.modules()
        for hooks in (module._forward_hooks, module._forward_pre_hooks)
        for hook in hooks.values()
    ]


def test_nothing_is_left_of_the_ranges_even_after_an_error(scripts, setting):
    original = {name: getattr(owner, name) for owner, name, _ in scripts.profiling.FUNCTIONS}
    model = setting.pipelines()["elva"].build("cpu", torch.bfloat16, "sdpa")
    with pytest.raises(ZeroDivisionError), scripts.profiling.named_ranges(model):
        assert hooks_of(model) and decoder_elva.merge_step is not original["merge_step"]
        model.lm_head.forward = lambda *_: 1 / 0
        model.lm_head(torch.zeros(1))
    assert not hooks_of(model)
    assert {name: getattr(owner, name) for owner, name, _ in scripts.profiling.FUNCTIONS} == original


DECODER = [("", "ElvaForCausalLM"), ("model", "ElvaModel"), ("model.language_model.layers.3", "Qwen2DecoderLayer")]
SELF_ATTENTION = [*DECODER, ("model.language_model.layers.3.self_attn", "Qwen2Attention")]
TOWER = [("model", "LlavaNextVideoModel"), ("model.vision_tower.encoder.layers.0.self_attn", "CLIPAttention")]
PATCHES = [("model.patch_embed", "ElvaPatchEmbedding"), ("model.patch_embed.cross_attention", "ElvaCrossAttention")]


@pytest.mark.parametrize(
    ("ranges", "operation", "part"),
    [
        ([], "aten::to", "other"),
        ([("", "ElvaForCausalLM")], "aten::slice", "masks, packing, host"),
        ([("model", "LlavaNextVideoModel")], "aten::masked_scatter", "masks, packing, host"),
        ([*DECODER[:2], ("merging", "")], "aten::matmul", "merging"),
        ([*SELF_ATTENTION, ("attention", "")], "aten::mm", "attention"),
        (DECODER, "aten::add", "elementwise"),
        (DECODER, "", "masks, packing, host"),
        ([*DECODER, ("model.language_model.layers.3.input_layernorm", "Qwen2RMSNorm")], "aten::mul", "elementwise"),
        (SELF_ATTENTION, "aten::scaled_dot_product_attention", "attention"),
        (SELF_ATTENTION, "flash_attn::_flash_attn_varlen_forward", "attention"),
        (SELF_ATTENTION, "aten::cat", "elementwise"),
        (SELF_ATTENTION, "aten::linear", "projections"),
        (SELF_ATTENTION, "", "masks, packing, host"),
        (
            [*SELF_ATTENTION, ("model.language_model.layers.3.self_attn.q_proj", "Linear")],
            "aten::linear",
            "projections",
        ),
        ([*SELF_ATTENTION, ("model.language_model.layers.3.self_attn.q_norm", "RMSNorm")], "aten::mul", "elementwise"),
        ([*DECODER, ("model.language_model.layers.3.mlp.act_fn", "SiLUActivation")], "aten::silu", "MLP"),
        ([("model.language_model.rotary_emb", "Qwen2RotaryEmbedding")], "aten::cos", "elementwise"),
        ([("language.model.layers.1.mlp", "Qwen2MLP")], "", "MLP"),
        ([("language.model.embed_tokens", "Embedding")], "aten::embedding", "other"),
        ([("language", "Qwen2ForCausalLM"), ("language.lm_head", "Linear")], "aten::linear", "lm_head"),
        ([("model.language_model", "Gemma4UnifiedTextModel")], "aten::to", "masks, packing, host"),
        (TOWER, "aten::scaled_dot_product_attention", "front end: attention"),
        (TOWER, "aten::reshape", "front end: rest"),
        ([*TOWER, ("model.vision_tower.encoder.layers.0.mlp.fc1", "Linear")], "aten::linear", "front end: linear"),
        ([("model.vision_tower.embeddings.patch_embedding", "Conv2d")], "aten::conv2d", "front end: linear"),
        ([("model.visual.patch_embed.proj", "Conv3d")], "aten::conv3d", "front end: linear"),
        ([("model.visual.blocks.0.norm1", "Qwen2RMSNorm")], "aten::mul", "front end: rest"),
        ([("model.multi_modal_projector.linear_1", "Linear")], "aten::linear", "front end: linear"),
        ([("embed_vision.patch_dense", "Linear")], "aten::linear", "front end: linear"),
        (PATCHES, "aten::index_add", "front end: attention"),
        (PATCHES, "", "front end: rest"),
        ([*PATCHES, ("model.patch_embed.cross_attention.k_proj", "Linear")], "aten::linear", "front end: linear"),
    ],
)
def test_an_operation_belongs_to_the_part_of_its_innermost_range(scripts, ranges, operation, part):
    ranges = [scripts.profiling.Range(*names) for names in ranges]
    assert scripts.profiling.part_of(ranges, operation) == part
    assert part in scripts.profiling.PARTS


def event(name, start, end, *children, number=0, device=DeviceType.CPU, annotation=False):
    elapsed = end - start
    return SimpleNamespace(
        name=name,
        id=number,
        device_type=device,
        is_user_annotation=annotation,
        time_range=SimpleNamespace(start=start, end=end, elapsed_us=lambda: elapsed),
        cpu_time_total=elapsed,
        self_cpu_time_total=elapsed - sum(child.cpu_time_total for child in children),
        cpu_children=list(children),
    )


def flatten(top):
    return [top, *(below for child in top.cpu_children for below in flatten(child))]


MLP_RANGE = "elva module model.language_model.layers.0.mlp Qwen2MLP"


def test_own_time_is_shared_out_on_a_cpu(scripts):
    linear = event("aten::linear", 20, 50, event("aten::addmm", 25, 45))
    head = event("elva module lm_head Linear", 60, 90, event("aten::linear", 60, 90))
    layer = event("checkpoint", 91, 99, event("elva module model.language_model.layers.0 Qwen2DecoderLayer", 92, 98))
    root = event("elva profile", 0, 100, event("aten::to", 0, 4), event(MLP_RANGE, 10, 55, linear), head, layer)
    shares = scripts.profiling.share_out([event("aten::before", -9, -1), *flatten(root)], "cpu")
    assert shares == pytest.approx({"MLP": 45e-6, "lm_head": 30e-6, "masks, packing, host": 6e-6, "other": 19e-6})


def test_kernels_are_shared_out_on_a_gpu_and_the_rest_is_waiting(scripts):
    launch = event("cudaLaunchKernel", 26, 28, number=7)
    linear = event("aten::linear", 20, 50, event("aten::addmm", 25, 45, launch))
    merging = event("elva function merging", 60, 70)
    root = event("elva profile", 0, 1000, event(MLP_RANGE, 10, 55, linear), merging)
    triton = event("cuLaunchKernelEx", 65, 66, number=8)  # under no operation, so the profiler files it nowhere
    kernels = [
        event("gemm", 100, 400, number=7, device=DeviceType.CUDA),
        event("runs", 400, 500, number=8, device=DeviceType.CUDA),
        event("graph", 500, 510, number=9, device=DeviceType.CUDA),
        event("elva profile", 100, 510, number=5, device=DeviceType.CUDA, annotation=True),
    ]
    shares = scripts.profiling.share_out([*flatten(root), triton, *kernels], "cuda")
    assert shares == pytest.approx({"MLP": 300e-6, "merging": 100e-6, "other": 10e-6, "device waits": 590e-6})


@pytest.mark.parametrize("name", ["llava", "elva+merge"])
@torch.no_grad()
def test_the_flops_of_the_mlp_are_those_that_torch_counts(scripts, setting, name):
    pipeline = setting.pipelines()[name]
    model = pipeline.build("cpu", torch.bfloat16, "sdpa")
    with FlopCounterMode(display=False) as counter:
        pipeline.prefill(model, pipeline.inputs(4, 1, torch.bfloat16))
    counts = counter.get_flop_counts()
    mlps = [key for key in counts if "language_model.layers" in key and key.endswith(".mlp")]
    flops = scripts.main.part_flops(pipeline, 4, pipeline.layers(4))
    assert len(mlps) == 8 and flops["MLP"] == sum(sum(counts[key].values()) for key in mlps)


# The picture.


def test_every_part_has_a_colour_of_its_own(scripts):
    assert tuple(scripts.main.COLORS) == scripts.profiling.PARTS
    assert len(set(scripts.main.COLORS.values())) == len(scripts.profiling.PARTS)


def test_bars_are_as_long_as_their_pieces_and_marked_at_the_floor(scripts):
    bars = [scripts.bars.Bar("a <row>", {"one": 1.0, "two": 3.0}, 2.0), scripts.bars.Bar("b", {"two": 2.0})]
    svg = scripts.bars.draw_bars("title", "s", "floor", bars, {"one": (9, 9, 9), "two": (0, 0, 255), "none": (1, 1, 1)})
    tree = ElementTree.fromstring(svg)
    space = "{http://www.w3.org/2000/svg}"
    boxes = {box[0].text: box for box in tree.iter(f"{space}rect") if len(box)}
    widths = {title: float(box.get("width")) for title, box in boxes.items()}
    assert widths["a <row>, two: 3"] == pytest.approx(3 * widths["a <row>, one: 1"]) == pytest.approx(300)
    assert widths["b, two: 1"] == pytest.approx(400), "as shares every bar is as long as the panel"
    marks = [path for path in tree.iter(f"{space}path") if path.get("stroke-width") == "2"]
    assert len(marks) == 3, "one in each panel, one in the legend"
    assert {text.text for text in tree.iter(f"{space}text")} >= {"title", "a <row>", "one", "two", "floor"}
    assert "none" not in svg.replace("anchor", "")


# What goes wrong.


def test_a_row_that_fails_is_named_and_is_the_exit_status(scripts, tmp_path, monkeypatch):
    monkeypatch.setattr(scripts.pipelines.Elva, "prefill", lambda *_: 1 / 0)
    assert run_script(scripts, tmp_path, "--frames", "4", "--only", "elva") == 1
    result = read(tmp_path)
    assert "Not measured: `elva` (ZeroDivisionError: division by zero)." in result["text"]
    assert result["json"]["chart"] is None and not (tmp_path / "table5-profile-cpu.svg").exists()


def test_a_run_that_is_stopped_leaves_what_it_has(scripts, setting):
    first = next(scripts.main.measure(setting, ["elva", "llava"], [4]))
    assert [row["pipeline"] for row in first["rows"]] == ["elva"] and not first["finished"]
    assert "Unfinished: " in scripts.main.as_markdown({**first, "chart": None})


def test_an_unknown_row_is_refused(scripts, tmp_path):
    with pytest.raises(SystemExit, match="--only nobody: not known here; choose from llava-all-logits"):
        run_script(scripts, tmp_path, "--only", "nobody")
