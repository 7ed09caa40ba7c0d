"""The command line: frozen names, answers, tables, and one line for each mistake."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from command_line import fails, rows, run, succeeds
from PIL import Image
from saved_elva import QUESTION, draw_frames, save_checkpoint, write_clip, write_sound
from transformers import AutoModelForCausalLM, AutoProcessor, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers import pipeline as build_pipeline
from typer.main import get_command

import elva_hf
from elva_hf import sampled_elva, video_processing_elva
from elva_hf.cli import app, loading
from elva_hf.data.toy_tokenizer import build_toy_tokenizer
from elva_hf.data.toy_world import TASKS
from elva_hf.evaluation import toy_world
from elva_hf.evaluation.toy_world import HELD_OUT_TASKS, read_scores
from elva_hf.training import precision
from elva_hf.training.lora import LoraOptions, add_lora
from elva_hf.training.toy import build_model, build_processor, save
from elva_hf.training.toy_recipe import read_recipe

FRAME_OPTIONS = {
    *("--frames", "--high", "--low", "--fps", "--at", "--start", "--end", "--scenes", "--timestamps"),
    *("--longest-edge", "--low-res-longest-edge", "--max-visual-tokens", "--max-memory", "--fit"),
    *("--allow-urls", "--isolate"),
}
OPTIONS = {
    "ask": {"--model", "--max-new-tokens", "--merge-schedule", "--device", "--stream", *FRAME_OPTIONS},
    "plan": {"--model", "--preset", "--merge-schedule", "--json", *FRAME_OPTIONS},
    "show": {"--out", "--model", "--question", "--merge-schedule", "--step", "--device", *FRAME_OPTIONS},
    "init": {"--architecture", "--image-tower"},
    "export": set(),
    "train": {"--out", "--dry-run", "--processes", "--list"},
    "demo": set(),
    "doctor": set(),
    "eval": {"--model", "--questions", "--split", "--batch-size", "--out"},
}


def test_commands_and_options_are_a_promise():
    commands = get_command(app).commands
    for name, expected in OPTIONS.items():
        options = {
            option for parameter in commands[name].params for option in parameter.opts if option.startswith("--")
        }
        assert options - {"--help"} == expected, name
    assert set(commands) >= set(OPTIONS)


@pytest.mark.parametrize("command", [[], *([name] for name in OPTIONS)])
def test_help_reads_well(command):
    text = succeeds(*command, "--help")
    assert "Usage: elva" in text
    repeated = r"\{QUESTION\}\.\.\.|COMMAND \[ARGS\]\.\.\.|\[KEY=VALUE\]\.\.\."
    assert "..." not in re.sub(repeated, "", text)  # nothing is cut short
    assert all(len(line) <= 80 for line in text.splitlines())


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT asks
def test_an_adapter_answers_as_its_model_does(folder, clip, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder)
    adapted = add_lora(model, LoraOptions(r=2, lora_alpha=4))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    adapted.save_pretrained(tmp_path / "adapter")
    AutoProcessor.from_pretrained(folder).save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    AutoProcessor.from_pretrained(folder).save_pretrained(tmp_path / "merged")
    options = ("--max-new-tokens", 6, "--device", "cpu")
    answers = [
        rows(succeeds("ask", clip, QUESTION, "--model", tmp_path / name, *options), "answer")
        for name in ("adapter", "merged")
    ]
    assert answers[0] == answers[1] != rows(succeeds("ask", clip, QUESTION, "--model", folder, *options), "answer")


def test_ask_answers_as_the_pipeline_does(folder, clip):
    text = succeeds("ask", clip, QUESTION, "Which?", "--model", folder, "--max-new-tokens", 6, "--device", "cpu")
    pipe = build_pipeline("video-text-to-text", model=str(folder), device="cpu", max_new_tokens=6)
    for question in (QUESTION, "Which?"):
        answer = pipe(clip, question)[0]["generated_text"]
        assert f"question  {question}\nanswer    {answer}\n" in text
        prompt = pipe.preprocess({"video": clip, "text": question})["input_ids"].shape[1]
        assert f"tokens    168 visual, {prompt} in the prompt, 6 in the answer" in text
    assert text.count("decoded in") == 1
    for line in rows(text, "time"):
        assert re.fullmatch(r"first token \d+\.\d\d s, total \d+\.\d\d s", line)


def test_ask_streams_the_same_answer(folder, clip):
    options = ("--model", folder, "--max-new-tokens", 6, "--device", "cpu")
    whole, streamed = (rows(succeeds("ask", clip, QUESTION, *options, *more), "answer") for more in ((), ("--stream",)))
    assert whole == streamed != []


def test_ask_takes_frame_options_and_images(folder, clip, tmp_path):
    options = ("--model", folder, "--max-new-tokens", 2, "--device", "cpu")
    assert "84 visual" in succeeds("ask", clip, QUESTION, *options, "--frames", 4)
    assert "35 visual" in succeeds("ask", clip, QUESTION, *options, "--high", 1, "--low", 2)
    Image.fromarray(draw_frames(1)[0]).save(tmp_path / "picture.png")
    assert "21 visual" in succeeds("ask", tmp_path / "picture.png", QUESTION, *options)


def test_the_shipped_checkpoint_is_the_default(folder, clip, monkeypatch):
    monkeypatch.setattr(elva_hf, "tiny_checkpoint", lambda: folder)
    assert rows(succeeds("ask", clip, QUESTION, "--max-new-tokens", 1), "model")[0].startswith(f"{folder} on ")
    assert "168" in rows(succeeds("plan", clip), "tokens")[0]


def test_plan_shows_frames_grids_and_tokens(tmp_path):
    clip = write_clip(tmp_path / "wide.mp4", draw_frames(2, num_frames=40, height=360, width=640), rate=20)
    text = succeeds("plan", clip, "--preset", "elva-7b", "--high", 2, "--low", 6)
    table = [line.split() for line in text.splitlines() if re.match(r" +\d+ ", line)]
    assert len(table) == 8
    assert [row[3] for row in table].count("high") == 2
    assert [int(row[-1]) for row in table] == [92, 92, 313, 92, 92, 92, 313, 92]
    assert table[0][:3] == ["2", "0.100", "s"]
    assert "640x360, 40 frames, 2.00 s, 20 frames/s, h264" in text
    assert rows(text, "tokens") == ["1178: 1102 patches, 76 <FRAME> and <LINE>"]
    assert rows(text, "context") == ["131072 positions of elva-7b, 129892 left for text"]


def test_plan_says_when_a_video_is_too_short_or_too_long(folder, clip, tmp_path):
    text = succeeds("plan", clip, "--model", folder, "--frames", 20)
    assert rows(text, "frames") == ["8, 8 high and 0 low (20 asked for; the source has no more)"]
    long = write_clip(tmp_path / "long.mp4", np.zeros((120, 64, 64, 3), np.uint8))
    text = succeeds("plan", long, "--model", folder, "--frames", 120)
    assert rows(text, "context") == [f"2048 positions of {folder}, 474 too many: take fewer or smaller frames"]


def test_plan_and_ask_agree(folder, clip):
    planned = rows(succeeds("plan", clip, "--model", folder, "--frames", 5), "tokens")[0].split(":")[0]
    asked = succeeds("ask", clip, QUESTION, "--model", folder, "--frames", 5, "--max-new-tokens", 1, "--device", "cpu")
    assert f"{planned} visual" in asked


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A text model whose tokenizer knows neither ChatML nor visual tokens."""
    path = tmp_path_factory.mktemp("llama")
    backend = build_toy_tokenizer().backend_tokenizer.to_str()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=_without_added_tokens(backend), eos_token="zz")
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=4096, eos_token_id=3, **size)
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def _without_added_tokens(backend):
    import json

    from tokenizers import Tokenizer

    fields = json.loads(backend)
    return Tokenizer.from_str(json.dumps({**fields, "added_tokens": []}))


