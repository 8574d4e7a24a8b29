"""HTTP connections that a client cannot hold for nothing.

The server below gives an idle connection up, but not one whose request comes a
byte at a time or whose client reads nothing: a few hundred of those would take
all that a process may have open. The time of a body is for `gate` to bound.
"""

import asyncio

from uvicorn.protocols.http import h11_impl


class Connection(h11_impl.H11Protocol):
  """Ends where a request's head does not come, or what is sent not leave.

  Attributes:
    head_seconds: from the connection, or the end of an answer, to the end of
      the next request's head.
    write_seconds: that a client may leave what it is sent unread.
  """

  head_seconds = 30.0
  write_seconds = 60.0

  def __init__(self, *args, **kwargs):
    """Takes what uvicorn gives."""
    super().__init__(*args, **kwargs)
    self._head: asyncio.TimerHandle | None = None
    self._write: asyncio.TimerHandle | None = None

  def connection_made(self, transport) -> None:
    super().connection_made(transport)
    self._await_head()

  def connection_lost(self, exc) -> None:
    for timer in (self._head, self._write):
      if timer is not None:
        timer.cancel()
    super().connection_lost(exc)

  def handle_events(self) -> None:
    super().handle_events()
    if self.cycle is not None and not self.cycle.response_complete:
      self._head.cancel()

  def on_response_complete(self) -> None:
    # First: the next request may be there already, and ends the wait.
    self._await_head()
    super().on_response_complete()

  def pause_writing(self) -> None:
    super().pause_writing()
    self._write = self.loop.call_later(self.write_seconds, self.transport.abort)

  def resume_writing(self) -> None:
    super().resume_writing()
    if self._write is not None:
      self._write.cancel()

  def _await_head(self) -> None:
    if self._head is not None:
      self._head.cancel()
    self._head = self.loop.call_later(self.head_seconds, self.transport.abort)
