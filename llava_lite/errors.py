"""Errors that a user can cause. The program prints them in one line, without a traceback."""


class LlavaLiteError(Exception):
    """Base class of all errors of llava_lite."""


def one_line(error: BaseException | str | None) -> str:
    """The first line of an error's message, without error numbers; its type if it has no message.

    Libraries put details below the first line, torch a whole C++ traceback."""
    if isinstance(error, OSError) and error.strerror:
        place = f"{error.filename}: " if error.filename is not None else ""
        return f"{place}{error.strerror}"
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


class ImageError(LlavaLiteError):
    """An image that cannot be used: unreadable, truncated, too large, a refused URL."""


class PromptError(LlavaLiteError):
    """A prompt that is malformed or does not fit its images."""

    @classmethod
    def of_counts(cls, markers: int, images: int) -> "PromptError":
        """The error for `<image>` markers and images that differ in number."""
        return cls(
            f"the prompt has {markers} <image> {'marker' if markers == 1 else 'markers'}, but "
            f"{images} {'image was' if images == 1 else 'images were'} given"
        )


class ContextError(LlavaLiteError):
    """Prompt, images and new tokens that exceed the context. Names the three counts."""


class CheckpointError(LlavaLiteError):
    """A checkpoint that is incomplete, damaged or unsafe. Names the file and the tensor."""


class EvaluationError(LlavaLiteError):
    """A data set that cannot be used. Names the file and the line or the item."""
