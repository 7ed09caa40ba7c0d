"""Turn a trained toy model into the checkpoint that ships: processor, held-out table, demo clip, card, Hub files.

    python scripts/ship_tiny.py --model runs/tiny/model --log runs/tiny.log --out src/elva_hf/checkpoints/tiny

The test split is scored once, here.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
from datetime import date
from pathlib import Path

import torch

import elva_hf
from elva_hf.data.toy_tokenizer import build_toy_tokenizer
from elva_hf.data.toy_world import Question, Scene, questions, render, sample_scene, write_mp4
from elva_hf.evaluation.toy_world import BARS, answer_all, evaluate, format_table, missed_bars, write_scores
from elva_hf.hub import export_hub_files
from elva_hf.training.toy import build_processor

DEMO_TASKS = ("color", "shape", "count", "digit", "needle", "when", "motion", "where")
DEMO_SEEDS = 2000

SUMMARY = (
    "A 1.4M-parameter ELVA that answers questions about 64x64 clips of a procedural world: coloured, textured "
    "shapes that stand, move or appear, a handwritten digit, and a white flash. It ships inside the elva-hf "
    "package as a working example, for tests, and as a starting point for small experiments."
)
ARCHITECTURE = (
    "Decoder: Qwen2 shape, hidden size 128, 6 layers, 4 attention heads, 2 key-value heads. Patch embedding: "
    "16-pixel patches, width 128, with the cross-attention of the paper's section 3.1 and learned row and column "
    "embeddings, which the paper does not have. Eight frames of 4x4 patches a clip: 170 visual tokens with borders. "
    "Byte-level tokenizer of 514 entries. Patches merge inside the decoder, by the paper's schedule (`paper`): those "
    "more similar than 0.6 to the next frame's at the input of layers 1 and 2, and down to half at layer 3. "
    '`merge_schedule="none"` turns it off.'
)
LIMITS = (
    "It knows that world and nothing else. It has never seen real footage, other sizes or longer clips, and "
    "answers with one or two words from a closed set. A question about anything else gets a meaningless answer."
)
TRAINING = (
    "`make tiny`: recipe `training/recipes/tiny.yaml`, seed 0, HF `Trainer`, bf16 autocast, Muon for the matrices "
    "of the layers and AdamW for the rest. Stages 1 and 2 show images, 3 to 7 eight-frame clips, some of "
    "them through H.264. Loss: L_Gen, and an alignment to a hand-made, label-free teacher of 45 numbers a patch "
    "(looks, place, what moved): L_MSE (Eq. 2) for images; for clips the same error frame by frame, because a "
    "mean over frames hides motion. It favours these questions by construction. Stages 6 and 7 train with merging on, "
    "stage 6 with L_Gen alone. Stages 4, 5 and 7 started from saved weights with a fresh task head. Digits are "
    "scikit-learn's; the test split holds out their images, and 30 of the 120 combinations of colour, "
    "shape and pattern. Weights are stored in bfloat16."
)
EVALUATION = (
    "Test split, exact match of greedy answers (measured; `make eval` prints it again). Mixed scenes have one to "
    "three shapes. `video swapped` asks the question about another scene's video; `blind` is the best constant "
    "answer per question, fitted on 20,000 training scenes. Rows `held out` ask of things whose combination of "
    f"colour, shape and pattern no training scene showed. Bars are {min(BARS.values()):.2f} to "
    f"{max(BARS.values()):.2f}; `rel` has none."
)
DEMO = (
    "The demo clip is the first held-out scene with two shapes, motion, a digit and a flash of which all eight "
    "questions are answered right"
)


def demo_questions(scene: Scene) -> list[Question]:
    """One question of each demo task, where the scene has it."""
    first: dict[str, Question] = {}
    for question in questions(scene):
        first.setdefault(question.task, question)
    return [first[task] for task in DEMO_TASKS if task in first]


def is_rich(scene: Scene) -> bool:
    """Whether a scene shows something of everything: two shapes, one of them moving, a digit, a flash."""
    moving = any(thing.motion != "still" for thing in scene.objects)
    return len(scene.objects) == 2 and moving and scene.digit is not None and scene.flash_frame is not None


def choose_demo(model: elva_hf.ElvaForCausalLM, processor: elva_hf.ElvaProcessor, path: Path) -> dict:
    """Write the first rich demo scene whose questions the model answers right, all of them."""
    for seed in range(DEMO_SEEDS):
        scene = sample_scene(seed, split="demo")
        asked = demo_questions(scene)
        if not is_rich(scene) or len(asked) < len(DEMO_TASKS):
            continue
        write_mp4(render(scene), path)
        answers = answer_all(model, processor, [(str(path), q.text) for q in asked], len(asked), lambda count: None)
        if list(answers) == [question.answer for question in asked]:
            return {"seed": seed, "questions": [[question.text, question.answer] for question in asked]}
    raise SystemExit(f"no demo scene below seed {DEMO_SEEDS} is answered right in full")


def describe_training(log: Path, device: str) -> str:
    """The recipe, and how long each stage took by the Trainer's own clock."""
    if not log.is_file():
        return f"{TRAINING} Time: not recorded."
    seconds = [float(value) for value in re.findall(r"'train_runtime': '([\d.e+]+)'", log.read_text())]
    stages = ", ".join(f"{value / 60:.0f} min" for value in seconds)
    return f"{TRAINING} Time of the stages (measured, {device}, shared with other work): {stages}."


def describe_misses(missed: list[str]) -> str:
    """Which bars the table misses."""
    return f"Bars that are missed: {'; '.join(missed)}." if missed else "Every bar is reached."


def main() -> None:
    """Assemble the folder, score it once, and render its card."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("runs/tiny/model"))
    parser.add_argument("--log", type=Path, default=Path("runs/tiny.log"))
    parser.add_argument("--out", type=Path, default=Path("src/elva_hf/checkpoints/tiny"))
    parser.add_argument("--device", default="2 CPU cores")
    parser.add_argument("--questions", type=int, default=500)
    options = parser.parse_args()
    shutil.rmtree(options.out, ignore_errors=True)
    shutil.copytree(options.model, options.out)
    model = elva_hf.ElvaForCausalLM.from_pretrained(options.out, dtype=torch.float32)
    processor = build_processor(build_toy_tokenizer(), model.config)
    processor.save_pretrained(options.out)
    demo = choose_demo(model, processor, options.out / "demo.mp4")
    (options.out / "demo.json").write_text(json.dumps(demo, indent=2) + "\n")
    scores = evaluate(model, processor, num_questions=options.questions)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    provenance = {"device": options.device, "commit": commit.stdout.strip(), "date": date.today().isoformat()}
    write_scores(scores, options.out / "held_out.json", command="python scripts/ship_tiny.py", **provenance)
    table = format_table(scores)
    missed = missed_bars(scores)
    demo_text = f"{DEMO} (demo split, seed {demo['seed']})."
    card = {
        "license": "apache-2.0",
        "title": "elva-tiny",
        "summary": SUMMARY,
        "model_id": "elva_hf.tiny_checkpoint()",
        "architecture": ARCHITECTURE,
        "limits": LIMITS,
        "training": describe_training(options.log, options.device),
        "evaluation": "\n\n".join([EVALUATION, table, describe_misses(missed), demo_text]),
    }
    export_hub_files(options.out, card)
    print(table, *missed, sep="\n")


if __name__ == "__main__":
    main()
