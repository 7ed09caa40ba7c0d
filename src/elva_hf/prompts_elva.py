"""Texts with the frames of their videos -> token ids, each within what a sample may cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from .errors_elva import PlaceholderError
from .fitting_elva import Sample, choose_frames
from .options_elva import Budgets
from .placeholders_elva import Prompt, VisualTokens, time_marks
from .sampled_elva import OpenVideo, SampledVideo

_CUTTING = frozenset({"padding", "truncation", "max_length", "stride", "pad_to_multiple_of"})
_UNBOUNDED = 10**9  # lengths from here on are the way tokenizers say that they have none


def count_mark_tokens(tokenizer: Any, videos: Sequence[SampledVideo]) -> int:
    """Tokens of the times that are written before the frames of videos.

    Raises:
        VideoError: A video has no times.
    """
    marks = [mark for video in videos for mark in time_marks(video) if mark]
    return sum(map(len, tokenizer(marks, add_special_tokens=False)["input_ids"])) if marks else 0


class PromptTokenizer:
    """A tokenizer with the options of a call, for texts that hold videos.

    Args:
        tokenizer: A tokenizer of transformers.
        tokens: The special tokens as it knows them.
        options: Those of the tokenizer, as the caller gave them.
    """

    def __init__(self, tokenizer: Any, tokens: VisualTokens, options: dict[str, Any]):
        self._tokenizer = tokenizer
        self._offsets_wanted = options.get("return_text_replacement_offsets", False)
        self._options = {name: value for name, value in options.items() if name != "return_text_replacement_offsets"}
        self._uncut = {name: value for name, value in self._options.items() if name not in _CUTTING}
        self._names = {tokenizer.convert_tokens_to_ids(token): token for token in tokens.written}

    def plan(self, prompts: Sequence[Prompt], videos: Sequence[OpenVideo], budgets: Budgets) -> list[SampledVideo]:
        """What is taken of each video, so that each sample keeps within its budgets and nothing visual is cut.

        Raises:
            ContextOverflowError: A sample is beyond a budget, or truncation would cut a video.
        """
        left, planned = iter(videos), []
        for number, prompt in enumerate(prompts):
            own = [next(left) for _ in prompt.slots]
            chosen = choose_frames(
                *self._sample(prompt, own, budgets, f"sample {number}: " if len(prompts) > 1 else "")
            )
            if prompt.timestamps:
                count_mark_tokens(self._tokenizer, chosen)  # a video without times is found before it is decoded
            planned += chosen
        return planned

    def tokenize(self, prompts: Sequence[Prompt], videos: Sequence[SampledVideo], *, pad: bool) -> dict[str, Any]:
        """Put the frames of each video in the place of its placeholder, tokenise, and check that no token was typed.

        Raises:
            PlaceholderError: The text itself holds a special token.
        """
        options = {"padding": pad and len(prompts) > 1, "return_token_type_ids": False, **self._options}
        left = iter(videos)
        expanded, offsets, expected = [], [], []
        for prompt in prompts:
            own = [next(left) for _ in prompt.slots]
            text, moved = prompt.expand(own)
            expanded.append(text)
            offsets.append(moved)
            expected.append(prompt.tokens.count(own))
        encoded = self._tokenizer(expanded, **options)
        for row, (ids, wanted) in enumerate(zip(encoded["input_ids"], expected, strict=True)):
            if self._special_tokens(ids) != wanted:
                self._raise_mismatch(row, expanded[row], wanted)
        return {**encoded, **({"text_replacement_offsets": offsets} if self._offsets_wanted else {})}

    def _sample(self, prompt: Prompt, videos: list[OpenVideo], budgets: Budgets, label: str) -> tuple[Sample, Budgets]:
        """A sample and its budgets, one of which is the length it is cut to, if it is.

        Where frames are not to be taken away, text may be cut, and only what must not be counts.
        """
        length = self._truncation_length()
        name = "the prompt"
        if length is not None and length <= (budgets.context_length or length):
            budgets = replace(budgets, context_length=length if videos else None, context_name="max_length")
            if budgets.overflow == "error":
                right = self._tokenizer.truncation_side == "right"
                prompt = prompt.visual_part(from_start=right)
                name = "the text up to its last frame" if right else "the text from its first frame on"

        def measure(chosen: Sequence[SampledVideo]) -> int:
            return len(self._ids(prompt.expand(chosen)[0]))

        @cache
        def text_tokens() -> int:
            return measure([replace(video.sample(), times=(), grids=(), indices=()) for video in videos])

        def estimate(chosen: Sequence[SampledVideo]) -> int:
            marks = count_mark_tokens(self._tokenizer, chosen) if prompt.timestamps else 0
            return text_tokens() + marks + sum(video.num_visual_tokens for video in chosen)

        return Sample(videos, measure, estimate, label, name), budgets

    def _truncation_length(self) -> int | None:
        """The length to which texts are cut, if they are."""
        if self._options.get("truncation") in (None, False, "do_not_truncate"):
            return None
        length = self._options.get("max_length") or self._tokenizer.model_max_length
        return length if length < _UNBOUNDED else None

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer([text], **self._uncut)["input_ids"][0]

    def _special_tokens(self, ids: list[int]) -> Counter[str]:
        return Counter(self._names[token] for token in ids if token in self._names)

    def _raise_mismatch(self, row: int, text: str, expected: Counter[str]) -> None:
        found = self._special_tokens(self._ids(text))
        typed = {token: found[token] - expected[token] for token in found if found[token] != expected[token]}
        raise PlaceholderError(
            f"sample {row}: the text itself holds special tokens of the processor ({typed}). Borders, <FRAME> and "
            "<LINE> are written by the processor only: remove them, or use apply_chat_template(..., "
            "sanitize_control_tokens=True) for text that people typed."
        )
