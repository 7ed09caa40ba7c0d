"""Batches: padding, labels, packed rows that equal single-turn conversations, and the trainers that take them."""

import pytest
import torch
from merging_cases import in_double
from saved_elva import build_checkpoint, draw_frames, write_clip
from tiny_elva import START, batch, pixels, tiny_model, video, words
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from elva_hf.configuration_elva import SPECIAL_TOKENS, ElvaConfig
from elva_hf.data.collator import IGNORED, ElvaCollator, PackedRow, number_sample, pack_rows, shared_prefix_mask
from elva_hf.data.encoding import encode_row
from elva_hf.errors_elva import ConfigurationError, ElvaError
from elva_hf.modeling_elva import ElvaForCausalLM

WORDS = ["red", "green", "left", "what color is it", "early", "the top left", "yes", "no"]
EXACT = {"rtol": 1e-10, "atol": 1e-12}


@pytest.fixture(scope="module")
def checkpoint():
    return build_checkpoint()


@pytest.fixture(scope="module")
def processor(checkpoint):
    return checkpoint[1]


def double_model(processor, **schedule):
    """The checkpoint's shape in float64, but for the sums of the cross-attention, which are left out."""
    torch.manual_seed(0)
    ids = {f"{name}_id": getattr(processor, f"{name}_id") for name in SPECIAL_TOKENS}
    config = ElvaConfig.from_preset("tiny", **ids, patch_embed_type="naive", **schedule)
    config.initializer_range = config.text_config.initializer_range = 0.2
    config.text_config.vocab_size = len(processor.tokenizer)
    return in_double(ElvaForCausalLM(config)).train()


def row(number, questions=1, num_frames=2, side=32, **extra):
    """A row of one video and some independent questions with answers of different lengths."""
    clip = draw_frames(number, num_frames=num_frames, height=side, width=side)
    messages = [{"role": "system", "content": "Look."}] if number % 2 else []
    for i in range(questions):
        content = [{"type": "text", "text": WORDS[(number + 3 * i) % len(WORDS)] + "?"}]
        if i == 0:
            content.insert(0, {"type": "video", "video": clip})
        messages.append({"role": "user", "content": content})
        messages.append({"role": "assistant", "content": " ".join(WORDS[(number + i) % len(WORDS) :][: 1 + i % 3])})
    return {"messages": messages, "id": f"row {number}", "independent_turns": questions > 1, **extra}


def text_row(number):
    return {
        "messages": [{"role": "user", "content": "What is two?"}, {"role": "assistant", "content": "two"}],
        "id": f"text {number}",
    }


def test_a_batch_holds_its_samples_padded_on_the_right(processor):
    rows = [row(0, num_frames=3), text_row(1), row(2, side=64), row(3)]
    samples = [encode_row(one, processor, index=i) for i, one in enumerate(rows)]
    made = ElvaCollator(processor, sample_ids=True)(samples)
    assert set(made) == {"input_ids", "labels", "attention_mask", "pixel_values_videos", "sample_ids"}
    assert made["input_ids"].shape == made["labels"].shape == made["attention_mask"].shape
    assert made["input_ids"].shape[1] == max(map(len, samples))
    for i, sample in enumerate(samples):
        length = len(sample)
        assert made["attention_mask"][i].tolist() == [1] * length + [0] * (made["input_ids"].shape[1] - length)
        assert torch.equal(made["input_ids"][i, :length], sample.input_ids)
        assert torch.equal(made["labels"][i, :length], sample.labels)
        assert set(made["labels"][i, length:].tolist()) <= {IGNORED}
        assert set(made["input_ids"][i, length:].tolist()) <= {processor.tokenizer.pad_token_id}
    own = [sample.pixel_values_videos for sample in samples if sample.pixel_values_videos is not None]
    assert torch.equal(made["pixel_values_videos"], torch.cat(own))
    assert made["sample_ids"].tolist() == [0, 1, 2, 3]


def test_raw_rows_give_the_batch_of_their_samples_and_options_are_theirs(processor):
    rows = [row(0, num_frames=4), row(1)]
    raw = ElvaCollator(processor, num_frames=1)(rows)
    encoded = ElvaCollator(processor)([encode_row(one, processor, num_frames=1) for one in rows])
    assert raw.keys() == encoded.keys()
    assert all(torch.equal(raw[key], encoded[key]) for key in raw)


def test_a_batch_of_text_has_no_pixels(processor):
    made = ElvaCollator(processor)([text_row(0), text_row(1)])
    assert set(made) == {"input_ids", "labels", "attention_mask"}


