"""Chat, text, videos and images -> model inputs: the chat template, and the tokens that stand for frames.

The text holds one `<video>` or `<image>` per video or image. Each becomes the video's borders and, between them, its
frames: `<FRAME>`, then rows of patch tokens, each closed by `<LINE>` (section 3.1).
"""

from __future__ import annotations

import copy
import difflib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import MultiModalData, ProcessorMixin, TextKwargs
from transformers.tokenization_utils_base import AddedToken
from transformers.utils.chat_template_utils import mark_control_tokens
from transformers.video_processing_utils import VideoProcessorMixin

from .configuration_elva import SPECIAL_TOKENS, ElvaConfig
from .errors_elva import ConfigurationError, ContextOverflowError, ElvaError, PlaceholderError
from .frames_elva import count_video_tokens
from .ledger_elva import TokenPlan, plan_tokens
from .video_processing_elva import ElvaVideoProcessor, SampledVideo, is_frame_list

TURN_TOKENS = ("<|im_start|>", "<|im_end|>")

CHAT_TEMPLATE = """\
{%- macro write(content) -%}
  {%- if content is string -%}{{ content }}
  {%- else -%}
    {%- for block in content -%}
      {%- if block.type == 'video' -%}{{ '<video>' }}
      {%- elif block.type == 'image' -%}{{ '<image>' }}
      {%- elif block.type == 'text' -%}{{ block.text }}
      {%- else -%}{{ raise_exception('content of type ' ~ block.type ~ ': expected text, video or image') }}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
  {{- '<|im_start|>' ~ message.role ~ '\\n' -}}
  {%- if message.role == 'assistant' -%}
    {%- generation -%}{{ write(message.content or '') }}{{ '<|im_end|>' }}{%- endgeneration -%}
  {%- else -%}
    {{- write(message.content or '') ~ '<|im_end|>' -}}
  {%- endif -%}
  {{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""
"""ChatML, as Qwen2 writes it, with no default system prompt; the end of an assistant's turn is part of the turn."""

_MARK = mark_control_tokens("x", re.compile("x"))[0]  # stands before tokens that a person typed, when sanitising
_TEXT_OPTIONS = frozenset(TextKwargs.__annotations__) - {"return_mm_token_type_ids", "return_tensors"}
_MEDIA_KEYS = {"video": ("video", "url", "path"), "image": ("image", "url", "path")}


@dataclass(frozen=True)
class TokenCount:
    """What videos and images cost in context, known before anything is decoded.

    Args:
        videos: Per video or image, in order: frames, grids, tokens.
    """

    videos: tuple[SampledVideo, ...]

    @property
    def num_frames(self) -> int:
        """Frames of all videos."""
        return sum(video.num_frames for video in self.videos)

    @property
    def num_visual_tokens(self) -> int:
        """Tokens of all frames, without borders: the count of Table 6."""
        return sum(video.num_visual_tokens for video in self.videos)

    @property
    def num_tokens(self) -> int:
        """Positions in the context: frames and borders."""
        return sum(video.num_tokens for video in self.videos)


class _PerSample(list):
    """Media grouped by sample; a plain list may also mean one video."""


