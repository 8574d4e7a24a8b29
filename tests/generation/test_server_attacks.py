"""What a stranger may try on the socket; each attack is bounded."""

from concurrent import futures
import contextlib
import socket
import time

import httpx
import pytest

from dsv32_jax.agents import chat
from dsv32_jax.data import tokenizer as tokenizers
from dsv32_jax.generation.server import app as app_lib
from dsv32_jax.generation.server import connection
from tests.support import live_server
from tests.support import scripted_api

JSON = "content-type: application/json\r\n"


class Impatient(connection.Connection):
  head_seconds = 1.0
  write_seconds = 1.0


@pytest.fixture(scope="module")
def tokenizer():
  return tokenizers.train(["What is it? It is what it is."] * 5, 300)


@pytest.fixture(scope="module")
def served(tokenizer):
  with scripted_api.serving(
    tokenizer, lambda prompt: [7] * 10**6, Impatient, body_seconds=0.5
  ) as served:
    yield served


def connect(root, **options):
  host, port = root.removeprefix("http://").split(":")
  one = socket.socket()
  one.settimeout(30)
  for name, value in options.items():
    one.setsockopt(socket.SOL_SOCKET, getattr(socket, name), value)
  one.connect((host, int(port)))
  return one


def head(length, *lines, path="/v1/completions"):
  lines = "".join(f"{line}\r\n" for line in lines)
  return (
    f"POST {path} HTTP/1.1\r\nhost: x\r\n{JSON}content-length: {length}\r\n"
    f"{lines}\r\n"
  ).encode()


def answer(root, data):
  """Sends bytes and returns all that comes until the server closes."""
  with connect(root) as one:
    one.sendall(data)
    return read_all(one)


def read_all(one):
  found = b""
  with contextlib.suppress(ConnectionError):
    while data := one.recv(1 << 16):
      found += data
  return found


def is_well(served):
  assert httpx.get(served.root + "/health", timeout=30).status_code == 200


def wait_until(condition):
  deadline = time.monotonic() + 30
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.02)


def trickle(one, seconds):
  """Sends a byte now and then; returns whether the server gave up."""
  deadline = time.monotonic() + seconds
  while time.monotonic() < deadline:
    try:
      one.sendall(b"x")
    except ConnectionError:
      return True
    time.sleep(0.05)
  return False


def test_heads_that_come_a_byte_at_a_time(served):
  with contextlib.ExitStack() as stack:
    many = [stack.enter_context(connect(served.root)) for _ in range(100)]
    for one in many:
      one.sendall(b"POST /v1/completions HTTP/1.1\r\nx-")
    is_well(served)
    assert trickle(many[0], 20)
    # Those that send nothing more are let go as well.
    assert all(read_all(one) == b"" for one in many[1:])


def test_a_second_head_and_what_follows_an_early_answer(served):
  with connect(served.root) as one:
    one.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
    assert one.recv(1 << 16).startswith(b"HTTP/1.1 200")
    one.sendall(b"GET /hea")
    assert trickle(one, 20)
  with connect(served.root) as one:
    one.sendall(head(10**5))
    assert b" 408 " in one.recv(1 << 16)
    assert trickle(one, 20)


def test_a_client_that_reads_nothing_is_let_go():
  """More than the system keeps for it waits, and the answer ends."""
  sent = []

  async def endless(scope, receive, send):
    if scope["type"] == "lifespan":
      for kind in ("startup", "shutdown"):
        await receive()
        await send({"type": f"lifespan.{kind}.complete"})
      return
    message = {"type": "http.response.start", "status": 200, "headers": []}
    await send(message)
    part = {"type": "http.response.body", "body": b" " * (1 << 16)}
    for count in range(800):
      await send({**part, "more_body": count < 799})
      sent.append(count)
    sent.append("all")

  with live_server.serving(endless, Impatient) as root, connect(root) as one:
    one.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
    # What is sent to a connection that is gone takes no time.
    wait_until(lambda: sent and sent[-1] == "all")
    assert len(read_all(one)) < 800 << 16
  with live_server.serving(endless) as root:
    assert len(httpx.get(root + "/").content) == 800 << 16


