"""Commands, recipes and training of both siblings as a user runs them: from a text model to an answer."""

import copy
import json
import shutil
import subprocess
import sys
from importlib import resources

import pytest
import torch
import yaml
from command_line import fails, rows, succeeds
from mavors_towers import tower
from safetensors.torch import load_file
from saved_elva import draw_frames, write_clip
from toy_runs import read_log, save_teacher
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor, Trainer, TrainingArguments

from elva_hf.data.collator import ElvaCollator
from elva_hf.data.toy_tokenizer import build_toy_tokenizer
from elva_hf.errors_elva import ConfigurationError
from elva_hf.siblings.mavors.rows_mavors import average_frames, header
from elva_hf.training.plan import plan_recipe
from elva_hf.training.preference import PairedCollator
from elva_hf.training.recipe import read_recipe

SYSTEMS = {"video-panda": "VideoPanda", "mavors": "Mavors"}
QUESTION = "What color is the square?"
FEW = [
    "training.max_steps=2",
    "training.use_cpu=true",
    "training.bf16=false",
    "training.batch_size=2",
    "training.per_device_train_batch_size=2",
    "training.logging_steps=1",
    "data.num_workers=0",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with what `elva init` makes of a tiny text model and a tiny tower, a clip, and rows about it."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("siblings")
    tokenizer = build_toy_tokenizer()
    torch.manual_seed(0)
    text = AutoConfig.for_model(
        "llama", vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(text).save_pretrained(root / "text")
    tokenizer.save_pretrained(root / "text")
    tower(torch.float32, image_size=24, patch_size=4).save_pretrained(root / "siglip")
    succeeds("init", root / "text", root / "mavors", "--architecture", "mavors", "--image-tower", root / "siglip")
    succeeds("init", root / "text", root / "video-panda", "--architecture", "video-panda")
    shrink(root / "video-panda")
    write_clip(root / "clip.mp4", draw_frames(1, num_frames=160))  # 20 seconds
    turns = [{"from": "human", "value": f"<video>\n{QUESTION}"}, {"from": "gpt", "value": "red"}]
    told = [{"id": str(i), "video": "clip.mp4", "conversations": turns} for i in range(2)]
    (root / "clips.json").write_text(json.dumps(told))
    return root


def shrink(folder):
    """The block at a width that takes no time; `elva init` gives it the paper's."""
    config = AutoConfig.from_pretrained(folder)
    config.stab_dim, config.patch_size, config.stab_patch_size = 32, 16, 8
    system = type(AutoModelForCausalLM.from_pretrained(folder))
    torch.manual_seed(0)
    model = system(config)
    model.generation_config = AutoModelForCausalLM.from_pretrained(folder).generation_config
    processor = AutoProcessor.from_pretrained(folder)
    processor.video_processor.patch_size = 16
    shutil.rmtree(folder)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    succeeds("export", folder)


def messages(folder, answer="red"):
    content = [{"type": "video", "video": str(folder / "clip.mp4")}, {"type": "text", "text": QUESTION}]
    return [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_checkpoint_answers_is_planned_and_is_checked_against_data(place, name):
    options = ("--model", place / name, "--device", "cpu", "--max-new-tokens", 2)
    assert succeeds("ask", place / "clip.mp4", QUESTION, "And now?", *options).count("\nanswer ") == 2
    planned = succeeds("plan", place / "clip.mp4", "--model", place / name, "--merge-schedule", "table5")
    counted = AutoProcessor.from_pretrained(place / name).count_tokens(videos=str(place / "clip.mp4"))
    assert rows(planned, "tokens")[0].startswith(f"{counted.num_visual_tokens}: ")
    assert "2 good, 0 bad" in succeeds("data", "check", place / "clips.json", "--model", place / name)


@pytest.mark.parametrize("source", ["clip.mp4", "picture.png"])
@pytest.mark.parametrize("name", SYSTEMS)
def test_show_draws_what_merged(place, tmp_path, monkeypatch, name, source):
    from PIL import Image

    from elva_hf.cli import showing

    drawn = []
    monkeypatch.setattr(showing, "write", lambda view, out: drawn.append(view))
    Image.fromarray(draw_frames(2, num_frames=1)[0]).save(place / "picture.png")
    schedule = '[{"layer": 1, "similarity_threshold": -0.999}]'
    options = ("--out", tmp_path / "merge.png", "--merge-schedule", schedule, "--model", place / name)
    succeeds("show", place / source, *options, "--device", "cpu")
    (view,) = drawn
    processor = AutoProcessor.from_pretrained(place / name)
    kind = "videos" if source == "clip.mp4" else "images"
    layout = processor.video_processor.layout
    counted = processor.count_tokens(**{kind: str(place / source)}).videos[0]
    grids = counted.grids[:: layout.chunk_size]
    side = processor.video_processor.patch_size
    assert [frame.shape[:2] for frame in view.frames] == [(side * rows, side * columns) for rows, columns in grids]
    assert view.num_patches == counted.num_patches and len(view.captions) == len(grids)
    moved = view.layer_tokens[0] - view.layer_tokens[-1]
    assert view.num_patches - view.num_kept == moved
    if source == "clip.mp4":  # everything may merge: the last picture has all tokens
        assert view.num_kept == view.fates[-1].kept.size and view.longest == len(grids) > 1
        assert view.captions == [f"{time:.2f} s" for time in counted.times[:: layout.chunk_size]]
    plain = draw_frames(1, num_frames=160) if source == "clip.mp4" else draw_frames(2, num_frames=1)
    assert abs(float(plain.mean()) - sum(float(frame.mean()) for frame in view.frames) / len(grids)) < 12


def test_show_draws_what_mavors_merged_before_its_decoder(place, tmp_path, monkeypatch):
    from elva_hf.cli import showing

    drawn = []
    monkeypatch.setattr(showing, "write", lambda view, out: drawn.append(view))
    folder = shutil.copytree(place / "mavors", tmp_path / "mavors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "chunk_similarity_threshold": -0.999}))
    options = ("--out", tmp_path / "merge.png", "--model", folder, "--device", "cpu")
    ratio = ("--merge-schedule", '{"steps": [{"layer": 2, "target_ratio": 0.5}], "survivor": "first"}')
    alone = succeeds("show", place / "clip.mp4", *options)
    both = succeeds("show", place / "clip.mp4", *options, *ratio, "--step", 0)
    last = succeeds("show", place / "clip.mp4", *options, *ratio)
    first, again, decoder = drawn
    for view in drawn:  # everything may merge: the first chunk has all tokens, and the schedule finds nothing left
        assert view.num_kept == view.fates[0].kept.size == view.num_patches - view.merged_before > 0
        assert view.longest == len(view.fates) > 1
        assert all((fates.shifts == -number).all() for number, fates in enumerate(view.fates))
    assert first.layer == again.layer == 0 and decoder.layer == 2 and first.steps == {0: "similarity > -0.999"}
    before, after = first.input_tokens, first.layer_tokens[0]
    assert before - after == first.merged_before and first.layer_tokens == [after] * 6
    step = f"0    before layer 0, similarity > -0.999: {before} -> {after} tokens"
    assert rows(alone, "step") == [step]
    assert rows(both, "step") == rows(last, "step") == [step, f"1    at layer 2, keep 50 %: {after} -> {after} tokens"]
    assert rows(alone, "shown")[0].endswith(" after the merge before the decoder")
    assert "--step 1: this model and its merge schedule have steps 0 to 0" in fails(
        "show", place / "clip.mp4", *options, "--step", 1
    )


def test_the_pixels_of_a_chunk_are_the_mean_of_its_frames():
    pixels = torch.arange(12.0).view(4, 3)
    numbers = [0, 1, 2, 0]  # a token of three frames, and one of one
    rows = torch.cat([pixels, torch.tensor([header(number, 0) for number in numbers])], 1)
    assert average_frames(rows).tolist() == [[3, 4, 5], [9, 10, 11]]


@pytest.mark.parametrize("name", SYSTEMS)
def test_lora_by_its_recipe_is_trained_and_asked(place, name):
    out = place / "runs" / name
    changes = [f"model.path={place / name}", f"data.sources.clips.path={place / 'clips.json'}", f"output_dir={out}"]
    succeeds("train", "lora", *changes, *FEW, "training.learning_rate=1.0e-2")
    assert read_log(out)[-1]["step"] == 2
    adapter, start = (
        load_file(file) for file in (out / "model" / "adapter_model.safetensors", place / name / "model.safetensors")
    )
    own = {key.removeprefix("base_model.model."): weight for key, weight in adapter.items() if "patch_embed" in key}
    assert own and any(not torch.equal(weight, start[key]) for key, weight in own.items())
    assert any(weight.any() for key, weight in adapter.items() if "lora_B" in key)
    assert "\nanswer " in succeeds("ask", place / "clip.mp4", QUESTION, "--model", out / "model", "--device", "cpu")


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")  # read by PEFT
@pytest.mark.parametrize("name", SYSTEMS)
def test_trainer_learns_with_lora_and_the_same_with_gradient_checkpointing(place, tmp_path, name):
    from peft import PeftModel, get_peft_model

    from elva_hf.training.lora import lora_config

    model, processor = (auto.from_pretrained(place / name) for auto in (AutoModelForCausalLM, AutoProcessor))
    told = [{"messages": messages(place, answer)} for answer in ("red", "no")]
    losses = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        adapted = get_peft_model(copy.deepcopy(model), lora_config(r=4))
        arguments = TrainingArguments(
            str(tmp_path / str(checkpointing)), max_steps=4, learning_rate=1e-2, use_cpu=True, report_to="none",
            remove_unused_columns=False, per_device_train_batch_size=2, logging_steps=1, save_steps=4,
            activation_checkpointing=checkpointing, disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(adapted, arguments, train_dataset=told, data_collator=ElvaCollator(processor))
        trainer.train()
        losses.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)
    assert losses[0][-1] < losses[0][0]
    again = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "True" / "checkpoint-4").eval()
    batch = ElvaCollator(processor)(told)
    with torch.no_grad():
        expected, before = adapted.eval()(**batch).logits, model.eval()(**batch).logits
        torch.testing.assert_close(again(**batch).logits, expected)
    assert not torch.allclose(before, expected)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # TRL's own arguments
def test_trls_own_trainer_learns_preferences_about_a_video(place, tmp_path):
    import datasets

    trl = pytest.importorskip("trl")
    model, processor = (auto.from_pretrained(place / "mavors") for auto in (AutoModelForCausalLM, AutoProcessor))
    pair = [*messages(place), {"role": "user", "content": QUESTION}, {"role": "assistant", "content": "no"}]
    pairs = [{"id": str(i), "independent_turns": True, "messages": pair} for i in range(2)]
    collate = PairedCollator(processor, num_frames=6)
    text = {"prompt": ["a", "a"], "chosen": ["b", "b"], "rejected": ["c", "c"]}  # it wants a dataset it can tokenise
    trainer = trl.DPOTrainer(
        model=model,
        args=trl.DPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", bf16=False, max_steps=4,
                           learning_rate=1e-2, logging_steps=1, per_device_train_batch_size=2, save_strategy="no",
                           remove_unused_columns=False, gradient_checkpointing=False, disable_tqdm=True),
        train_dataset=datasets.Dataset.from_dict(text),
        data_collator=lambda _: collate(pairs),
        processing_class=processor.tokenizer,
    )  # fmt: skip
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3) and losses[-1] < losses[0] - 0.05


def test_every_head_loads_in_a_process_that_did_not_import_the_package(place):
    heads = ("Config", "Model", "ModelForCausalLM", "ModelForImageTextToText", "ModelForMultimodalLM", "Processor")
    code = f"""
import transformers
for name in {list(SYSTEMS)}:
    for head in {heads}:
        auto = getattr(transformers, f"Auto{{head}}")
        print(type(auto.from_pretrained({str(place)!r} + "/" + name, trust_remote_code=True)))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    ends = ("Config", "Model", *3 * ["ForCausalLM"], "Processor")
    expected = [(name, end) for name in SYSTEMS for end in ends]
    for line, (name, end) in zip(result.stdout.splitlines(), expected, strict=True):
        assert f"elva_hf.siblings.{name.replace('-', '_')}." in line and line.endswith(f".{SYSTEMS[name]}{end}'>")


@pytest.mark.parametrize("name", ["video_panda_tiny", "mavors_tiny"])
def test_the_toy_recipe_trains_and_its_checkpoint_answers(place, tmp_path, name):
    recipe = yaml.safe_load((resources.files("elva_hf.training.recipes") / f"{name}.yaml").read_text())
    for stage in recipe["stages"]:
        stage.update(max_steps=2, batch_size=2, warmup_steps=1)
    recipe["questions_per_video"] = 2
    recipe["text_config"]["num_hidden_layers"] = 2
    (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    succeeds("train", tmp_path / f"{name}.yaml", "--out", tmp_path / "run")
    weights = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert any("patch_embed" in key for key in weights)
    options = ("--model", tmp_path / "run" / "model", "--device", "cpu")
    assert "\nanswer " in succeeds("ask", place / "clip.mp4", QUESTION, *options)


# Plans and refusals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "changes", "tokens"),
    [
        ("mavors_stage1", [], 32 * 196 + 2),
        ("mavors_stage2", ["video.max_chunks=60"], 11_760 + 2),
        ("mavors_stage1", ["video.fps=null", "video.num_frames=40"], 3 * 196 + 2),
        ("video_panda", [], 2184 + 2),
    ],
)
def test_the_plan_counts_the_longest_video(recipe, changes, tokens):
    plan = plan_recipe(read_recipe(recipe, changes), 416 if recipe.startswith("mavors") else 1)[0]
    assert plan.tokens == tokens


def test_the_plan_of_preferences_counts_the_reference():
    """A copy of the model; with LoRA there is none."""

    def plan(*changes):
        (found,) = plan_recipe(read_recipe("mavors_dpo", changes))
        return found.bytes_by_strategy["one GPU"], sum(found.trained.values()) + found.frozen

    (preferring, parameters), (without, _) = plan(), plan("preference=null")
    assert preferring - without == 4 * parameters
    assert plan("lora={}") == plan("lora={}", "preference=null")


def test_a_teacher_of_frames_is_refused_for_a_model_of_chunks(place, tmp_path):
    save_teacher(tmp_path / "teacher")
    guided = [f"guidance={{teacher: {tmp_path / 'teacher'}, frame_weight: 0.0}}"]
    with pytest.raises(ConfigurationError, match="stands for 16 of them"):
        plan_recipe(read_recipe("mavors_stage2", guided))
    data = ["--data", place / "clips.json", "--model", place / "mavors", "--teacher", tmp_path / "teacher"]
    assert "stands for 16 of them" in fails("teach", *data, "--out", tmp_path / "cache")
    from elva_hf.training.guidance import GuidanceHook
    from elva_hf.training.teacher import VisualTeacher

    model = AutoModelForCausalLM.from_pretrained(place / "mavors")
    teacher = VisualTeacher.from_pretrained(str(tmp_path / "teacher"))
    model.set_guidance({"teacher_width": teacher.spec.width, "frame_weight": 0.0})
    with pytest.raises(ConfigurationError, match="without guidance"):
        GuidanceHook(teacher).attach(model)
