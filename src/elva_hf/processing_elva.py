"""Chat, text, videos and images -> model inputs: tokens that stand for frames, within what a sample may cost.

The text holds one `<video>` or `<image>` per video or image. Each becomes the video's borders and, between them, its
frames: `<FRAME>`, then rows of patch tokens, each closed by `<LINE>` (section 3.1).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import MultiModalData, ProcessorMixin, TextKwargs
from transformers.tokenization_utils_base import AddedToken
from transformers.video_processing_utils import VideoProcessorMixin

from .chat_elva import CHAT_TEMPLATE, TURN_TOKENS, check_continuation, check_conversation, take_media
from .configuration_elva import SPECIAL_TOKENS, ElvaConfig
from .errors_elva import ConfigurationError, ElvaError
from .fitting_elva import Sample, choose_frames
from .frames_elva import count_video_tokens
from .ledger_elva import TokenPlan, plan_tokens
from .options_elva import meant
from .placeholders_elva import (
    PerSample,
    Prompt,
    VisualTokens,
    check_not_empty,
    check_texts,
    distribute,
    flatten,
)
from .prompts_elva import PromptTokenizer, count_mark_tokens
from .sampled_elva import SampledVideo
from .video_processing_elva import ElvaVideoProcessor

_TEXT_OPTIONS = frozenset(TextKwargs.__annotations__) - {"return_mm_token_type_ids", "return_tensors"}


@dataclass(frozen=True)
class TokenCount:
    """What videos and images cost in context, known before anything is decoded.

    Args:
        videos: Per video or image, in order: frames, grids, tokens.
        num_mark_tokens: Tokens of the times written before frames.
    """

    videos: tuple[SampledVideo, ...]
    num_mark_tokens: int = 0

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
        """Positions in the context: frames, borders and time marks."""
        return sum(video.num_tokens for video in self.videos) + self.num_mark_tokens


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

    default_video_processor = ElvaVideoProcessor

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
        return cls(tokenizer, cls.default_video_processor(**options), chat_template=chat_template, **tokens)

    def __call__(self, images: Any = None, text: Any = None, videos: Any = None, **kwargs: Any) -> BatchFeature:
        """Tokenise text and put videos and images in the place of their placeholders.

        Args:
            images: An image, a list of images in the order of their placeholders, or one list per text.
            text: A text or a list of texts, with a `video_token` per video and an `image_token` per image.
            videos: A video, a list of videos, or one list of videos per text. A list of single frames is one video.
            **kwargs: Options of the tokenizer (`padding`, `truncation`, ...), of the video processor (`num_frames`,
                `longest_edge`, ...), either flat or as `text_kwargs` / `videos_kwargs`; `return_tensors`;
                `return_metadata`. Several texts are padded when tensors are asked for. Budgets hold for each text by
                itself; truncation never cuts a video, and with `overflow="fit"` frames go before text is cut.

        Returns:
            `input_ids` and `attention_mask` `(B, N)`; `pixel_values_videos` `(num_patches, 3 * patch_size**2)`, in the
            order of placeholders; `video_metadata`, a `SampledVideo` per video or image in that order, if asked for.

        Raises:
            PlaceholderError: Placeholders that do not match the videos and images.
            ContextOverflowError: A sample beyond a budget, or truncation that would cut a video; found before anything
                but the first frame of each video is decoded.
            VideoError: A video or image that cannot be used.
            ConfigurationError: An unknown option or value.
        """
        text_options, video_options, return_tensors = self._split_options(kwargs)
        if text is None:
            return self._process_media_alone(images, videos, video_options, return_tensors)
        timestamps = self.video_processor.resolve_options(**video_options).timestamps
        budgets = self.video_processor.resolve_budgets(**video_options)
        tokens = self.visual_tokens
        prompts = [Prompt(sample, tokens.find(sample), tokens, timestamps) for sample in check_texts(text)]
        media = list(distribute({"video": videos, "image": images}, prompts))
        check_not_empty(prompts)
        sources, is_image = [source for source, _ in media], [image for _, image in media]
        encoder = PromptTokenizer(self.tokenizer, tokens, text_options)
        pad = return_tensors is not None
        with self.video_processor.open(sources, images=is_image, **video_options) as opened:
            sampled = planned = encoder.plan(prompts, opened, budgets)
            data = encoder.tokenize(prompts, planned, pad=pad)  # what is wrong with the text shows before decoding
            if opened:
                pixels, sampled = self.video_processor.decode(opened, planned)
                if any(map(_differ, planned, sampled)):
                    data = encoder.tokenize(prompts, sampled, pad=pad)
                data["pixel_values_videos"] = pixels
        if video_options.get("return_metadata"):
            data["video_metadata"] = sampled
        return BatchFeature(data, tensor_type=return_tensors, skip_tensor_conversion=self.skip_tensor_conversion)

    def apply_chat_template(self, conversation: Any, chat_template: str | None = None, **kwargs: Any) -> Any:
        """Write a chat, or a list of chats, as text; with `tokenize=True, return_dict=True` as model inputs.

        Content is a string or a list of `{"type": "text", "text": ...}`, `{"type": "video", "video": ...}` and
        `{"type": "image", "image": ...}`, in any order; `path` and `url` name a source as well, and the options of a
        `VideoClip` may stand beside it. Options of the video processor may stand beside the arguments of
        `ProcessorMixin.apply_chat_template`. For text that people typed, pass `sanitize_control_tokens=True`: then a
        special token written in it stays text, also one that several blocks of text spell together.

        Raises:
            ElvaError: No messages, nothing in them, or messages of another form; and all that a call raises.
        """
        join_texts = bool(kwargs.get("sanitize_control_tokens"))
        conversation = check_conversation(conversation, join_texts=join_texts)
        if kwargs.get("continue_final_message") is True:
            check_continuation(conversation)
        visual = {
            name: kwargs.pop(name) for name in self.video_processor.valid_kwargs.__annotations__ if name in kwargs
        }
        # a new dictionary: the base writes into the one it gets
        kwargs["processor_kwargs"] = {**(kwargs.get("processor_kwargs") or {}), **visual}
        return super().apply_chat_template(conversation, chat_template, **kwargs)

    def count_tokens(self, videos: Any = None, images: Any = None, **options: Any) -> TokenCount:
        """Frames, their times, grids and tokens of the videos and images of one sample, without decoding them.

        Args:
            videos: As in a call.
            images: As in a call.
            **options: Those of the video processor. Budgets hold for all videos and images together, without text.

        Raises:
            VideoError: A video or image that cannot be used.
            ContextOverflowError: They are beyond a budget.
            ConfigurationError: An unknown option or value.
        """
        return self._count_tokens(videos, images, 0, options)

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
            text_tokens: Tokens of the text around them; borders and time marks are counted by themselves.
            **options: Those of the video processor.

        Raises:
            VideoError: A video or image that cannot be used.
            ContextOverflowError: They are beyond a budget.
            ConfigurationError: An unknown option or value, or a schedule that the model cannot have.
        """
        counted = self._count_tokens(videos, images, text_tokens, options)
        grids = [video.grids for video in counted.videos]
        text_tokens += counted.num_mark_tokens
        return plan_tokens(grids, config, merge_schedule, text_tokens, self.video_processor.layout)

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

    @property
    def visual_tokens(self) -> VisualTokens:
        """The special tokens as they stand in a text."""
        tokens = {name.removesuffix("_token"): getattr(self, name) for name in SPECIAL_TOKENS}
        return VisualTokens(**tokens, layout=self.video_processor.layout)

    def expand_video(self, grids: Sequence[tuple[int, int]], marks: Sequence[str] | None = None) -> str:
        """The text that stands for a video with frames of these `(rows, cols)`, each after its time mark if any."""
        return self.visual_tokens.expand(grids, marks)

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
            counts["num_image_tokens"] = [count_video_tokens([grid], layout=chosen.layout) for grid in grids]
            counts["num_image_patches"] = [rows * cols for rows, cols in grids]
        if video_sizes is not None:
            if chosen.timestamps:
                raise ConfigurationError(
                    "with timestamps=True tokens depend on the times of a video, not on sizes alone."
                )
            plans = [(chosen.sampling.plan(range(num_frames), None), size) for num_frames, *size in video_sizes]
            counts["num_video_tokens"] = [
                count_video_tokens((chosen.grid(*size, high) for high in plan.high), layout=chosen.layout)
                for plan, size in plans
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
                "its from_tokenizer(tokenizer), which adds them."
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
                raise ConfigurationError(
                    f"{name!r} is no option of the processor;{meant(name, [*visual, *_TEXT_OPTIONS])}"
                )
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
        items = [(item, True) for item in flatten(images, "image")] + [
            (item, False) for item in flatten(videos, "video")
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

    def _count_tokens(self, videos: Any, images: Any, text_tokens: int, options: dict[str, Any]) -> TokenCount:
        items = [(item, False) for item in flatten(videos, "video")] + [
            (item, True) for item in flatten(images, "image")
        ]
        timestamps = self.video_processor.resolve_options(**options).timestamps

        def count_marks(chosen: Sequence[SampledVideo]) -> int:
            return count_mark_tokens(self.tokenizer, chosen) if timestamps else 0

        def count(chosen: Sequence[SampledVideo]) -> int:
            return text_tokens + sum(video.num_tokens for video in chosen) + count_marks(chosen)

        sources, is_image = [item for item, _ in items], [image for _, image in items]
        with self.video_processor.open(sources, images=is_image, **options) as opened:
            chosen = choose_frames(Sample(opened, count, count), self.video_processor.resolve_budgets(**options))
        return TokenCount(tuple(chosen), count_marks(chosen))

    def _multimodal_inputs_from_conversations(
        self, conversations: list[list[dict[str, Any]]], *args: Any, **kwargs: Any
    ) -> tuple[list, list, list, dict]:
        """Take videos and images out of chats, in order, and leave their placeholders to the template."""
        media = take_media(conversations)
        return PerSample(media["image"]), PerSample(media["video"]), [], {}


def _differ(planned: SampledVideo, sampled: SampledVideo) -> bool:
    """Whether what was decoded is written differently from what was planned: frames missing, or chosen by scene."""
    return (planned.grids, planned.times) != (sampled.grids, sampled.times)