def test_init_builds_a_checkpoint_that_loads_and_answers(llama, clip, tmp_path):
    out = tmp_path / "out"
    assert str(out) in succeeds("init", llama, out)
    assert {"modeling_elva.py", "processing_elva.py", "configuration_elva.py"} <= {file.name for file in out.iterdir()}
    model, processor = AutoModelForCausalLM.from_pretrained(out), AutoProcessor.from_pretrained(out)
    assert model.config.text_config.vocab_size >= len(processor.tokenizer)
    assert processor.tokenizer.convert_tokens_to_ids("<|im_end|>") in model.generation_config.eos_token_id
    assert processor.video_processor.patch_size == model.config.patch_size == 28
    text = LlamaForCausalLM.from_pretrained(llama)
    kept = text.get_input_embeddings().weight
    assert torch.equal(model.get_input_embeddings().weight[: len(kept)], kept)
    succeeds("ask", clip, QUESTION, "--model", out, "--frames", 2, "--max-new-tokens", 2, "--device", "cpu")
    assert "exists already" in fails("init", llama, out)


def test_export_adds_the_files_of_the_hub(folder, tmp_path):
    save_checkpoint(tmp_path)
    assert "modeling_elva.py" in succeeds("export", tmp_path)
    assert (tmp_path / "modeling_elva.py").is_file()
    assert "config.json" in fails("export", tmp_path / "nothing")


