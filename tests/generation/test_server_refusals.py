"""What a server refuses, and how it tells: one bad request each."""

import json
import re
import socket
import threading
import time

import httpx
import pytest

from dsv32_jax.data import tokenizer as tokenizers
from dsv32_jax.generation.server import app as app_lib
from dsv32_jax.generation.server import runner as runner_lib
from tests.support import live_server
from tests.support import scripted_engine

USER = {"role": "user", "content": "hi"}
CALLS = [
  {
    "id": name,
    "type": "function",
    "function": {"name": "f", "arguments": "{}"},
  }
  for name in "ab"
]
SAID = {"role": "assistant", "content": "", "tool_calls": CALLS}
CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def engine():
  return scripted_engine.ScriptedEngine(lambda prompt: [100] * 10**6, 1, 64)


@pytest.fixture(scope="module")
def server(engine):
  tokenizer = tokenizers.train(["hi there"] * 5, 280)
  runner = runner_lib.Runner(engine, max_requests=50)
  config = app_lib.ServerConfig(model_name="m", max_length=64)
  with live_server.serving(app_lib.make_app(runner, tokenizer, config)) as url:
    yield url


def tool(name="f", parameters=None, **changes):
  function = {"name": name, "parameters": parameters or {"type": "object"}}
  return {"type": "function", "function": {**function, **changes}}


def deep(depth):
  schema = {"type": "object"}
  for _ in range(depth):
    schema = {"type": "object", "properties": {"a": schema}}
  return schema