def test_lengths_are_rounded_up(processor):
    plain = ElvaCollator(processor)([row(0)])["input_ids"]
    for multiple in (1, 8, 64):
        made = ElvaCollator(processor, packing="shared_prefix", pad_to_multiple_of=multiple)([row(0, questions=3)])
        assert made["input_ids"].shape[1] % multiple == 0
        assert {value.shape for key, value in made.items() if key != "pixel_values_videos"} == {made["input_ids"].shape}
    rounded = ElvaCollator(processor, pad_to_multiple_of=64)([row(0)])["input_ids"]
    assert torch.equal(rounded[:, : plain.shape[1]], plain)
    assert rounded.shape[1] - plain.shape[1] < 64
    exact = ElvaCollator(processor, pad_to_multiple_of=plain.shape[1])([row(0)])["input_ids"]
    assert torch.equal(exact, plain)


def test_rows_without_a_number_get_one_of_their_id(processor):
    rows = [row(0), row(1), row(0)]
    first, second, again = ElvaCollator(processor, sample_ids=True)(rows)["sample_ids"].tolist()
    assert first == again != second
    assert min(first, second) >= 0
    assert number_sample(encode_row(row(0), processor)) == first
    packed = [encode_row(row(0, questions=3), processor, index=9), encode_row(row(1), processor, index=4)]
    assert ElvaCollator(processor, sample_ids=True)(packed)["sample_ids"].tolist() == [9, 9, 9, 4]
    made = ElvaCollator(processor, sample_ids=True, packing="shared_prefix")(packed)
    assert made["sample_ids"].tolist() == [9, 4]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"packing": "tight"}, "packing"),
        ({"pad_to_multiple_of": 0}, "pad_to_multiple_of"),
        ({"num_frame": 2}, "num_fr"),
    ],
)
def test_options_that_cannot_be_are_refused(processor, options, match):
    with pytest.raises(ConfigurationError, match=match):
        ElvaCollator(processor, **options)
    with pytest.raises(ElvaError, match="no rows"):
        ElvaCollator(processor)([])


# Shared-prefix packing.


def gradients(model, inputs):
    """The loss of a batch and the gradient of every parameter."""
    model.zero_grad()
    inputs = {**inputs, "pixel_values_videos": inputs["pixel_values_videos"].double()}
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {
        name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None
    }


