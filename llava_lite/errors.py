"""The errors a user can cause: one base class, one line each, no traceback on the command line."""


class LlavaLiteError(Exception):
    """Base of every error that llava_lite raises on purpose."""


def one_line(error: BaseException | str | None) -> str:
    """The first line of an error's message, without error numbers; its type if it has no message.

    Libraries put details below the first line, torch a whole C++ traceback."""
    if isinstance(error, OSError) and error.strerror:
        place = f"{error.filename}: " if error.filename is not None else ""
        return f"{place}{error.strerror}"
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


class ImageError(LlavaLiteError):
    """The image cannot be used: unreadable, truncated, too large, refused URL. Names the source."""


class PromptError(LlavaLiteError):
    """The prompt and the images given do not fit together. Names both counts."""

    @classmethod
    def of_counts(cls, markers: int, images: int) -> "PromptError":
        """As many `<image>` markers as images are needed, and these counts differ."""
        return cls(
            f"the prompt has {markers} <image> {'marker' if markers == 1 else 'markers'}, but "
            f"{images} {'image was' if images == 1 else 'images were'} given"
        )


class ContextError(LlavaLiteError):
    """Prompt, image and new tokens exceed the context. Names the three counts."""


class CheckpointError(LlavaLiteError):
    """A checkpoint is incomplete, damaged, misshapen or unsafe. Names the file and the tensor."""


class EvaluationError(LlavaLiteError):
    """A data set for evaluation cannot be used. Names the file and the line or the item."""