BAD_CHATS = [
  ({"messages": []}, "messages"),
  ({"messages": "hi"}, "messages"),
  ({"messages": [{"role": "user"}]}, "messages.0: .* no content"),
  ({"messages": [{"role": "user", "content": 3}]}, "messages.0.content"),
  ({"messages": [{"role": "boss", "content": "x"}]}, "messages.0.role"),
  (
    {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
    "messages.0.content.0.type",
  ),
  ({"messages": [{**USER, "tool_call_id": "a"}]}, "tool_call_id is for"),
  ({"messages": [{**USER, "tool_calls": CALLS}]}, "tool_calls is for"),
  ({"messages": [{**USER, "nme": "a"}]}, "messages.0.nme: no such field"),
  ({"messages": [{**USER, "audio": {"id": "a"}}]}, "messages.0.audio"),
  ({"messages": [{"role": "system", "content": "x"}]}, "role user or tool"),
  ({"messages": [USER, {"role": "assistant", "content": "x"}]}, "role user or"),
  (
    {"messages": [USER, {"role": "tool", "content": "x", "tool_call_id": "a"}]},
    "answers none",
  ),
  ({"messages": [USER, SAID]}, "results of the last calls"),
  ({"messages": [USER, SAID, USER]}, "results of calls are missing"),
  (
    {"messages": [USER, {**SAID, "tool_calls": [CALLS[0]] * 2}]},
    "there twice",
  ),
  (
    {
      "messages": [
        USER,
        SAID,
        {"role": "tool", "content": "x", "tool_call_id": "a"},
        {"role": "tool", "content": "x", "tool_call_id": "a"},
      ]
    },
    "answers none",
  ),
  (
    {
      "messages": [
        USER,
        {
          "role": "assistant",
          "tool_calls": [
            {**CALLS[0], "function": {"name": "f", "arguments": "{"}}
          ],
        },
        {"role": "tool", "content": "x", "tool_call_id": "a"},
      ]
    },
    "arguments are not JSON",
  ),
  ({"messages": [{"role": "user", "content": "x" * 500}]}, "exceed the 64"),
  ({"max_tokens": 64}, "exceed the 64"),
  ({"max_tokens": 0}, "max_tokens=0 must be"),
  ({"max_tokens": 3.5}, "max_tokens"),
  ({"max_tokens": 3, "max_completion_tokens": 4}, "differ"),
  ({"temperature": -1}, "temperature=-1"),
  ({"temperature": "hot"}, "temperature"),
  ({"temperature": 10**400}, "temperature"),
  ({"top_p": 0}, "top_p=0"),
  ({"top_k": -1}, "top_k=-1"),
  ({"min_p": 2}, "min_p=2"),
  ({"seed": -1}, "seed=-1"),
  ({"seed": 1 << 63}, "seed="),
  ({"n": 0}, "n:"),
  ({"n": 65}, "n:"),
  ({"n": True}, "n:"),
  ({"stop": ""}, "stop="),
  ({"stop": ["a"] * 17}, "stop"),
  ({"stop": "x" * 300}, "stop"),
  ({"stop": 3}, "stop"),
  (
    {"stream": False, "stream_options": {"include_usage": True}},
    "stream_options goes with",
  ),
  ({"top_logprobs": 2}, "top_logprobs goes with logprobs"),
  ({"logprobs": True, "top_logprobs": 21}, "top_logprobs=21 must be"),
  ({"logprobs": True, "top_logprobs": -1}, "top_logprobs=-1 must be"),
  ({"presence_penalty": 3}, "presence_penalty=3"),
  ({"presence_penalty": "x"}, "presence_penalty"),
  ({"frequency_penalty": -2.5}, "frequency_penalty=-2.5"),
  ({"frequency_penalty": 10**400}, "frequency_penalty"),
  ({"logit_bias": {"a": 5}}, "logit_bias.*decimal number"),
  ({"logit_bias": {"-1": 5}}, "logit_bias.*decimal number"),
  ({"logit_bias": {"1": 2, "01": 3}}, "logit_bias.*decimal number"),
  ({"logit_bias": {"1": 101}}, "logit_bias of 1=101"),
  ({"logit_bias": {"99999999": 1}}, "logit_bias: token=99999999 is outside"),
  ({"logit_bias": {str(n): 1 for n in range(1025)}}, "logit_bias"),
  ({"logit_bias": [1]}, "logit_bias"),
  ({"tool_choice": "required"}, "tool_choice: 'required' goes with tools"),
  ({"tool_choice": "must"}, "tool_choice"),
  ({"tool_choice": {"type": "function"}}, r"tool_choice\.function: "),
  (
    {
      "tools": [tool()],
      "tool_choice": {"type": "function", "function": {"name": "g"}},
    },
    r"tool_choice: 'g' is not one of the tools \['f'\]",
  ),
  ({"parallel_tool_calls": 1}, "parallel_tool_calls"),
  ({"response_format": {"type": "yaml"}}, "response_format.type"),
  ({"response_format": {"type": "json_object"}}, "--strict_schemas"),
  (
    {
      "response_format": {
        "type": "json_schema",
        "json_schema": {"name": "a", "schema": {}, "strict": True},
      }
    },
    "response_format: this server .* --strict_schemas",
  ),
  ({"response_format": {"type": "json_schema"}}, "json_schema"),
  ({"temprature": 1}, "temprature: no such field"),
  ({"tools": {}}, "tools"),
  ({"tools": [{"type": "web_search"}]}, "tools.0"),
  ({"tools": [tool("a b")]}, "tools: tool name='a b'"),
  ({"tools": [tool(), tool()]}, "equal name"),
  ({"tools": [tool(parameters={"type": "string"})]}, "no schema of an object"),
  ({"tools": [tool(parameters={"type": "object", "required": 3})]}, "'f'"),
  (
    {"tools": [tool(parameters={"type": "object", "$ref": "http://x.y"})]},
    "leads outside",
  ),
  (
    {"tools": [tool(parameters={"type": "object", "$ref": "#/a"})]},
    "tools: tool 'f'",
  ),
  ({"tools": [tool(parameters=deep(150))]}, "recursion limit"),
  ({"tools": [tool(strict=True)]}, "tools: this server .* --strict_schemas"),
  ({"tools": [tool(strict=1)]}, "strict"),
  ({"tools": [tool(description="x" * 200_001)]}, "more than 200000"),
  ({"tools": [tool(f"f{n}") for n in range(129)]}, "tools"),
]
BAD_COMPLETIONS = [
  ({}, "prompt"),
  ({"prompt": []}, "there is none"),
  ({"prompt": [[]]}, "prompt is empty"),
  ({"prompt": "", "add_special_tokens": False}, "prompt is empty"),
  ({"prompt": [1, "a"]}, "prompt"),
  ({"prompt": [-1]}, "token=-1"),
  ({"prompt": [1 << 40]}, "outside vocab_size"),
  ({"prompt": [1] * 64}, "exceed the 64"),
  ({"prompt": ["a"] * 9, "n": 8}, "more than 64 choices"),
  ({"prompt": "a", "logprobs": 21}, "top_logprobs=21"),
  ({"prompt": "a", "echo": True}, "echo: this server supports only False"),
  ({"prompt": "a", "best_of": 2}, "best_of"),
  ({"prompt": "a", "suffix": "b"}, "suffix"),
]


def require_error(reply, status, message):
  assert reply.status_code == status, reply.text
  error = reply.json()["error"]
  assert set(error) == {"message", "type", "param", "code"}
  assert "\n" not in error["message"] and len(error["message"]) < 600
  assert re.search(message, error["message"]), (message, error)


@pytest.mark.parametrize("stream", [False, True])
def test_bad_requests_are_told_in_a_line(server, engine, stream):
  with httpx.Client(base_url=server, timeout=60) as client:
    for path, given, cases in (
      (CHAT, {"messages": [USER]}, BAD_CHATS),
      (COMPLETION, {}, BAD_COMPLETIONS),
    ):
      for changes, message in cases:
        body = {"model": "m", "stream": stream, **given, **changes}
        require_error(client.post(path, json=body), 400, message)
    assert not engine.seen


BAD_BODIES = [
  (b"", "not JSON"),
  (b"null", "object"),
  (b"[]", "object"),
  (b'{"model": "m"', "not JSON"),
  (b"\xff\xfe", "not JSON"),
  (
    b'{"model": "m", "messages": [{"role": "user", "content": "\xff"}]}',
    "JSON",
  ),
  (b'{"model":"m","messages":[{"role":"user","content":"\\ud800"}]}', "JSON"),
  (b"[" * 100_000, "not JSON"),
  (b'{"a":' * 100_000, "not JSON"),
  (b'{"model":"m","messages":[],"temperature":NaN}', ""),
  (b'{"seed": ' + b"9" * 100_000 + b"}", ""),
]


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
def test_bad_bodies_are_told_in_a_line(server, path):
  headers = {"content-type": "application/json"}
  with httpx.Client(base_url=server, headers=headers, timeout=60) as client:
    for body, message in BAD_BODIES:
      require_error(client.post(path, content=body), 400, message)
    other = {"content-type": "text/plain"}
    reply = client.post(path, content=b"{}", headers=other)
    require_error(reply, 400, "content-type")
    require_error(client.get(path), 405, "Not Allowed")
    big = client.post(path, content=b" " * (9 * 2**20))
    require_error(big, 413, "more than 8388608")


def test_a_prompt_that_is_far_too_long_holds_up_nobody(server):
  body = {"model": "m", "prompt": "hi there 12\n" * 60_000}
  replies = []

  def ask():
    reply = httpx.post(server + COMPLETION, json=body, timeout=250)
    replies.append(reply)

  thread = threading.Thread(target=ask)
  thread.start()
  answered = 0
  while thread.is_alive():
    assert httpx.get(server + "/health", timeout=60).status_code == 200
    answered += 1
  # Were it held up, one of these would have waited for the whole time.
  assert answered > 10
  require_error(replies[0], 400, "exceed the 64")


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_vanishes_takes_its_request_along(server, engine, stream):
  host, port = server.removeprefix("http://").split(":")
  body = json.dumps(
    {"model": "m", "prompt": [1], "max_tokens": 60, "n": 2, "stream": stream}
  )
  engine.hold = True
  head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\n"
  head += f"content-type: application/json\r\ncontent-length: {len(body)}"
  with socket.create_connection((host, int(port))) as one:
    one.sendall(f"{head}\r\n\r\n{body}".encode())
    wait_until(lambda: engine.stats()["pages_used"] == 2)
  wait_until(lambda: engine.stats()["pages_used"] == 0)
  engine.hold = False
  page = httpx.get(server + "/metrics").text
  assert "dsv32_engine_pages_used 0.0" in page
  assert httpx.get(server + "/health").status_code == 200


def wait_until(condition):
  deadline = time.monotonic() + 30
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.01)