SCHEDULES = {
    "none": {},
    "threshold": {"merge_schedule": [{"layer": 1, "similarity_threshold": 0.3}]},
    "ratio": {"merge_schedule": [{"layer": 1, "target_ratio": 0.5}, {"layer": 2, "target_ratio": 0.6}]},
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_packed_rows_have_the_loss_and_the_gradients_of_single_turn_rows(processor, schedule):
    model = double_model(processor, **SCHEDULES[schedule])
    rows = [row(0, questions=8, num_frames=4), row(1, questions=3), text_row(2), row(3)]
    packed = ElvaCollator(processor, packing="shared_prefix")(rows)
    single = ElvaCollator(processor)(rows)
    assert (len(packed["input_ids"]), len(single["input_ids"])) == (4, 13)
    assert (packed["labels"] != IGNORED).sum() == (single["labels"] != IGNORED).sum()
    loss, packed_gradients = gradients(model, packed)
    expected, single_gradients = gradients(model, single)
    torch.testing.assert_close(loss, expected, **EXACT)
    assert packed_gradients.keys() == single_gradients.keys()
    for name, gradient in packed_gradients.items():
        torch.testing.assert_close(gradient, single_gradients[name], **EXACT, msg=name)
    if schedule == "none":
        loss, _ = gradients(model, {**packed, "segment_ids": packed["segment_ids"].clamp(max=0)})
        assert abs(loss - expected) > 1e-3  # it matters who looks at whom


def test_eight_questions_share_one_visual_pass(processor):
    packed = ElvaCollator(processor, packing="shared_prefix")([row(0, questions=8, num_frames=4)])
    single = ElvaCollator(processor)([row(0, questions=8, num_frames=4)])
    patches = [int((made["input_ids"] == processor.video_token_id).sum()) for made in (packed, single)]
    assert patches == [len(packed["pixel_values_videos"]), 8 * len(packed["pixel_values_videos"])]
    assert patches[1] == len(single["pixel_values_videos"])


def test_the_segments_agree_with_the_dense_mask(processor):
    model = double_model(processor)
    made = ElvaCollator(processor, packing="shared_prefix")([row(0, questions=4), row(1, questions=2)])
    loss, _ = gradients(model, made)
    dense = {key: value for key, value in made.items() if key != "segment_ids"}
    mask = shared_prefix_mask(made["segment_ids"])
    dense["attention_mask"] = torch.where(mask == 0, 0.0, float("-inf")).double()
    torch.testing.assert_close(gradients(model, dense)[0], loss, **EXACT)


def test_rows_of_one_question_need_no_segments(processor):
    for packing in ("none", "shared_prefix"):
        made = ElvaCollator(processor, packing=packing)([row(0), text_row(1)])
        assert not {"segment_ids", "position_ids"} & set(made)
    made = ElvaCollator(processor, packing="shared_prefix")([row(0, questions=2), text_row(1)])
    assert set(made["segment_ids"][1].tolist()) == {0, -1}
    assert torch.equal(made["segment_ids"] == -1, made["attention_mask"] == 0)
    assert made["position_ids"][1].max() == made["attention_mask"][1].sum() - 1


# A teacher's features.


class Cache:
    """Features that are numbered by the video they are of."""

    def __init__(self):
        self.asked = []

    def key(self, pixels, grids):
        assert len(pixels) == sum(rows * columns for rows, columns in grids)
        return round(float(pixels.double().sum()), 4), tuple(grids)

    def get(self, key, *, grids, sample_id):
        assert key[1] == tuple(grids)
        self.asked.append((key[0], sample_id))
        clips = list(dict.fromkeys(grids))
        tubes = torch.full((len(clips), 2, 2, 3), key[0]) + torch.arange(len(clips)).view(-1, 1, 1, 1)
        return tubes, torch.full((len(grids), 3), key[0]) + torch.arange(len(grids)).view(-1, 1)


def test_features_of_the_teacher_come_in_the_order_of_videos(processor):
    cache = Cache()
    two = row(3, num_frames=2)
    two["messages"][1]["content"].insert(0, {"type": "image", "image": draw_frames(8, num_frames=1)[0]})
    rows = [row(0, num_frames=3), text_row(1), two]
    hybrid = {"num_high_res_frames": 1, "num_low_res_frames": 1, "longest_edge": 64, "low_res_longest_edge": 16}
    made = ElvaCollator(processor, teacher_cache=cache, **hybrid)(rows)
    assert [sample_id for _, sample_id in cache.asked] == ["row 0", "row 3", "row 3"]
    names = [name for name, _ in cache.asked]
    assert len(set(names)) == 3
    firsts = made["teacher_tubes"][:, 0, 0, 0].tolist()
    expected = [names[0], names[0] + 1, names[1], names[2], names[2] + 1]  # a clip for each size; the image has one
    assert firsts == pytest.approx(expected, rel=1e-5)
    assert made["teacher_frames"][:, 0].tolist() == pytest.approx(expected, rel=1e-5)
    patches = made["input_ids"] == processor.frame_token_id
    assert len(made["teacher_frames"]) == patches.sum()
    assert not {"teacher_tubes", "teacher_frames"} & set(ElvaCollator(processor, teacher_cache=cache)([text_row(0)]))


def test_features_are_repeated_with_the_pixels_where_questions_are_rows(processor):
    cache = Cache()
    made = ElvaCollator(processor, teacher_cache=cache)([row(0, questions=3)])
    assert len(made["teacher_frames"]) == 3 * 2
    assert len(made["teacher_tubes"]) == 3
    packed = ElvaCollator(processor, teacher_cache=cache, packing="shared_prefix")([row(0, questions=3)])
    assert len(packed["teacher_frames"]) == 2


# Trainers, on lists of rows as they are.


def arguments(folder, **changes):
    plain = {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "use_cpu": True,
        "remove_unused_columns": False,
        "disable_tqdm": True,
    }
    return {**plain, **changes}


def losses(trainer):
    before = [value.detach().clone() for value in trainer.model.parameters()]
    trainer.train()
    changed = [not torch.equal(one, other) for one, other in zip(before, trainer.model.parameters(), strict=True)]
    assert any(changed)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("packing", ["none", "shared_prefix"])
def test_a_plain_trainer_takes_rows_as_they_are(tmp_path, packing):
    model, processor = build_checkpoint()
    rows = [row(i, questions=1 + i % 3) for i in range(4)]
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**arguments(tmp_path)),
        train_dataset=rows,
        data_collator=ElvaCollator(processor, packing=packing),
        processing_class=processor,
    )
    found = losses(trainer)
    assert len(found) == 2
    assert all(0 < loss < 20 for loss in found)


def test_the_loss_of_a_trainer_does_not_depend_on_packing(tmp_path):
    found = []
    for packing in ("none", "shared_prefix"):
        model, processor = build_checkpoint()
        trainer = Trainer(
            model=model,
            args=TrainingArguments(**arguments(tmp_path, max_steps=1)),
            train_dataset=[row(i, questions=1 + i % 3) for i in range(4)],
            data_collator=ElvaCollator(processor, packing=packing),
        )
        found += losses(trainer)
    assert found[0] == pytest.approx(found[1], rel=1e-5)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("packing", ["none", "shared_prefix"])
