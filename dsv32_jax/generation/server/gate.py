"""What stands before the application: keys, size and time of a body."""

import asyncio
from collections.abc import Sequence
import hashlib
import hmac

from dsv32_jax.generation.server import errors

_OPEN_PATHS = ("/health",)


class Gate:
  """ASGI middleware that lets through whole, bounded requests with a key."""

  def __init__(
    self,
    app,
    *,
    api_keys: Sequence[str],
    max_body_bytes: int,
    body_seconds: float,
    max_held_bytes: int,
  ):
    """Takes the limits.

    Args:
      app: the application behind it.
      api_keys: one of these has to be given as a bearer; none: no key needed.
      max_body_bytes: of a body, however it is sent.
      body_seconds: until a body is there.
      max_held_bytes: of the bodies of all requests that are not answered.
    """
    self._app = app
    # Digests are of one length, so that a comparison tells nothing of a key.
    self._keys = [_digest(key) for key in api_keys]
    self._max_bytes, self._seconds = max_body_bytes, body_seconds
    self._max_held, self._held = max_held_bytes, 0

  async def __call__(self, scope, receive, send):
    if scope["type"] != "http":
      await self._app(scope, receive, send)
      return
    held = _Held()
    try:
      try:
        self._check_key(scope)
        body = await self._body(scope, receive, held)
      except errors.ApiError as error:
        await error.response()(scope, receive, send)
        return
      if body is not None:  # else the client is gone
        await self._app(scope, _replay(body, receive), send)
    finally:
      self._held -= held.bytes

  def _check_key(self, scope) -> None:
    if not self._keys or scope["path"] in _OPEN_PATHS:
      return
    kind, _, key = _header(scope, b"authorization").partition(" ")
    given = _digest(key.strip())
    # All are compared, whichever fits.
    fits = [hmac.compare_digest(given, one) for one in self._keys]
    if kind.lower() != "bearer" or not any(fits):
      raise errors.ApiError(
        401, "no valid API key is given as a bearer", code="invalid_api_key"
      )

  async def _body(self, scope, receive, held: "_Held") -> bytes | None:
    """Reads the body; None where the client goes before it is whole."""
    length = _header(scope, b"content-length")
    if length.isdecimal() and int(length) > self._max_bytes:
      raise self._too_large()
    chunks = []
    try:
      async with asyncio.timeout(self._seconds):
        while True:
          message = await receive()
          if message["type"] == "http.disconnect":
            return None
          chunks.append(message.get("body", b""))
          held.bytes += len(chunks[-1])
          self._held += len(chunks[-1])
          if held.bytes > self._max_bytes:
            raise self._too_large()
          if self._held > self._max_held:
            raise errors.ApiError(
              429, "too many requests: their bodies are too large", code="busy"
            )
          if not message.get("more_body"):
            return b"".join(chunks)
    except TimeoutError:
      raise errors.ApiError(
        408, f"the body was not there within {self._seconds:g} s"
      ) from None

  def _too_large(self) -> errors.ApiError:
    return errors.ApiError(
      413,
      f"the body has more than {self._max_bytes} bytes",
      code="request_too_large",
    )


class _Held:
  """Bytes of one request's body."""

  bytes = 0


def _replay(body: bytes, receive):
  """Gives the body out at once, and then what comes."""
  messages = [{"type": "http.request", "body": body, "more_body": False}]

  async def replay():
    return messages.pop() if messages else await receive()

  return replay


def _digest(key: str) -> bytes:
  return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _header(scope, name: bytes) -> str:
  found = [value for key, value in scope["headers"] if key == name]
  return found[0].decode("latin-1") if found else ""