def test_doctor_shows_what_matters():
    text = succeeds("doctor")
    for word in ("python", "torch", "transformers", "FFmpeg", "h264", "webm", "sdpa", "torchcodec", "memory", "tiny"):
        assert word in text


@pytest.mark.parametrize(("has_bfloat16", "told"), [(True, "usable"), (False, "load and train in float32")])
def test_doctor_says_whether_the_cpu_multiplies_bfloat16(monkeypatch, has_bfloat16, told):
    monkeypatch.setattr(precision, "cpu_multiplies_bfloat16", lambda: has_bfloat16)
    (line,) = [line for line in succeeds("doctor").splitlines() if line.split()[:1] == ["bfloat16"]]
    assert told in line


def test_mistakes_with_the_video_are_one_line(folder, clip, tmp_path):
    not_a_video = tmp_path / "notes.mp4"
    not_a_video.write_text("hello " * 200)
    empty = tmp_path / "empty.mp4"
    empty.touch()
    for command in (["ask", "VIDEO", QUESTION, "--device", "cpu"], ["plan", "VIDEO"]):

        def told(video, command=command):
            return fails(*[video if part == "VIDEO" else part for part in command], "--model", folder)

        assert "does not exist" in told(tmp_path / "missing.mp4")
        assert "not a video" in told(not_a_video)
        assert "empty" in told(empty)
        assert "directory" in told(tmp_path)
        assert "no video stream; it holds: audio" in told(write_sound(tmp_path / "sound.mp4"))


def test_mistakes_with_questions_options_and_models_are_one_line(folder, clip, tmp_path):
    asked = ("ask", clip, QUESTION, "--model", folder)
    assert "empty" in fails("ask", clip, " ", "--model", folder)
    assert "QUESTION" in fails("ask", clip, "--model", folder)
    assert "--frame" in fails(*asked, "--frame", 3)
    assert "'--frames'" in fails(*asked, "--frames", "many")
    assert "exclude each other" in fails(*asked, "--frames", 4, "--fps", 2)
    assert "multiple of patch_size" in fails(*asked, "--longest-edge", 50)
    assert "--device nonsense" in fails(*asked, "--device", "nonsense")
    assert "no folder" in fails("ask", clip, QUESTION, "--model", tmp_path / "missing")
    assert "no config.json" in fails("ask", clip, QUESTION, "--model", tmp_path)
    assert "exclude each other" in fails("plan", clip, "--model", folder, "--preset", "elva-7b")
    assert "elva-7b-hd" in fails("plan", clip, "--preset", "elva-9b")
    assert "No such command" in fails("nonsense")
    assert "architecture" in fails("init", folder, tmp_path / "out", "--architecture", "clip")
    assert "cannot load" in fails("init", tmp_path / "missing", tmp_path / "out")


def test_a_request_that_does_not_fit_is_refused_before_the_weights_are_read(folder, tmp_path, clip):
    (tmp_path / "model").mkdir()
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    long = write_clip(tmp_path / "long.mp4", np.zeros((120, 64, 64, 3), np.uint8))
    assert "2048 positions" in fails("ask", long, QUESTION, "--model", tmp_path / "model", "--frames", 120)
    assert "2048 positions" in fails("ask", clip, QUESTION, "--model", folder, "--max-new-tokens", 2000)