def test_trls_trainer_takes_rows_as_they_are(tmp_path, packing):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    model, processor = build_checkpoint()
    config = arguments(tmp_path, max_length=None, bf16=False, dataset_kwargs={"skip_prepare_dataset": True})
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(**config),
        train_dataset=datasets.Dataset.from_list([on_disk(row(i, questions=1 + i % 3), tmp_path) for i in range(4)]),
        data_collator=ElvaCollator(processor, packing=packing),
        processing_class=processor,
    )
    found = losses(trainer)
    assert len(found) == 2
    assert all(0 < loss < 20 for loss in found)


def on_disk(one, folder):
    """A row as a table can hold it: the video is a file, and all content are blocks."""
    messages = []
    for message in one["messages"]:
        content = message["content"]
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else [dict(block) for block in content]
        for block in blocks:
            if block["type"] == "video":
                path = folder / f"{one['id']}.mp4"
                block["path"] = str(write_clip(path, block.pop("video")))
        messages.append({**message, "content": blocks})
    return {**one, "messages": messages}


def test_workers_of_a_loader_make_the_same_batches(processor):
    rows = [row(i, questions=2) for i in range(4)]
    collator = ElvaCollator(processor, packing="shared_prefix", sample_ids=True)
    here, there = (list(DataLoader(rows, 2, collate_fn=collator, num_workers=count)) for count in (0, 1))
    for one, other in zip(here, there, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


# Rows of ids.


def rows():
    first = PackedRow([*words(2), *video((2, 2), (2, 2))], [(words(3, 1), words(2, 2)), (words(5, 3), words(1, 4))])
    second = PackedRow([*words(1), *video((1, 3))], [(words(2, 5), words(3, 6))])
    return [first, second]


def test_a_packed_question_gets_the_logits_of_its_own_single_turn_conversation():
    model = tiny_model()
    packed = pack_rows(rows(), pad_token_id=0)
    parts = [pixels(row.prefix, seed) for seed, row in enumerate(rows())]
    del packed["labels"]
    logits = model(**packed, pixel_values_videos=torch.cat(parts), use_cache=False).logits
    for i, (row, own) in enumerate(zip(rows(), parts, strict=True)):
        start = len(row.prefix)
        for question, answer in row.turns:
            alone = model(**batch([row.prefix + question + answer]), pixel_values_videos=own).logits[
                0, len(row.prefix) :
            ]
            stop = start + len(question) + len(answer)
            torch.testing.assert_close(logits[i, start:stop], alone, atol=2e-5, rtol=0)
            start = stop


def test_only_answers_are_labels():
    packed = pack_rows(rows(), pad_token_id=0)
    for i, row in enumerate(rows()):
        wanted = [token for _, answer in row.turns for token in answer]
        asked = packed["labels"][i] != IGNORED
        assert packed["labels"][i][asked].tolist() == wanted
        assert torch.equal(packed["labels"][i][asked], packed["input_ids"][i][asked])  # in their own places


def test_mask_equals_a_loop():
    segments = torch.tensor([[0, 0, 1, 1, 2, 2, -1]])
    mask = shared_prefix_mask(segments)[0, 0]
    for i in range(7):
        for j in range(7):
            a, b = segments[0, i].item(), segments[0, j].item()
            allowed = i == j or (j <= i and b >= 0 and (b == 0 or a == b))
            assert (mask[i, j] == 0) == allowed, (i, j)


def test_rows_of_one_question_are_plain_sequences():
    alone = [PackedRow(row.prefix, row.turns[:1]) for row in rows()]
    packed = pack_rows(alone, pad_token_id=0)
    plain = batch([row.prefix + row.turns[0][0] + row.turns[0][1] for row in alone], "right")
    assert torch.equal(packed["input_ids"], plain["input_ids"])
    assert torch.equal(packed["attention_mask"], plain["attention_mask"])
    for positions, mask in zip(packed["position_ids"], packed["attention_mask"], strict=True):
        assert positions[mask == 1].tolist() == list(range(int(mask.sum())))


def test_positions_restart_after_the_video():
    row = rows()[0]
    packed = pack_rows([row], pad_token_id=0)
    start = len(row.prefix)
    question, answer = row.turns[0]
    second = start + len(question) + len(answer)
    assert packed["position_ids"][0, start] == packed["position_ids"][0, second] == start
    assert packed["input_ids"][0].tolist().count(START) == 1
