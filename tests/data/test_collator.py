import torch
from tiny_elva import START, batch, pixels, tiny_model, video, words

from elva_hf.data.collator import IGNORED, PackedRow, pack_rows, shared_prefix_mask


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
