import itertools

import pytest
import yaml

from elva_hf.errors_elva import ConfigurationError
from elva_hf.training.building import read_config
from elva_hf.training.plan import plan_recipe
from elva_hf.training.recipe import find_recipe, list_recipes, read_recipe

MILLION = 1_000_000

# Table 7 of the paper; data scale and frames of stage 2 as recipe heads say: appendix Table 1, section 4, Table 8.
TABLE7 = {
    "stage1_spatial": {"scale": 4 * MILLION, "batch": 256, "frames": 1, "merge": False, "lr": 4e-5, "warmup": 0.03},
    "stage2_spatiotemporal": {
        "scale": 3 * MILLION,
        "batch": 256,
        "frames": 16,
        "merge": False,
        "lr": 4e-5,
        "warmup": 0.01,
    },
    "stage3_sft": {"scale": 843_000, "batch": 128, "frames": 32, "merge": True, "lr": 2e-5, "warmup": 0.01},
    "stage3_sft_hd": {
        "scale": 843_000 + 3 * MILLION,
        "batch": 256,
        "frames": 32,
        "merge": True,
        "lr": 2e-5,
        "warmup": 0.01,
    },
}
EPOCHS = {"stage1_spatial": 1, "stage2_spatiotemporal": 2, "stage3_sft": 1, "stage3_sft_hd": 1}
LONGEST_EDGE = {"stage1_spatial": 448, "stage2_spatiotemporal": 448, "stage3_sft": 672, "stage3_sft_hd": 1344}
TABLE8 = {
    "stage1_spatial": {"cc3m_coco": 3 * MILLION, "densefusion": MILLION},
    "stage2_spatiotemporal": {"webvid": 2 * MILLION, "valor": MILLION},
    "stage3_sft": {"llava_665k": 665_000, "llava_video_178k": 178_000},
    "stage3_sft_hd": {"llava_665k": 665_000, "llava_video_178k": 178_000, "llava_onevision": 3 * MILLION},
}
MINIMAL = {
    "model": {"preset": "tiny"},
    "data": {"sources": {"toy": {"format": "toy_world", "options": {"num_videos": 8}}}},
    "training": {"batch_size": 8, "per_device_train_batch_size": 2, "learning_rate": 1.0e-3},
}


def write(folder, **changes):
    values = {name: changes.get(name, section) for name, section in {**MINIMAL, **changes}.items()}
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump({name: value for name, value in values.items() if value != "absent"}))
    return str(path)


def only(recipe, *overrides):
    (stage,) = read_recipe(recipe, overrides).stages
    return stage


@pytest.mark.parametrize("name", TABLE7)
def test_a_stage_of_the_paper_has_the_values_of_table_7(name):
    stage, row = only(name), TABLE7[name]
    training = stage.training
    assert training.batch_size == row["batch"]
    assert stage.video.num_frames == row["frames"]
    assert bool(read_config(stage.model).resolve_merge_schedule()) == row["merge"]
    assert training.learning_rate == row["lr"]
    assert training.warmup_ratio == row["warmup"]
    assert training.num_train_epochs == EPOCHS[name]
    assert training.lr_scheduler_type == "cosine"
    assert training.weight_decay == 0
    assert training.optim is None  # AdamW
    assert stage.trainable == "all"
    assert sum(source.num_samples for source in stage.data.sources.values()) == row["scale"]


@pytest.mark.parametrize("name", TABLE7)
def test_a_stage_of_the_paper_has_the_losses_edges_and_sources_of_the_text(name):
    stage = only(name)
    assert stage.video.longest_edge == LONGEST_EDGE[name]
    assert {key: source.num_samples for key, source in stage.data.sources.items()} == TABLE8[name]
    if name.startswith("stage3"):
        assert stage.guidance is None
        steps = read_config(stage.model).resolve_merge_schedule().steps
        assert {step.similarity_threshold for step in steps} == {0.6, None}  # section 3.1
        assert {step.target_ratio for step in steps} == {None, 0.5}
        assert all(a.layer < b.layer for a, b in itertools.pairwise(steps))
    else:
        assert (stage.guidance.tube_weight, stage.guidance.frame_weight) == (1, 1)  # Eq. 4
        assert stage.guidance.teacher == "google/siglip-so400m-patch14-384"
        assert stage.guidance.layer == -2  # penultimate


