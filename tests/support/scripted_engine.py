"""An engine that writes what a test says, a token a step, and counts pages."""

import time

import numpy as np

from dsv32_jax.generation import requests


class ScriptedEngine:
  """Answers each request with the tokens that a function of its prompt gives.

  Where a request's constraint leaves no choice, or allows other tokens than the
  script's next one, it takes the first that is allowed; the script goes on
  behind it.

  Attributes:
    seen: all requests that were taken.
    fail: whether the next step raises.
    hold: whether requests wait instead of going on.
  """

  def __init__(self, script, eos_id, max_length=4096):
    self.seen, self.fail, self.hold = [], False, False
    self._script, self._eos_id, self._max_length = script, eos_id, max_length
    self._left, self._limits, self._ended = {}, {}, []
    self._requests, self._drawn = {}, {}

  @property
  def has_work(self):
    return bool(self._left or self._ended)

  def submit(self, request):
    requests.check(
      request,
      vocab_size=1 << 22,
      max_length=self._max_length,
      room=self._max_length,
      has_text=True,
    )
    self.seen.append(request)
    self._left[request.request_id] = list(self._script(request.prompt_ids))
    self._limits[request.request_id] = request.sampling.max_tokens
    self._requests[request.request_id] = request
    self._drawn[request.request_id] = []
    return request.request_id

  def cancel(self, request_id):
    del self._left[request_id]
    self._ended.append(request_id)

  def step(self):
    time.sleep(1e-4)  # as a device: other threads run meanwhile
    if self.fail:
      raise RuntimeError("device lost")
    events = [_event(name, None, "cancelled") for name in self._ended]
    self._ended.clear()
    for name, left in () if self.hold else list(self._left.items()):
      token = self._next(name, left)
      self._limits[name] -= 1
      reason = None
      if token == self._eos_id or not left:
        reason = "stop"
      elif not self._limits[name]:
        reason = "length"
      if reason:
        del self._left[name]
      count = self._requests[name].sampling.top_logprobs
      events.append(_event(name, token, reason, count))
    return events

  def _next(self, name, left):
    drawn, constraint = self._drawn[name], self._requests[name].constraint
    allowed_W = constraint and constraint.allowed(drawn)
    if allowed_W is None:
      drawn.append(left.pop(0))
      return drawn[-1]
    bits = np.unpackbits(allowed_W.view(np.uint8), bitorder="little")
    allowed = np.flatnonzero(bits).tolist()
    if len(allowed) > 1 and left[0] in allowed:
      drawn.append(left.pop(0))
    else:
      drawn.append(allowed[0])
    return drawn[-1]

  def stats(self):
    return {"pages_used": len(self._left), "drawn_tokens": 7}


def _event(name, token_id, reason, count=0):
  return requests.TokenEvent(
    request_id=name,
    token_id=token_id,
    logprob=-0.5,
    finish_reason=reason,
    top_logprobs=tuple((n, -0.5 - n) for n in range(40, 40 + count)),
  )
