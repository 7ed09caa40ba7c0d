"""Every error elva-hf raises on bad input: one tree, so that callers can catch at the level they need."""


class ElvaError(ValueError):
    """Base of all errors that a caller can cause and mend."""


class ConfigurationError(ElvaError):
    """A configuration value, or a combination of values, that no model can have."""


class VideoError(ElvaError):
    """A video or image that cannot be read or used.

    Args:
        message: What is wrong, naming the value and the expectation.
        reason: Short machine-readable code, for example `"not_found"`, `"no_video_stream"`, `"bad_array"`.
        source: The input as shown to people; never bytes, never credentials.
        hint: What to do about it; appended to the message.
    """

    def __init__(self, message: str, *, reason: str = "unreadable", source: str | None = None, hint: str | None = None):
        super().__init__(message if hint is None else f"{message} {hint}")
        self.reason = reason
        self.source = source
        self.hint = hint


class PlaceholderError(ElvaError):
    """Visual placeholders in the text that do not match the pixels given with it."""


class ContextOverflowError(ElvaError):
    """A request that needs more tokens than the model has positions for."""


class CheckpointError(ElvaError):
    """A checkpoint folder that cannot be loaded, or is not what it says."""