def test_the_ablation_is_a_million_of_the_seven_without_the_contrastive_loss():
    recipe = read_recipe("ablation")
    assert [stage.name for stage in recipe.stages] == ["spatial", "spatiotemporal"]
    subset = [source.max_samples for stage in recipe.stages for source in stage.data.sources.values()]
    whole = [source.num_samples for stage in recipe.stages for source in stage.data.sources.values()]
    assert (sum(subset), sum(whole)) == (MILLION, 7 * MILLION)
    assert all(abs(part - all_of_it / 7) < 1 for part, all_of_it in zip(subset, whole, strict=True))
    for stage, like in zip(recipe.stages, ("stage1_spatial", "stage2_spatiotemporal"), strict=True):
        assert (stage.guidance.tube_weight, stage.guidance.frame_weight) == (1, 0)
        assert stage.training == only(like).training
        assert stage.video == only(like).video


@pytest.mark.parametrize("name", ["stage1_spatial", "stage2_spatiotemporal", "stage3_sft", "ablation"])
def test_a_size_swaps_the_model_and_the_folder_and_nothing_that_is_learnt(name):
    small, large = read_recipe(name, ["size=1.5b"]), read_recipe(name, ["size=7b"])
    assert read_recipe(name) == large
    assert small.output_dir.removesuffix("1.5b") == large.output_dir.removesuffix("7b")
    for one, other in zip(small.stages, large.stages, strict=True):
        assert one.training == other.training
        assert one.data == other.data
        assert one.guidance == other.guidance
        assert read_config(one.model).text_config.hidden_size == 1536
        assert read_config(other.model).text_config.hidden_size == 3584


def test_stages_of_the_paper_lead_into_each_other():
    for size in ("1.5b", "7b"):
        first, second, third = (
            read_recipe(name, [f"size={size}"]) for name in ("stage1_spatial", "stage2_spatiotemporal", "stage3_sft")
        )
        assert first.stages[0].model.text_model == f"Qwen/Qwen2-{size.upper()}"
        assert second.stages[0].model.path == f"{first.output_dir}/model"
        assert third.stages[0].model.path == f"{second.output_dir}/model"


@pytest.mark.parametrize("name", list_recipes())
def test_every_recipe_says_in_its_head_how_it_is_run_and_what_was(name):
    head = find_recipe(name).read_text().split("\n\n")[0]
    lines = [line for line in head.splitlines() if line.startswith("#")]
    for word in ("command:", "hardware:", "time:", "expect:"):
        assert any(line.startswith(f"# {word}") for line in lines), word


@pytest.mark.parametrize("name", [*TABLE7, "ablation"])
def test_a_recipe_plans_on_the_paper_s_32_gpus_and_names_what_is_to_be_filled_in(name):
    for plan in plan_recipe(read_recipe(name), 32):
        text = "\n".join(plan.lines())
        assert plan.accumulation_steps * 32 * plan.stage.training.per_device_train_batch_size in (128, 256)
        assert plan.stage.missing() == [f"data.sources.{key}.path" for key in plan.stage.data.sources]
        assert text.count("missing   data.sources.") == len(plan.stage.data.sources)
        assert plan.frozen == 0


def test_tokens_of_a_step_are_those_of_the_ledger():
    (plan,) = plan_recipe(read_recipe("stage3_sft"), 32)
    assert plan.tokens == 32 * 601 + 2
    (plan,) = plan_recipe(read_recipe("stage2_spatiotemporal"), 32)
    assert plan.tokens == 16 * 273 + 2


