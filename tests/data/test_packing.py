"""Shared-prefix packing: what questions share is written once, and each can be read back alone."""

import pytest
import torch

from elva_hf.data.packing import IGNORED, restart_positions, share_prefix, split_turns, unpack_turns
from elva_hf.errors_elva import ElvaError

END = 9


def conversation(prefix, question, answer):
    return prefix + question + answer, [IGNORED] * len(prefix + question) + answer


def test_what_is_shared_ends_with_the_last_video():
    prefix = [1, END, 2, END]
    asked = [conversation(prefix, [5, 6], [7]), conversation(prefix, [5, 8], [7, 7]), conversation(prefix, [3], [4])]
    input_ids, labels, segments = share_prefix(asked, END)
    assert input_ids.tolist() == [1, END, 2, END, 5, 6, 7, 5, 8, 7, 7, 3, 4]
    assert segments.tolist() == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 3, 3]
    assert labels.tolist() == [IGNORED] * 6 + [7] + [IGNORED] * 2 + [7, 7] + [IGNORED, 4]
    for places, (ids, own) in zip(unpack_turns(segments), asked, strict=True):
        assert (input_ids[places].tolist(), labels[places].tolist()) == (ids, own)


def test_without_a_video_the_common_part_is_shared_but_no_answer_nor_the_token_before_it():
    same = conversation([1, 2], [3], [4, 5])
    input_ids, labels, segments = share_prefix([same, same], END)
    assert segments.tolist() == [0, 0, 1, 1, 1, 2, 2, 2]
    assert input_ids.tolist() == [1, 2, 3, 4, 5, 3, 4, 5]
    assert labels.tolist() == [IGNORED] * 3 + [4, 5, IGNORED, 4, 5]
    _, _, segments = share_prefix([conversation([1], [2, 3], [4]), conversation([1], [3, 3], [4])], END)
    assert segments.tolist() == [0, 1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize(
    ("asked", "match"),
    [
        ([conversation([1, END], [3], [4]), conversation([2, END], [3], [4])], "differ before the end"),
        ([conversation([1, 2, END], [3], [4]), conversation([1, 3, END], [3], [4])], "differ before the end"),
        ([conversation([1], [3], [4]), conversation([2], [3], [4])], "share no token"),
    ],
)
def test_questions_that_share_no_video_are_refused(asked, match):
    with pytest.raises(ElvaError, match=match):
        share_prefix(asked, END)


def test_positions_of_a_question_are_those_it_has_alone():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        lengths = torch.randint(1, 6, (5,), generator=generator)
        segments = torch.arange(5).repeat_interleave(lengths)
        positions = restart_positions(segments)
        for places in unpack_turns(segments):
            assert positions[places].tolist() == list(range(len(places)))


def test_the_opening_stands_before_every_question():
    def user(*content):
        return {"role": "user", "content": content[0] if isinstance(content[0], str) else list(content)}

    system, answer = {"role": "system", "content": "s"}, {"role": "assistant", "content": "a"}
    video, text = {"type": "video", "path": "v"}, {"type": "text", "text": "q"}
    chats = split_turns([system, user(text, video), answer, user("r"), answer])
    assert chats == [
        [system, user(video, text), answer],
        [system, user(video, {"type": "text", "text": "r"}), answer],
    ]
    silent = {"role": "user", "content": []}
    assert split_turns([user(video), answer, silent, answer]) == [[user(video), answer], [user(video), answer]]
    with pytest.raises(ElvaError, match="none"):
        split_turns([system])