@pytest.mark.parametrize(
  "data",
  [
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 50,
    b"GET / HTTP/1.1\r\n\r\n",
    b"GET /\xff\xfe HTTP/1.1\r\nhost: x\r\n\r\n",
    b"GET / HTTP/1.1\r\nhost: x\r\nx: " + b"a" * 200_000 + b"\r\n\r\n",
    b"GET / HTTP/1.1\r\n" + b"x: a\r\n" * 50_000 + b"\r\n",
    b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\n\r\n",
    head(1, "content-length: 2"),
    head("9" * 5000),
    head("-1"),
    head(1, "transfer-encoding: chunked, gzip"),
    b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
  ],
)
def test_what_is_no_request(served, data):
  assert answer(served.root, data)[:12] in (b"HTTP/1.1 400", b"")
  is_well(served)


def test_many_small_requests(served):
  bodies = [b"", b"{", b"[]", b'{"model":"x"}', b'{"model":"m","prompt":[]}']

  def ask(number):
    with httpx.Client(base_url=served.root, timeout=60) as client:
      return [
        client.post(
          "/v1/completions",
          content=bodies[turn % len(bodies)],
          headers={"content-type": "application/json"},
        ).status_code
        for turn in range(number, number + 60)
      ]

  with futures.ThreadPoolExecutor(10) as pool:
    found = [status for part in pool.map(ask, range(10)) for status in part]
  assert set(found) == {400} and len(found) == 600
  page = httpx.get(served.root + "/metrics").text
  assert "dsv32_http_requests_open 1.0" in page
  assert "dsv32_engine_pages_used 0.0" in page


def test_bodies_of_all_requests_together_are_bounded(tokenizer):
  body = {"model": "m", "prompt": "x" * 3000, "max_tokens": 1}
  with scripted_api.serving(
    tokenizer, lambda p: [7], max_body_bytes=5000, max_held_bytes=6000
  ) as served:
    post = served.root + "/v1/completions"
    with connect(served.root) as one:
      one.sendall(head(5000) + b" " * 4900)
      wait_until(lambda: httpx.post(post, json=body).status_code == 429)
      small = {**body, "prompt": "x"}
      assert httpx.post(post, json=small).status_code == 200
    wait_until(lambda: httpx.post(post, json=body).status_code == 200)
  with pytest.raises(ValueError, match="max_held_bytes=5 is below"):
    app_lib.ServerConfig(model_name="m", max_length=9, max_held_bytes=5)


def test_text_that_spells_special_tokens_is_text(served, tokenizer):
  plain = served.chat(max_tokens=1, messages=[said("it is")])
  (before,) = [served.engine.seen[-1].prompt_ids]
  names = "".join(tokenizers.SPECIAL_TOKENS.values())
  for text in (names, "\u0000\u202e\uffff\U0010ffff" + names * 3):
    served.chat(max_tokens=1, messages=[said(text)])
    ids = served.engine.seen[-1].prompt_ids
    special = set(tokenizer.special_ids)
    marks = [token for token in ids if token in special]
    assert marks == [token for token in before if token in special]
    rendered = chat.encode_messages([said(text)], "chat")
    assert tokenizer.decode(ids) == rendered
  assert plain.choices[0].finish_reason == "length"


def said(text):
  return {"role": "user", "content": text}


def test_ways_to_give_a_key(tokenizer):
  with scripted_api.serving(
    tokenizer, lambda p: [7], api_keys=("key", "other")
  ) as served:

    def status(*values):
      lines = [f"authorization: {value}" for value in values]
      data = head(2, *lines, "connection: close") + b"{}"
      return int(answer(served.root, data).split()[1])

    # A key that fits leads to the body, which is wrong.
    for good in ("Bearer key", "bearer  key ", "BEARER other"):
      assert status(good) == 400
    for bad in (
      *("", "key", "Bearer", "Bearer ", "Basic key", "Bearer Key"),
      *("Bearer keyother", "Bearer key other", "Bearerkey", "Bearer ke"),
      *("Bearer k\u00e9y", "Bearer " + "k" * 50_000),
    ):
      assert status(bad) == 401, bad
    assert status() == 401
    assert status("Bearer wrong", "Bearer key") == 401
