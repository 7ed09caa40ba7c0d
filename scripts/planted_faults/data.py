"""Faults of rows, labels, shared prefixes and batches."""

from .fault import Fault

ROWS = "tests/data/test_rows.py"
ENCODING = "tests/data/test_encoding.py"
PACKING = "tests/data/test_packing.py"
SEGMENTS = "tests/test_segments.py"
COLLATOR = "tests/data/test_collator.py"
CHECKED = "tests/cli/test_data_check.py"

DATA = (
    Fault(
        "media of a record in another order than its placeholders",
        "data/schemas.py",
        "left = {kind: iter(sources) for kind, sources in media.items()}",
        "left = {kind: iter(sources[::-1]) for kind, sources in media.items()}",
        (ROWS, "-k", "placeholders_take"),
    ),
    Fault(
        "paths may leave the folder of the media",
        "data/rows.py",
        "        if outside:\n",
        "        if False:\n",
        (ROWS, "-k", "stay_in_it"),
    ),
    Fault(
        "labels on what the template writes after an answer",
        "data/encoding.py",
        "labels += spoken + [IGNORED] * (len(new) - len(spoken))",
        "labels += new",
        (ENCODING, "-k", "labels_are_the_answers"),
    ),
    Fault(
        "labels on the user's turn",
        "data/encoding.py",
        "list(encoded[0]), [IGNORED] * len(encoded[0])",
        "list(encoded[0]), list(encoded[0])",
        (ENCODING, "-k", "labels_are_the_answers"),
    ),
    Fault(
        "the last token of an answer without label",
        "data/encoding.py",
        "labels += spoken + [IGNORED] * (len(new) - len(spoken))",
        "labels += spoken[:-1] + [IGNORED] * (len(new) - len(spoken) + 1)",
        (ENCODING, "-k", "labels_are_the_answers"),
    ),
    Fault(
        "an answer merges with what stands before it",
        "data/encoding.py",
        """    answers = [_SEAM + answer for answer, _ in conversation.turns]
    turns = [_SEAM + answer + rest for answer, rest in conversation.turns]
""",
        """    answers = [answer for answer, _ in conversation.turns]
    turns = [answer + rest for answer, rest in conversation.turns]
""",
        (ENCODING, "-k", "never_merges"),
    ),
    Fault(
        "padding is learnt",
        "data/collator.py",
        "pad((sample.labels for sample in samples), IGNORED)",
        "pad((sample.labels for sample in samples), pad_token_id)",
        (COLLATOR, "-k", "padded_on_the_right"),
    ),
    Fault(
        "a question sees the questions before it",
        "attention_elva.py",
        """                key_lengths.append(prefix + question)
                index += [shared, torch.arange(start, start + question)]
""",
        """                index.append(torch.arange(int(shared[0]), start + question))
                key_lengths.append(len(index[-1]))
""",
        (SEGMENTS, "-k", "gets_alone"),
    ),
    Fault(
        "a question does not see its video",
        "attention_elva.py",
        """                key_lengths.append(prefix + question)
                index += [shared, torch.arange(start, start + question)]
""",
        """                key_lengths.append(question)
                index.append(torch.arange(start, start + question))
""",
        (SEGMENTS, "-k", "gets_alone"),
    ),
    Fault(
        "positions of a question go on from the question before",
        "data/packing.py",
        "torch.where(segment_ids > PREFIX, prefix + place - began, place)",
        "place",
        (PACKING, "-k", "positions"),
    ),
    Fault(
        "a video in a question is accepted",
        "packing_elva.py",
        "if shared is not None and bool(segment_ids.flatten()[shared].any()):",
        "if False:",
        (SEGMENTS, "-k", "video_in_a_question"),
    ),
    Fault(
        "a later question's own video is dropped",
        "data/packing.py",
        "        if number and own:\n",
        "        if False:\n",
        (ENCODING, "-k", "cannot_be_independent"),
    ),
    Fault(
        "the first word of an answer follows the shared part",
        "data/packing.py",
        "for _, labels in conversations) - 1  # every",
        "for _, labels in conversations)  # every",
        (PACKING, "-k", "token_before"),
    ),
    Fault(
        "features of the teacher in another order than videos",
        "data/collator.py",
        "            tubes.append(of_clips)\n            frames.append(of_frames)\n",
        "            tubes.insert(0, of_clips)\n            frames.insert(0, of_frames)\n",
        (COLLATOR, "-k", "order_of_videos"),
    ),
    Fault(
        "special tokens that people typed are special",
        "data/encoding.py",
        "bordered, sanitize_control_tokens=True, return_attention_mask=False",
        "bordered, return_attention_mask=False",
        (ENCODING, "-k", "labels_are_the or prompt_of_inference"),
    ),
    Fault(
        "two tokens at the start of a text",
        "data/encoding.py",
        'return {"add_special_tokens": False} if bos is not None and text.startswith(bos) else {}',
        "return {}",
        (ENCODING,),
    ),
    Fault(
        "the context of the first question alone is checked",
        "data/encoding.py",
        "longest = max(range(len(conversations)), key=lambda i: len(conversations[i].ids))",
        "longest = 0",
        (ENCODING, "-k", "independent or context or plan"),
    ),
    Fault(
        "a plan counts the video for every question",
        "data/encoding.py",
        "num_tokens = len(share_prefix(parts, processor.video_end_token_id)[0])",
        "num_tokens = sum(len(ids) for ids, _ in parts)",
        (ENCODING, "-k", "a_plan_is"),
    ),
    Fault(
        "what is shared ends with the first of several videos",
        "data/packing.py",
        "length = len(first) - first[::-1].index(last_shared) if",
        "length = first.index(last_shared) + 1 if",
        (PACKING, "-k", "last_video"),
    ),
    Fault(
        "media without a placeholder stand after the text",
        "data/schemas.py",
        "[*first, *_blocks(turn",
        "[*_blocks(turn",
        (ROWS, "-k", "swift"),
    ),
    Fault(
        "a batch of the right length is padded on",
        "data/collator.py",
        "length = -(-length // pad_to_multiple_of) * pad_to_multiple_of",
        "length = length // pad_to_multiple_of * pad_to_multiple_of + pad_to_multiple_of",
        (COLLATOR, "-k", "rounded_up"),
    ),
    Fault(
        "elva data check ends well though rows are wrong",
        "cli/data.py",
        "        raise typer.Exit(WRONG)\n",
        "        pass\n",
        (CHECKED, "-k", "everything_that"),
    ),
    Fault(
        "rows of several questions make a cache",
        "decoder_elva.py",
        "        use_cache = False\n    tubes",
        "    tubes",
        (SEGMENTS,),
    ),
    Fault(
        "merging does not shorten the prefix",
        "packing_elva.py",
        "return [[length - sum(questions), *questions] for length, questions in each]",
        "return [[int(row.sum()) - sum(part), *part] for (_, part), row in zip(each, self.valid, strict=True)]",
        (SEGMENTS, "-k", "gets_alone"),
    ),
)
