"""Errors in the form of OpenAI's API."""


class ApiError(Exception):
    """A request that is answered with an error.

    Args:
      status: the HTTP status.
      message: one sentence.
      param: the field of the request that is wrong; None: no single one.
      code: OpenAI's code, such as `model_not_found`; None: none.
      kind: OpenAI's type of error.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        kind: str = "invalid_request_error",
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.kind = (
            status,
            message,
            param,
            code,
            kind,
        )

    def body(self) -> dict:
        """The body of the answer."""
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}


def overloaded(waiting: int) -> ApiError:
    return ApiError(
        429,
        f"all slots are in use and {waiting} requests wait: try again later.",
        code="rate_limit_exceeded",
        kind="rate_limit_error",
    )


def broken(message: str) -> ApiError:
    return ApiError(500, message, kind="server_error")


def closing() -> ApiError:
    return ApiError(503, "the server is shutting down.", kind="server_error")
