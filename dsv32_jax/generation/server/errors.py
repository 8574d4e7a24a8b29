"""Errors in the form of the OpenAI API."""

import fastapi
from fastapi import responses
import pydantic
from starlette import exceptions

from dsv32_jax.generation.server import answers
from dsv32_jax.generation.server import runner

_TYPES = {
  400: "invalid_request_error",
  401: "authentication_error",
  404: "not_found_error",
  405: "invalid_request_error",
  408: "invalid_request_error",
  413: "invalid_request_error",
  429: "rate_limit_error",
  500: "server_error",
  503: "service_unavailable_error",
}
_SHOWN_CHARS = 500


class ApiError(Exception):
  """What a client is told instead of an answer."""

  def __init__(
    self,
    status: int,
    message: str,
    *,
    param: str | None = None,
    code: str | None = None,
  ):
    """Takes what to tell.

    Args:
      status: of HTTP.
      message: one line for people.
      param: the field of the request that is wrong.
      code: a word for programs.
    """
    super().__init__(message)
    self.status, self.param, self.code = status, param, code

  def body(self) -> dict:
    """Returns the error as a JSON-able value."""
    text = " ".join(str(self).split())
    if len(text) > _SHOWN_CHARS:
      text = text[:_SHOWN_CHARS] + "..."
    return {
      "error": {
        # What a client sent need not be text that UTF-8 can hold.
        "message": text.encode("utf-8", "replace").decode("utf-8"),
        "type": _TYPES.get(self.status, "invalid_request_error"),
        "param": self.param,
        "code": self.code,
      }
    }

  def response(self) -> responses.JSONResponse:
    headers = {"retry-after": "1"} if self.status in (429, 503) else {}
    if self.status == 401:
      headers["www-authenticate"] = "Bearer"
    return responses.JSONResponse(self.body(), self.status, headers)


def of(error: Exception) -> ApiError:
  """Returns what a client is told of an error, whatever it is."""
  match error:
    case ApiError():
      return error
    case pydantic.ValidationError():
      return _of_validation(error)
    case exceptions.HTTPException():
      return ApiError(error.status_code, str(error.detail))
    case runner.BusyError():
      return ApiError(429, f"too many requests: {error}", code="busy")
    case runner.NotAcceptingError():
      return ApiError(503, str(error), code="not_accepting")
    case answers.EngineError():
      return ApiError(500, str(error), code="engine_failed")
  return ApiError(500, "internal error")


def _of_validation(error: pydantic.ValidationError) -> ApiError:
  """Tells one of the mistakes that a schema found."""
  found = error.errors(include_url=False, include_input=False)
  # Of the members of a union, the one that fits furthest was meant.
  meant = max(reversed(found), key=lambda one: len(one["loc"]))["loc"][:-1]
  worst = next(one for one in found if one["loc"][:-1] == meant)
  if worst["type"] == "json_invalid":
    return ApiError(400, f"the body is not JSON: {worst['ctx']['error']}")
  message = worst["msg"].removeprefix("Value error, ")
  unknown = worst["type"] == "extra_forbidden"
  if unknown:
    message = "no such field is known"
  *outer, last = worst["loc"] or ("",)
  # The names of a union's members mean nothing to a client.
  place = [x for x in outer if not _is_member(x)]
  place += [last] if unknown or not _is_member(last) else []
  name = ".".join(map(str, place))
  return ApiError(
    400,
    f"{name}: {message}" if name else message,
    param=str(place[0]) if name else None,
    code=worst["type"],
  )


def _is_member(place: str | int) -> bool:
  return (
    isinstance(place, str)
    and (
      "[" in place
      or place in ("str", "constrained-str")
      # A model's; the fields of requests are in lower case.
      or place[:1].isupper()
    )
  )


def install(app: fastapi.FastAPI) -> None:
  """Makes an application tell its errors in this form."""

  async def handle(request, error):
    del request
    return of(error).response()

  for kind in (
    ApiError,
    exceptions.HTTPException,
    answers.EngineError,
    runner.NotAcceptingError,
    Exception,
  ):
    app.add_exception_handler(kind, handle)
