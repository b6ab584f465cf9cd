"""Errors as an HTTP status and OpenAI's error object."""

import logging
import traceback

from fastapi.responses import JSONResponse

from llava_lite.errors import ContextError, ImageError, LlavaLiteError, PromptError, one_line
from llava_lite.inputs.fetch import shorten

LOG = logging.getLogger("llava_lite.server")

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    504: "timeout_error",
}
USERS = (ImageError, PromptError, ContextError)  # errors of a bad request


class ApiError(LlavaLiteError):
    """An error with an HTTP status. `param` names the field, `code` is for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after = retry_after

    def body(self) -> dict[str, dict[str, str | None]]:
        """OpenAI's error object."""
        kind = TYPES.get(self.status, "invalid_request_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> JSONResponse:
        """The same with its status and headers."""
        headers = {}
        if self.retry_after is not None:
            headers["Retry-After"] = str(self.retry_after)
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body(), self.status, headers)


class ClientGone(Exception):
    """The client has disconnected."""


def as_api_error(error: BaseException) -> ApiError:
    """An error while a request is prepared, as the client may see it."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, USERS):
        code = "context_length_exceeded" if isinstance(error, ContextError) else None
        return ApiError(400, one_line(error), code=code)
    return internal_error(error)


def internal_error(error: BaseException) -> ApiError:
    """Log the details of a bug or failure; tell the client only that the server failed."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    LOG.error("internal error%s: %s: %s", place, type(error).__name__, shorten(str(error)))
    LOG.debug("its traceback", exc_info=error)
    return ApiError(500, "the server failed to answer this request")