class ElvaProcessor(ProcessorMixin):
    """A tokenizer and a video processor: text with `<video>` and `<image>` placeholders in, model inputs out.

    Args:
        tokenizer: A tokenizer that has the six special tokens; `from_tokenizer` adds them to any other.
        video_processor: An `ElvaVideoProcessor`.
        chat_template: Jinja template; ChatML if not given. It writes bare placeholders, borders are the processor's.
        video_token: Placeholder of a video in the text, and the token of a patch.
        image_token: Placeholder of an image in the text.
        frame_token: Opens a frame.
        line_token: Closes a row of patches.
        video_start_token: Opens a video or image.
        video_end_token: Closes it.
    """

    def __init__(
        self,
        tokenizer: Any = None,
        video_processor: Any = None,
        chat_template: str | dict[str, str] | None = None,
        video_token: str = SPECIAL_TOKENS["video_token"],
        image_token: str = SPECIAL_TOKENS["image_token"],
        frame_token: str = SPECIAL_TOKENS["frame_token"],
        line_token: str = SPECIAL_TOKENS["line_token"],
        video_start_token: str = SPECIAL_TOKENS["video_start_token"],
        video_end_token: str = SPECIAL_TOKENS["video_end_token"],
    ):
        self.video_token = video_token
        self.image_token = image_token
        self.frame_token = frame_token
        self.line_token = line_token
        self.video_start_token = video_start_token
        self.video_end_token = video_end_token
        self._set_token_ids(tokenizer)
        if chat_template is None:
            chat_template = self._default_chat_template(tokenizer)
        super().__init__(tokenizer, video_processor, chat_template=chat_template)

    @classmethod
    def from_tokenizer(cls, tokenizer: Any, **options: Any) -> ElvaProcessor:
        """Make a processor from any text tokenizer, which is copied, not changed.

        The special tokens it lacks are added, and ChatML's turn marks; padding is `eos_token` if it has none, and goes
        on the left. Train the new tokens, and let generation stop at `<|im_end|>`.

        Args:
            tokenizer: A tokenizer of transformers.
            **options: Those of `ElvaVideoProcessor`, and `chat_template` and the token strings of `ElvaProcessor`.
        """
        tokens = {name: options.pop(name, token) for name, token in SPECIAL_TOKENS.items()}
        chat_template = options.pop("chat_template", None)
        tokenizer = copy.deepcopy(tokenizer)
        known = tokenizer.get_added_vocab()
        needed = [*(TURN_TOKENS if chat_template is None else ()), *tokens.values()]
        missing = [AddedToken(token, special=True, normalized=False) for token in needed if token not in known]
        tokenizer.add_tokens(missing, special_tokens=True)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.padding_side = "left"
        return cls(tokenizer, ElvaVideoProcessor(**options), chat_template=chat_template, **tokens)

    def __call__(self, images: Any = None, text: Any = None, videos: Any = None, **kwargs: Any) -> BatchFeature:
        """Tokenise text and put videos and images in the place of their placeholders.

        Args:
            images: An image, a list of images in the order of their placeholders, or one list per text.
            text: A text or a list of texts, with a `video_token` per video and an `image_token` per image.
            videos: A video, a list of videos, or one list of videos per text. A list of single frames is one video.
            **kwargs: Options of the tokenizer (`padding`, `truncation`, ...), of the video processor (`num_frames`,
                `longest_edge`, ...), either flat or as `text_kwargs` / `videos_kwargs`; `return_tensors`;
                `return_metadata`. Several texts are padded when tensors are asked for.

        Returns:
            `input_ids` and `attention_mask` `(B, N)`; `pixel_values_videos` `(num_patches, 3 * patch_size**2)`, in the
            order of placeholders; `video_metadata`, a `SampledVideo` per video or image in that order, if asked for.

        Raises:
            PlaceholderError: Placeholders that do not match the videos and images.
            ContextOverflowError: Truncation would cut a video.
            VideoError: A video or image that cannot be used.
            ConfigurationError: An unknown option or value.
        """
        text_options, video_options, return_tensors = self._split_options(kwargs)
        if text is None:
            return self._process_media_alone(images, videos, video_options, return_tensors)
        texts = _check_texts(text)
        slots = [self._find_placeholders(sample) for sample in texts]
        kinds = [[kind for kind, _ in sample] for sample in slots]
        media = {
            "video": self._distribute(videos, [sample.count("video") for sample in kinds], "video"),
            "image": self._distribute(images, [sample.count("image") for sample in kinds], "image"),
        }
        _check_not_empty(texts, kinds)
        order = [kind for sample in kinds for kind in sample]
        queues = {kind: iter(items) for kind, items in media.items()}
        sources = [next(queues[kind]) for kind in order]
        data: dict[str, Any] = {}
        sampled: list[SampledVideo] = []
        if sources:
            is_image = [kind == "image" for kind in order]
            pixels, sampled = self.video_processor.encode(sources, images=is_image, **video_options)
            data["pixel_values_videos"] = pixels
        data = {**self._tokenize(texts, slots, sampled, text_options, pad=return_tensors is not None), **data}
        if video_options.get("return_metadata"):
            data["video_metadata"] = sampled
        return BatchFeature(data, tensor_type=return_tensors, skip_tensor_conversion=self.skip_tensor_conversion)

    def apply_chat_template(self, conversation: Any, chat_template: str | None = None, **kwargs: Any) -> Any:
        """Write a chat, or a list of chats, as text; with `tokenize=True, return_dict=True` as model inputs.

        Content is a string or a list of `{"type": "text", "text": ...}`, `{"type": "video", "video": ...}` and
        `{"type": "image", "image": ...}`, in any order; `path` and `url` name a source as well. Options of the video
        processor may stand beside the arguments of `ProcessorMixin.apply_chat_template`. For text that people typed,
        pass `sanitize_control_tokens=True`: then a special token written in it stays text.

        Raises:
            ElvaError: No messages, or nothing in them; and all that a call of the processor raises.
        """
        if isinstance(conversation, (list, tuple)) and not conversation:
            raise ElvaError("the chat has no messages; give at least one user message.")
        visual = {
            name: kwargs.pop(name) for name in self.video_processor.valid_kwargs.__annotations__ if name in kwargs
        }
        # a new dictionary: the base writes into the one it gets
        kwargs["processor_kwargs"] = {**(kwargs.get("processor_kwargs") or {}), **visual}
        return super().apply_chat_template(conversation, chat_template, **kwargs)

    def count_tokens(self, videos: Any = None, images: Any = None, **options: Any) -> TokenCount:
        """Frames, their times, grids and tokens of videos and images, without decoding them.

        Args:
            videos: As in a call.
            images: As in a call.
            **options: Those of the video processor.

        Raises:
            VideoError: A video or image that cannot be used.
            ConfigurationError: An unknown option or value.
        """
        counts = [(item, False) for item in _flatten(videos, "video")] + [
            (item, True) for item in _flatten(images, "image")
        ]
        return TokenCount(tuple(self.video_processor.sample(item, image=image, **options) for item, image in counts))

    def plan(
        self,
        videos: Any = None,
        images: Any = None,
        *,
        config: ElvaConfig | None = None,
        merge_schedule: Any = None,
        text_tokens: int = 0,
        **options: Any,
    ) -> TokenPlan:
        """What a prompt with these videos and images costs, before anything is decoded or run.

        Tokens of each frame and, with a model's `config`, of each layer; FLOPs and bytes of keys and values. Where
        merging depends on the pixels these are bounds; `ledger_elva.exact_plan` puts what a run kept in their place.

        Args:
            videos: As in a call, all of one sample.
            images: Likewise.
            config: Of the model; without it only tokens are counted.
            merge_schedule: Instead of the configuration's own: a preset, steps, or a `MergeSchedule`.
            text_tokens: Tokens of the text around them; borders are counted by themselves.
            **options: Those of the video processor.

        Raises:
            VideoError: A video or image that cannot be used.
            ConfigurationError: An unknown option or value, or a schedule that the model cannot have.
        """
        counted = self.count_tokens(videos, images, **options)
        return plan_tokens([video.grids for video in counted.videos], config, merge_schedule, text_tokens)

    @property
    def model_input_names(self) -> list[str]:
        """What a call returns for the model."""
        return ["input_ids", "attention_mask", "pixel_values_videos"]

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        """Check a part of the processor by its class; the base cannot look up video processors without torchvision."""
        if argument_name != "video_processor":
            return super().check_argument_for_proper_class(argument_name, argument)
        if not isinstance(argument, VideoProcessorMixin):
            raise TypeError(f"video_processor is a {type(argument).__name__}; expected an ElvaVideoProcessor.")
        return VideoProcessorMixin

    def expand_video(self, grids: Sequence[tuple[int, int]]) -> str:
        """The text that stands for a video with frames of these `(rows, cols)`."""
        frames = (self.frame_token + (self.video_token * cols + self.line_token) * rows for rows, cols in grids)
        return self.video_start_token + "".join(frames) + self.video_end_token

    def _get_num_multimodal_tokens(
        self,
        image_sizes: Sequence[tuple[int, int]] | None = None,
        video_sizes: Sequence[tuple[int, int, int]] | None = None,
        **options: Any,
    ) -> MultiModalData:
        """Tokens of images `(height, width)` and videos `(frames, height, width)`; serving engines ask for them."""
        chosen = self.video_processor.resolve_options(**options)
        grids = [chosen.grid(height, width, True) for height, width in image_sizes or ()]
        counts: dict[str, list[int]] = {}
        if image_sizes is not None:
            counts["num_image_tokens"] = [count_video_tokens([grid]) for grid in grids]
            counts["num_image_patches"] = [rows * cols for rows, cols in grids]
        if video_sizes is not None:
            plans = [(chosen.sampling.plan(range(num_frames), None), size) for num_frames, *size in video_sizes]
            counts["num_video_tokens"] = [
                count_video_tokens(chosen.grid(*size, high) for high in plan.high) for plan, size in plans
            ]
        return MultiModalData(**counts)

    def _set_token_ids(self, tokenizer: Any) -> None:
        known = tokenizer.get_added_vocab() if tokenizer is not None else {}
        strings = {name: getattr(self, name) for name in SPECIAL_TOKENS}
        if len(set(strings.values())) < len(strings):
            raise ConfigurationError(f"the special tokens must differ from each other; they are {strings}.")
        missing = [token for token in strings.values() if token not in known]
        if tokenizer is not None and missing:
            raise ConfigurationError(
                f"the tokenizer has no special token {', '.join(missing)}; make the processor with "
                "ElvaProcessor.from_tokenizer(tokenizer), which adds them."
            )
        for name, token in strings.items():
            setattr(self, f"{name}_id", known.get(token))

    def _default_chat_template(self, tokenizer: Any) -> str:
        written = {SPECIAL_TOKENS["video_token"]: self.video_token, SPECIAL_TOKENS["image_token"]: self.image_token}
        template = CHAT_TEMPLATE
        for default, token in written.items():
            template = template.replace(repr(default), repr(token))
        bos = getattr(tokenizer, "bos_token_id", None)
        adds_bos = bos is not None and tokenizer("")["input_ids"][:1] == [bos]
        return ("{{- bos_token -}}\n" if adds_bos else "") + template

    def _split_options(self, options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], str | None]:
        """Sort keywords into those of the tokenizer, those of the video processor, and `return_tensors`."""
        groups = {
            name: dict(options.pop(name, None) or {}) for name in ("text_kwargs", "videos_kwargs", "images_kwargs")
        }
        options = {**options.pop("common_kwargs", {}), **options}
        if options.pop("audio", None) is not None:
            raise ConfigurationError("ELVA has no ears: audio is not supported.")
        text, video = groups["text_kwargs"], {**groups["images_kwargs"], **groups["videos_kwargs"]}
        visual = self.video_processor.valid_kwargs.__annotations__
        for name, value in options.items():
            if name in visual:
                video[name] = value
            elif name in _TEXT_OPTIONS or name == "return_tensors":
                text[name] = value
            else:
                close = difflib.get_close_matches(name, [*visual, *_TEXT_OPTIONS], n=1)
                meant = f" did you mean {close[0]}?" if close else ""
                raise ConfigurationError(f"{name!r} is no option of the processor;{meant or ' remove it.'}")
        if (
            text.get("text_pair") is not None
            or text.get("is_split_into_words")
            or text.get("return_overflowing_tokens")
        ):
            raise ConfigurationError("text pairs, split words and overflowing tokens cannot be combined with videos.")
        video.pop("return_tensors", None)
        return text, video, text.pop("return_tensors", None)

    def _process_media_alone(
        self, images: Any, videos: Any, options: dict[str, Any], return_tensors: str | None
    ) -> BatchFeature:
        items = [(item, True) for item in _flatten(images, "image")] + [
            (item, False) for item in _flatten(videos, "video")
        ]
        if not items:
            raise ElvaError("nothing to process: give text, videos or images.")
        pixels, sampled = self.video_processor.encode(
            [item for item, _ in items], images=[image for _, image in items], **options
        )
        data = {"pixel_values_videos": pixels}
        if options.get("return_metadata"):
            data["video_metadata"] = sampled
        return BatchFeature(data, tensor_type=return_tensors, skip_tensor_conversion=self.skip_tensor_conversion)

    def _find_placeholders(self, text: str) -> list[tuple[str, tuple[int, int]]]:
        """Kind and span of each placeholder in the text."""
        tokens = {"video": self.video_token, "image": self.image_token}
        pattern = "|".join(f"(?P<{kind}>(?<!{_MARK}){re.escape(token)})" for kind, token in tokens.items())
        return [(match.lastgroup or "", match.span()) for match in re.finditer(pattern, text)]

    def _distribute(self, media: Any, counts: list[int], kind: str) -> list[Any]:
        """Media of one kind in the order of placeholders, checked against the `counts` of each sample."""
        token = getattr(self, f"{kind}_token")
        groups = _group(media, kind)
        if groups is None:
            items = _flatten(media, kind)
            if len(items) == sum(counts):
                return items
            if len(counts) > 1:
                raise PlaceholderError(
                    f"the {len(counts)} texts hold {counts} {token} placeholders, {sum(counts)} in all, but "
                    f"{len(items)} {kind}s were given. Write one {token} for each {kind}, or give one list of {kind}s "
                    "per text."
                )
            groups = [items]
        if len(groups) != len(counts):
            raise PlaceholderError(
                f"{kind}s are given for {len(groups)} texts, but there are {len(counts)}; give one list per text."
            )
        for sample, (group, count) in enumerate(zip(groups, counts, strict=True)):
            if len(group) != count:
                fix = f"Remove a {token}" if count > len(group) else f"Write a {token} where each {kind} belongs"
                raise PlaceholderError(
                    f"sample {sample}: the text holds {count} {token} placeholders, but {len(group)} {kind}s were "
                    f"given. {fix}, give as many {kind}s, or use apply_chat_template, which writes the placeholders."
                )
        return [item for group in groups for item in group]

    def _tokenize(
        self,
        texts: list[str],
        slots: list[list[tuple[str, tuple[int, int]]]],
        sampled: list[SampledVideo],
        options: dict[str, Any],
        *,
        pad: bool,
    ) -> dict[str, Any]:
        """Put the frames of each video in the place of its placeholder, tokenise, and check that nothing was lost."""
        offsets_wanted = options.pop("return_text_replacement_offsets", False)
        options = {"padding": pad and len(texts) > 1, "return_token_type_ids": False, **options}
        videos = iter(sampled)
        expanded, offsets, expected = [], [], []
        for text, sample in zip(texts, slots, strict=True):
            own = [next(videos) for _ in sample]
            replaced, moved = self._replace(text, sample, own)
            expanded.append(replaced)
            offsets.append(moved)
            expected.append(self._expected_tokens(own))
        encoded = self.tokenizer(expanded, **options)
        for row, (ids, wanted) in enumerate(zip(encoded["input_ids"], expected, strict=True)):
            if self._special_tokens(ids) != wanted:
                self._raise_mismatch(row, expanded[row], ids, wanted, options)
        data = dict(encoded)
        if offsets_wanted:
            data["text_replacement_offsets"] = offsets
        return data

    def _replace(
        self, text: str, slots: list[tuple[str, tuple[int, int]]], videos: list[SampledVideo]
    ) -> tuple[str, list[dict[str, Any]]]:
        """Expanded text, and where each placeholder went, as `ProcessorMixin` wants it for assistant masks."""
        parts, moved, last, length = [], [], 0, 0
        for (kind, (start, end)), video in zip(slots, videos, strict=True):
            replacement = self.expand_video(video.grids)
            parts += [text[last:start], replacement]
            new_start = length + start - last
            length, last = new_start + len(replacement), end
            moved.append(
                {
                    "type": kind,
                    "span": (start, end),
                    "new_span": (new_start, length),
                    "text": text[start:end],
                    "replacement": replacement,
                }
            )
        return "".join([*parts, text[last:]]), moved

    def _expected_tokens(self, videos: list[SampledVideo]) -> Counter[str]:
        expected: Counter[str] = Counter()
        for video in videos:
            expected[self.video_start_token] += 1
            expected[self.video_end_token] += 1
            expected[self.frame_token] += video.num_frames
            expected[self.line_token] += sum(rows for rows, _ in video.grids)
            expected[self.video_token] += video.num_patches
        return expected

    def _special_tokens(self, ids: list[int]) -> Counter[str]:
        names = {getattr(self, f"{name}_id"): getattr(self, name) for name in SPECIAL_TOKENS}
        return Counter(names[token] for token in ids if token in names)

    def _raise_mismatch(
        self, row: int, text: str, ids: list[int], expected: Counter[str], options: dict[str, Any]
    ) -> None:
        cut = {"padding", "truncation", "max_length", "stride", "pad_to_multiple_of"}
        whole = self.tokenizer([text], **{name: value for name, value in options.items() if name not in cut})
        found = self._special_tokens(whole["input_ids"][0])
        if found == expected:
            raise ContextOverflowError(
                f"sample {row} needs {len(whole['input_ids'][0])} tokens, {expected.total()} of them visual, and "
                f"truncation to {len(ids)} would cut a video. Raise max_length, or use fewer frames (num_frames) or "
                "smaller ones (longest_edge)."
            )
        typed = {token: found[token] - expected[token] for token in found if found[token] != expected[token]}
        raise PlaceholderError(
            f"sample {row}: the text itself holds special tokens of the processor ({typed}). Borders, <FRAME> and "
            "<LINE> are written by the processor only: remove them, or use apply_chat_template(..., "
            "sanitize_control_tokens=True) for text that people typed."
        )

    def _multimodal_inputs_from_conversations(
        self, conversations: list[list[dict[str, Any]]], *args: Any, **kwargs: Any
    ) -> tuple[list, list, list, dict]:
        """Take videos and images out of chats, in order, and leave their placeholders to the template."""
        batch = {"image": _PerSample(), "video": _PerSample()}
        for number, conversation in enumerate(conversations):
            found: dict[str, list] = {"image": [], "video": []}
            has_text = False
            for message in conversation:
                content = message.get("content") or []
                blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
                for block in blocks:
                    has_text = has_text or bool(str(block.get("text") or "").strip())
                    if block.get("type") in found:
                        found[block["type"]].extend(_media_of(block))
                if not isinstance(content, str):
                    message["content"] = [_without_media(block) for block in content]
            if not has_text and not any(found.values()):
                raise ElvaError(f"chat {number} is empty: no text, no video, no image; ask something.")
            for kind, items in found.items():
                batch[kind].append(items)
        return batch["image"], batch["video"], [], {}