def test_debug_shows_the_traceback_wherever_it_stands(folder, tmp_path):
    for args in (["--debug", "plan", tmp_path], ["plan", tmp_path, "--debug"]):
        result = run(*args, "--model", folder)
        assert result.exit_code == 2
        assert "Traceback" in result.stderr
        assert result.stderr.splitlines()[-1].startswith("elva: ")


def test_an_unforeseen_error_is_one_line_with_another_code(folder, clip, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr("elva_hf.cli.loading.load_processor", broken)
    result = run("plan", clip, "--model", folder)
    assert result.exit_code == 1
    assert result.stderr == (
        "elva: unexpected RuntimeError: first line second line (run again with --debug for the traceback).\n"
    )


def test_the_console_script_runs_quietly(folder, clip):
    code = "from elva_hf.cli import main; main()"
    args = ["ask", str(clip), QUESTION, "--model", str(folder), "--max-new-tokens", "2", "--device", "cpu"]
    result = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=False)
    assert result.returncode == 0
    assert result.stderr == ""
    assert rows(result.stdout, "answer")


def test_eval_prints_the_table_and_writes_the_scores(folder, tmp_path):
    out = succeeds("eval", "toy-world", "--model", folder, "--questions", 1, "--out", tmp_path / "scores.json")
    assert out.startswith("| task | n | mixed, arrays |")
    assert len(read_scores(tmp_path / "scores.json")) == len(TASKS) + len(HELD_OUT_TASKS)
    assert json.loads((tmp_path / "scores.json").read_text())["split"] == "test"


def test_eval_knows_its_benchmarks(folder):
    result = run("eval", "mmmu", "--model", folder)
    assert result.exit_code == 2 and "toy-world" in result.stderr


def test_frame_options_mean_what_the_processor_calls_them(folder, clip):
    processor = AutoProcessor.from_pretrained(folder)
    pairs = {
        ("--at", "0.1,0.7", "--at", "0.3"): {"frame_times": (0.1, 0.7, 0.3)},
        ("--start", 0.25, "--end", 0.75): {"video_start": 0.25, "video_end": 0.75},
        ("--high", 2, "--low", 4, "--scenes"): {
            "num_high_res_frames": 2,
            "num_low_res_frames": 4,
            "high_res_selection": "scenes",
        },
        ("--max-visual-tokens", 100, "--fit"): {"max_visual_tokens": 100, "overflow": "fit"},
        ("--max-memory", "200KB", "--fit"): {"max_memory": "200KB", "overflow": "fit"},
        ("--timestamps",): {"timestamps": True},
        ("--isolate",): {"isolate": True},
    }
    for options, meant in pairs.items():
        prompt = [
            {"role": "user", "content": [{"type": "video", "path": str(clip)}, {"type": "text", "text": QUESTION}]}
        ]
        how = {"tokenize": True, "return_dict": True, "add_generation_prompt": True, "return_metadata": True}
        inputs = processor.apply_chat_template(prompt, **how, **meant)
        (video,), length = inputs["video_metadata"], len(inputs["input_ids"][0])
        asked = succeeds("ask", clip, QUESTION, "--model", folder, "--max-new-tokens", 1, "--device", "cpu", *options)
        assert f"tokens    {video.num_visual_tokens} visual, {length} in the prompt, 1 in the answer" in asked, options
        planned = json.loads(succeeds("plan", clip, "--model", folder, "--json", *options))
        assert [frame["index"] for frame in planned["frames"]] == list(video.indices)
        assert [frame["time"] for frame in planned["frames"]] == list(video.times)
        shown = [frame["resolution"] == "high" for frame in planned["frames"]]
        assert shown == list(video.high) or "--scenes" in options  # scenes are chosen when frames are decoded
        assert planned["num_mark_tokens"] == (4 * 8 if "--timestamps" in options else 0)