def test_frames_by_the_second_have_no_most(tmp_path):
    """The model's own number of frames says nothing then, and neither does the length of a video."""
    frames = ["video.longest_edge=32", "video.low_res_longest_edge=32"]
    (counted,) = plan_recipe(read_recipe(write(tmp_path), [*frames, "video.num_frames=3"]))
    (timed,) = plan_recipe(read_recipe(write(tmp_path), [*frames, "video.fps=2.5"]))
    (faster,) = plan_recipe(read_recipe(write(tmp_path), [*frames, "video.fps=5"]))
    each, positions = (counted.tokens - 2) // 3, timed.config.text_config.max_position_embeddings
    lines = list(timed.lines())
    assert timed.tokens is None and "at most" not in "\n".join(lines)
    assert f"tokens    {2.5 * each:g} for each second of a video (2.5 square frames of {each}), no most" in lines
    assert any(f"with videos that fill the model's {positions} positions: one GPU" in line for line in lines)
    most = (positions - 256) // each
    (filled,) = plan_recipe(read_recipe(write(tmp_path), [*frames, f"video.num_frames={most}"]))
    assert timed.bytes_by_strategy == faster.bytes_by_strategy == filled.bytes_by_strategy != counted.bytes_by_strategy


def test_parameters_are_counted_by_part_and_freezing_is_data(tmp_path):
    whole = plan_recipe(read_recipe(write(tmp_path)))[0]
    front = plan_recipe(read_recipe(write(tmp_path), ["trainable=[patch_embed]"]))[0]
    assert set(front.trained) == {"patch_embed"}
    assert front.trained["patch_embed"] == whole.trained["patch_embed"]
    assert front.frozen == sum(whole.trained.values()) - whole.trained["patch_embed"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"training": {**MINIMAL["training"], "learning_rate": "4e-5"}}, "training.learning_rate='4e-5'.*write 4.0e-5"),
        ({"training": {**MINIMAL["training"], "max_step": 3}}, "training.max_step is no field; did you mean max_steps"),
        ({"training": {"batch_size": 8, "learning_rate": 1.0}}, "training.per_device_train_batch_size is missing"),
        ({"training": {**MINIMAL["training"], "max_steps": 1.5}}, "training.max_steps=1.5: expected a whole number"),
        ({"training": {**MINIMAL["training"], "bf16": 1}}, "training.bf16=1: expected true or false"),
        ({"training": {**MINIMAL["training"], "seed": True}}, "training.seed=True: expected a whole number"),
        ({"training": {**MINIMAL["training"], "learning_rate": 0.0}}, "learning_rate=0.0: expected more than 0"),
        ({"training": {**MINIMAL["training"], "learning_rate": float("nan")}}, "learning_rate=nan: expected a number"),
        ({"training": {**MINIMAL["training"], "warmup_ratio": 3.0}}, "warmup_ratio=3.0"),
        ({"video": {"num_frames": "sixteen"}}, "video.num_frames='sixteen'"),
        ({"model": {"preset": "tiny", "path": "x"}}, "model.path and model.preset are given"),
        ({"model": {"preset": "tiny", "dtype": "float8"}}, "model.dtype='float8': expected 'float32' or"),
        ({"guidance": {"teacher": "x", "tube_weight": 0.0, "frame_weight": 0.0}}, "are both 0"),
        ({"data": {"sources": {"a": {"paht": "x"}}}}, "data.sources.a.paht is no field; did you mean path"),
        ({"data": {"sources": {}, "packing": "tight"}}, "data.packing='tight': expected 'none' or 'shared_prefix'"),
        ({"data": "absent"}, "data is missing; write a section with sources"),
        ({"data": None}, "data=None: expected a section"),
        ({"trainable": ["eyes"]}, r"trainable=\['eyes'\]: expected all, or a list of patch_embed"),
        ({"trainable": ["lm_head"], "lora": {}}, "trainable and lora are both given"),
        ({"lora": {"r": 0}}, "lora: lora.r=0"),
        ({"video": {"num_frames": 4, "fps": 2.0}}, "video: num_frames and fps are given; keep one way"),
        ({"losses": 1}, "losses is no field"),
        ({"stages": [{"name": "a"}, {"name": "a"}]}, "stages are named"),
        ({"variants": {"small": {}}, "size": "large"}, "size='large': expected one of small"),
    ],
)
def test_a_wrong_field_is_refused_with_file_and_dotted_name(tmp_path, changes, words):
    with pytest.raises(ConfigurationError, match=words) as caught:
        read_recipe(write(tmp_path, **changes))
    assert str(caught.value).startswith("mine.yaml: ")
    assert "\n" not in str(caught.value)