def _check_texts(text: Any) -> list[str]:
    texts = [text] if isinstance(text, str) else list(text) if isinstance(text, (list, tuple)) else None
    if not texts or not all(isinstance(sample, str) for sample in texts):
        raise ElvaError(f"text is {type(text).__name__} of {text!r:.60}; expected a str or a list of at least one str.")
    return texts


def _check_not_empty(texts: list[str], kinds: list[list[str]]) -> None:
    for sample, (text, found) in enumerate(zip(texts, kinds, strict=True)):
        if not found and not text.strip():
            raise ElvaError(f"sample {sample} is empty: no text and no video; ask something.")


def _group(media: Any, kind: str) -> list[list[Any]] | None:
    """Media as one list per sample, or None if they are not grouped."""
    if isinstance(media, _PerSample):
        return list(media)
    if not isinstance(media, (list, tuple)) or not media:
        return None
    inner = [
        item for item in media if isinstance(item, (list, tuple)) and not (kind == "video" and is_frame_list(item))
    ]
    if not inner:
        return None
    return [list(item) if isinstance(item, (list, tuple)) else [item] for item in media]


def _flatten(media: Any, kind: str) -> list[Any]:
    """Media as one list."""
    if media is None:
        return []
    groups = _group(media, kind)
    if groups is not None:
        return [item for group in groups for item in group]
    if not isinstance(media, (list, tuple)):
        return [media]
    return [media] if kind == "video" and is_frame_list(media) else list(media)


def _media_of(block: dict[str, Any]) -> list[Any]:
    """The source in a block of content; none if it is given elsewhere."""
    kind = block["type"]
    found = [key for key in _MEDIA_KEYS[kind] if block.get(key) is not None]
    if len(found) > 1:
        raise PlaceholderError(f"a {kind} block has several sources, {', '.join(found)}; give one.")
    return [block[key] for key in found]


def _without_media(block: dict[str, Any]) -> dict[str, Any]:
    return {"type": block["type"]} if block.get("type") in _MEDIA_KEYS else block