def test_plan_shows_what_fit_would_take_and_fit_takes_it(folder, clip):
    short = ("plan", clip, "--model", folder, "--max-visual-tokens", 100)
    text = succeeds(*short)
    assert rows(text, "frames") == ["8, 8 high and 0 low"]
    assert rows(text, "budget") == ["the video gives 168 visual tokens, max_visual_tokens is 100"]
    assert rows(text, "fit") == ["3 high and 5 low frames, 98 tokens: add --fit"]
    fitted = succeeds(*short, "--fit")
    assert rows(fitted, "frames") == ["8, 3 high and 5 low"] and not rows(fitted, "fit") + rows(fitted, "budget")
    assert not rows(succeeds("plan", clip, "--model", folder), "fit")
    asked = succeeds(
        *("ask", clip, QUESTION, "--model", folder, "--max-new-tokens", 1, "--device", "cpu"),
        *("--max-visual-tokens", 100, "--fit"),
    )
    assert "98 visual" in asked
    planned = json.loads(succeeds(*short, "--json"))
    assert planned["fit"] == {"num_high_res_frames": 3, "num_low_res_frames": 5, "num_visual_tokens": 98}
    few = succeeds("plan", clip, "--model", folder, "--max-visual-tokens", 40, "--fit")
    assert rows(few, "frames") == ["5, 0 high and 5 low (8 asked for; no more fit)"]
    none = succeeds("plan", clip, "--model", folder, "--max-visual-tokens", 3)
    assert rows(none, "fit") == ["nothing: not even one low-resolution frame"]
    assert "--max-visual-tokens is 3" in fails("plan", clip, "--model", folder, "--max-visual-tokens", 3, "--fit")


def test_plan_says_that_scenes_are_known_later(folder, clip):
    options = ("plan", clip, "--model", folder, "--scenes")
    assert "known once they are decoded" in rows(succeeds(*options, "--high", 2, "--low", 3), "scenes")[0]
    assert not rows(succeeds(*options), "scenes")  # all frames are high


def test_a_long_video_is_planned_and_asked_with_fit(folder, tmp_path):
    long = write_clip(tmp_path / "long.mp4", np.zeros((120, 64, 64, 3), np.uint8))
    text = succeeds("plan", long, "--model", folder, "--frames", 120)
    assert rows(text, "budget") == ["less than 512 of 2048 positions are left for a question and its answer"]
    assert rows(text, "fit") == ["49 high and 71 low frames, 1526 tokens: add --fit"]
    text = succeeds("plan", long, "--model", folder, "--frames", 120, "--fit")
    assert rows(text, "context") == [f"2048 positions of {folder}, 520 left for text"]
    asked = succeeds(
        *("ask", long, QUESTION, "--model", folder, "--frames", 120, "--fit", "--max-new-tokens", 2, "--device", "cpu")
    )
    assert ", 120 frames, decoded in" in asked
    told = fails("ask", long, QUESTION, "--model", folder, "--frames", 120, "--max-new-tokens", 2, "--device", "cpu")
    advice = re.search(r"this would fit: --high (\d+), --low (\d+); or let --fit choose", told)
    assert advice, told
    options = ("--high", advice[1], "--low", advice[2], "--max-new-tokens", 2, "--device", "cpu")
    succeeds("ask", long, QUESTION, "--model", folder, *options)


def test_questions_of_unlike_length_each_get_what_fits(folder, tmp_path, monkeypatch):
    long = write_clip(tmp_path / "long.mp4", np.zeros((120, 64, 64, 3), np.uint8))
    read, opened = [], []
    read_frames, open_reader = sampled_elva.read_frames, video_processing_elva.open_reader
    monkeypatch.setattr(
        sampled_elva,
        "read_frames",
        lambda *given, **options: (read.append(given[1]), read_frames(*given, **options))[1],
    )
    monkeypatch.setattr(
        video_processing_elva,
        "open_reader",
        lambda *given, **options: (opened.append(given), open_reader(*given, **options))[1],
    )
    questions = (QUESTION, "Where is it?", QUESTION + " " + "Which? " * 60)
    options = ("--model", folder, "--frames", 120, "--fit", "--max-new-tokens", 2, "--device", "cpu")
    tokens = [
        re.match(r"(\d+) visual, (\d+) in the prompt", row)
        for row in rows(succeeds("ask", long, *questions, *options), "tokens")
    ]
    assert all(int(row[2]) <= 2046 for row in tokens) and int(tokens[2][1]) < int(tokens[0][1])
    assert len(opened) == 1 and len(read) == len({(plan.indices, plan.high) for plan in read}) <= 3