def test_a_field_that_stands_twice_is_refused(tmp_path):
    path = tmp_path / "twice.yaml"
    path.write_text(find_recipe("stage1_spatial").read_text() + "  seed: 1\n")
    with pytest.raises(ConfigurationError, match="'seed' stands twice"):
        read_recipe(str(path))


def test_an_unknown_recipe_is_told_the_known_ones():
    with pytest.raises(ConfigurationError, match=r"neither a file nor one of .*stage1_spatial"):
        read_recipe("stage4")


@pytest.mark.parametrize(
    ("override", "field", "value"),
    [
        ("training.learning_rate=4e-5", lambda stage: stage.training.learning_rate, 4e-5),
        ("training.max_steps=7", lambda stage: stage.training.max_steps, 7),
        ("training.bf16=False", lambda stage: stage.training.bf16, False),
        ("training.save_total_limit=null", lambda stage: stage.training.save_total_limit, None),
        ("model.merge_schedule=table5", lambda stage: stage.model.merge_schedule, "table5"),
        (
            "model.merge_schedule=[{layer: 1, target_ratio: 0.5}]",
            lambda stage: stage.model.merge_schedule[0]["layer"],
            1,
        ),
        ("model.path=runs/7", lambda stage: (stage.model.path, stage.model.preset), ("runs/7", None)),
        ("data.sources.toy.weight=2", lambda stage: stage.data.sources["toy"].weight, 2.0),
        ("data.sources.toy.options.num_videos=3", lambda stage: stage.data.sources["toy"].options["num_videos"], 3),
        ("data.sources.webvid.path=/data/1=2.json", lambda stage: stage.data.sources["webvid"].path, "/data/1=2.json"),
        ("data.sources={one: {path: a}}", lambda stage: [*stage.data.sources], ["one"]),
        ("guidance.teacher=me/siglip", lambda stage: stage.guidance.teacher, "me/siglip"),
        ("trainable=[patch_embed, guidance]", lambda stage: stage.trainable, ["patch_embed", "guidance"]),
        ("lora.r=8", lambda stage: stage.lora.r, 8),
    ],
)
def test_an_override_has_the_type_of_its_field(tmp_path, override, field, value):
    found = field(only(write(tmp_path), override))
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.max_steps=ten", "training.max_steps='ten': expected a whole number"),
        ("training.lr=1", "training.lr is no field"),
        ("training.seed.x=1", "training.seed.x is no field; training.seed has none of its own"),
        ("max_steps", "expected key=value"),
        ("size=7b", "one size only"),
        ("resume=sometimes", "resume='sometimes'"),
        ("stages.other.training.seed=1", r"stages.other.training.seed: expected stages.mine.FIELD"),
    ],
)
def test_a_wrong_override_is_refused(tmp_path, override, words):
    with pytest.raises(ConfigurationError, match=words):
        read_recipe(write(tmp_path), [override])


def test_an_override_reaches_every_stage_or_the_one_it_names(tmp_path):
    path = write(tmp_path, stages=[{"name": "a"}, {"name": "b", "training": {"learning_rate": 2.0e-3}}])
    overrides = ["training.max_steps=3", "stages.b.training.seed=5", "output_dir=elsewhere"]
    recipe = read_recipe(path, overrides)
    assert [stage.training.max_steps for stage in recipe.stages] == [3, 3]
    assert [stage.training.seed for stage in recipe.stages] == [0, 5]
    assert [stage.training.learning_rate for stage in recipe.stages] == [1e-3, 2e-3]
    assert [str(recipe.stage_dir(stage.name)) for stage in recipe.stages] == ["elsewhere/a", "elsewhere"]


@pytest.mark.parametrize(("processes", "accumulation"), [(1, 4), (2, 2), (4, 1)])
def test_accumulation_makes_the_global_batch(tmp_path, processes, accumulation):
    assert only(write(tmp_path)).accumulation_steps(processes) == accumulation


@pytest.mark.parametrize("processes", [3, 8])
def test_a_batch_that_does_not_divide_is_refused(tmp_path, processes):
    with pytest.raises(ConfigurationError, match=r"batch_size=8 is no multiple of . processes x .*=2 = "):
        only(write(tmp_path)).accumulation_steps(processes)
