"""The engine's thread under many callers, on an engine that counts pages."""

import queue

import pytest

from dsv32_jax.generation import requests
from dsv32_jax.generation.server import runner as runner_lib


class FakeEngine:
  """Draws 0, 1, 2, ... and holds a page for each live request."""

  def __init__(self, fail_at=None):
    self.pages, self.ended, self.steps = {}, [], 0
    self.fail_at = fail_at

  @property
  def has_work(self):
    return bool(self.pages or self.ended)

  def submit(self, request):
    if not request.prompt_ids:
      raise ValueError("the prompt is empty")
    self.pages[request.request_id] = [0, request.sampling.max_tokens]
    return request.request_id

  def cancel(self, request_id):
    del self.pages[request_id]
    self.ended.append(request_id)

  def step(self):
    self.steps += 1
    if self.steps == self.fail_at:
      raise RuntimeError("device lost")
    events = [event(one, None, "cancelled") for one in self.ended]
    self.ended.clear()
    for one, (drawn, limit) in list(self.pages.items()):
      last = drawn + 1 == limit
      events.append(event(one, drawn, "length" if last else None))
      self.pages[one][0] += 1
      if last:
        del self.pages[one]
    return events


def event(request_id, token_id, reason):
  return requests.TokenEvent(
    request_id=request_id, token_id=token_id, logprob=0.0, finish_reason=reason
  )


def request(name, max_tokens=5, prompt=(1,)):
  sampling = requests.SamplingParameters(max_tokens=max_tokens)
  return requests.Request(
    prompt_ids=prompt, sampling=sampling, request_id=str(name)
  )


def test_hundreds_of_requests_of_which_some_vanish():
  engine = FakeEngine()
  runner = runner_lib.Runner(engine, max_requests=400)
  boxes = [queue.SimpleQueue() for _ in range(300)]
  for index, box in enumerate(boxes):
    # One in three never ends by itself.
    long = 10**9 if index % 3 == 0 else 7
    runner.submit(request(index, long), box.put).result(10)
  for index in range(0, 300, 3):
    runner.cancel(str(index))
  assert runner.drain(30)
  for index, box in enumerate(boxes):
    events = []
    while not box.empty():
      events.append(box.get())
    reasons = [one.finish_reason for one in events]
    assert reasons[-1] == ("length" if index % 3 else "cancelled")
    assert set(reasons[:-1]) <= {None}
    if index % 3:
      assert [one.token_id for one in events] == list(range(7))
  assert not engine.pages


def test_a_refused_request_and_a_full_house_leave_the_rest_alone():
  runner = runner_lib.Runner(FakeEngine(), max_requests=1)
  box = queue.SimpleQueue()
  with pytest.raises(ValueError, match="empty"):
    runner.submit(request("a", prompt=()), box.put).result(10)
  runner.submit(request("b", 10**9), box.put).result(10)
  with pytest.raises(runner_lib.NotAcceptingError, match="live"):
    runner.submit(request("c"), box.put).result(10)
  assert not runner.drain(0.05)
  with pytest.raises(runner_lib.NotAcceptingError, match="shutting"):
    runner.submit(request("d"), box.put)
  runner.cancel("b")
  assert runner.drain(10)


def test_a_cancelled_request_makes_room_at_once():
  runner = runner_lib.Runner(FakeEngine(), max_requests=1)
  box = queue.SimpleQueue()
  for name in map(str, range(20)):
    runner.submit(request(name, 10**9), box.put).result(10)
    runner.cancel(name)
    runner.cancel(name)
  assert runner.drain(10) and runner.failure is None


def test_a_failure_of_the_engine_reaches_every_request():
  runner = runner_lib.Runner(FakeEngine(fail_at=3), max_requests=9)
  box = queue.SimpleQueue()
  runner.submit(request("a", 10**9), box.put).result(10)
  got = [box.get(timeout=10) for _ in range(3)]
  assert str(got[-1]) == "device lost" and runner.drain(10)
  assert runner.failure is got[-1]
  with pytest.raises(runner_lib.NotAcceptingError):
    runner.submit(request("b"), box.put)


def test_giving_up_ends_what_runs_with_an_error():
  engine = FakeEngine()
  runner = runner_lib.Runner(engine, max_requests=9)
  boxes = {name: queue.SimpleQueue() for name in "abc"}
  for name, box in boxes.items():
    runner.submit(request(name, 10**9), box.put).result(10)
  runner.give_up()
  runner.cancel("b")
  assert runner.drain(10) and runner.failure is None and not engine.pages
  for box in boxes.values():
    got = [box.get(timeout=10)]
    while not box.empty():
      got.append(box.get())
    assert isinstance(got[-1], runner_lib.NotAcceptingError)
    assert all(one.finish_reason is None for one in got[:-1])
  with pytest.raises(runner_lib.NotAcceptingError):
    runner.submit(request("d"), boxes["a"].put)
  runner.give_up()


class TwoAStep(FakeEngine):
  """Gives two events of each request a step, as prefill and decode may."""

  def step(self):
    return super().step() + super().step()


@pytest.mark.parametrize("max_tokens", [2, 3, 10**9])
def test_a_receiver_that_fails_at_the_end_of_a_request(max_tokens, caplog):
  engine = TwoAStep()
  runner = runner_lib.Runner(engine, max_requests=9)
  box = queue.SimpleQueue()

  def closed(event):
    raise RuntimeError("Event loop is closed")

  runner.submit(request("a", max_tokens), closed).result(10)
  runner.submit(request("b", 5), box.put).result(10)
  assert [box.get(timeout=10).token_id for _ in range(5)] == list(range(5))
  assert runner.drain(10) and runner.failure is None and not engine.pages
  assert "a: its receiver failed" in caplog.text


def test_max_requests_is_checked():
  with pytest.raises(ValueError, match="max_requests"):
    runner_lib.Runner(FakeEngine(), max_requests=0)


def test_whoever_gives_up_asking_stops_nobody():
  engine = FakeEngine()
  runner = runner_lib.Runner(engine, max_requests=100)
  box = queue.SimpleQueue()
  for index in range(50):
    runner.submit(request(index, 2), box.put).cancel()
  assert runner.submit(request("last", 2), box.put).result(10) == "last"
  assert runner.drain(10) and runner.failure is None and not engine.pages


def test_a_mistake_of_a_request_is_its_own():
  runner = runner_lib.Runner(FakeEngine(), max_requests=9)
  box = queue.SimpleQueue()
  with pytest.raises(TypeError):
    runner.submit(requests_without_id([]), box.put).result(10)
  assert runner.submit(request("a"), box.put).result(10) == "a"
  assert runner.drain(10) and runner.failure is None


def requests_without_id(name):
  sampling = requests.SamplingParameters(max_tokens=1)
  return requests.Request(prompt_ids=(1,), sampling=sampling, request_id=name)


def test_a_receiver_that_fails_loses_its_request_alone(caplog):
  engine = FakeEngine()
  runner = runner_lib.Runner(engine, max_requests=9)
  box = queue.SimpleQueue()

  def closed(event):
    raise RuntimeError("Event loop is closed")

  runner.submit(request("a", 10**9), closed).result(10)
  runner.submit(request("b", 3), box.put).result(10)
  assert [box.get(timeout=10).token_id for _ in range(3)] == [0, 1, 2]
  assert runner.drain(10) and runner.failure is None and not engine.pages
  assert "a: its receiver failed" in caplog.text