def test_show_takes_the_same_options(folder, clip, tmp_path):
    options = ("--model", folder, "--merge-schedule", "table5", "--device", "cpu", "--out", tmp_path / "merge.png")
    text = succeeds("show", clip, *options, "--timestamps", "--start", 0.2, "--frames", 4, "--question", QUESTION)
    assert ", 4 frames" in text and "of 64 patches left" in text and rows(text, "answer")
    text = succeeds("show", clip, *options, "--max-visual-tokens", 100, "--fit", "--isolate")
    assert ", 8 frames" in text and "patches left" in text


def test_mistakes_in_the_options_of_frames_are_one_line(folder, clip):
    for command in (("ask", clip, QUESTION), ("plan", clip)):

        def told(*options, command=command):
            return fails(*command, "--model", folder, *options)

        assert "--at soon: give seconds" in told("--at", "soon")
        assert "frame_times holds 9 s" in told("--at", 9)
        assert "video_start is 5 s" in told("--start", 5)
        assert "the end must be after the start" in told("--start", 0.5, "--end", 0.5)
        assert "max_memory is 'lots'" in told("--max-memory", "lots")
        assert "exclude each other" in told("--at", 0.5, "--frames", 2)
    assert "--max-visual-tokens is 9" in fails("ask", clip, QUESTION, "--model", folder, "--max-visual-tokens", 9)
    url = "https://name:secret@example.org/clip.mp4"
    for command in (("ask", url, QUESTION), ("plan", url)):
        told = fails(*command, "--model", folder)
        assert "--allow-urls" in told and "secret" not in told
        assert "127.0.0.1" in fails(
            command[0], "https://127.0.0.1/clip.mp4", *command[2:], "--model", folder, "--allow-urls"
        )
    assert loading.frame_options(isolate=True, allow_urls=True) == {"isolate": True, "allow_urls": True}
    assert loading.frame_options() == {}
    assert "tokenizer" in fails("plan", clip, "--preset", "elva-7b", "--timestamps")


def test_special_tokens_in_a_question_are_text(folder, clip):
    typed = "".join(AutoProcessor.from_pretrained(folder).tokenizer.get_added_vocab())
    options = ("--model", folder, "--max-new-tokens", 1, "--device", "cpu")
    (plain,), (injected,) = (
        rows(succeeds("ask", clip, words, *options), "tokens") for words in ("Which?", f"Which?{typed}")
    )
    assert plain.split(",")[0] == injected.split(",")[0] == "168 visual"
    assert rows(
        succeeds(
            "show",
            clip,
            "--out",
            clip.with_suffix(".png"),
            "--merge-schedule",
            "table5",
            "--question",
            typed,
            *options[:2],
        ),
        "answer",
    )


@pytest.mark.parametrize("recipe", ["mavors_tiny", "video_panda_tiny"])
def test_eval_reads_a_sibling(recipe, tmp_path, monkeypatch):
    fields, _ = read_recipe(recipe)
    tokenizer = build_toy_tokenizer()
    model = build_model(fields, tokenizer)
    save(model, tmp_path / "model")
    build_processor(tokenizer, model.config).save_pretrained(tmp_path / "model")
    monkeypatch.setattr(toy_world, "_blind", lambda single, split: {})  # tens of thousands of scenes
    seen, answer_all = [], toy_world.answer_all
    monkeypatch.setattr(toy_world, "answer_all", lambda *args: (seen.append(args[:2]), answer_all(*args))[1])
    succeeds("eval", "toy-world", "--model", tmp_path / "model", "--questions", 1, "--out", tmp_path / "scores.json")
    assert len(read_scores(tmp_path / "scores.json")) == len(TASKS) + len(HELD_OUT_TASKS)
    names = {(type(student).__name__, type(processor).__name__) for student, processor in seen}
    system = type(model).__name__.removesuffix("ForCausalLM")
    assert names == {(f"{system}ForCausalLM", f"{system}Processor")}
