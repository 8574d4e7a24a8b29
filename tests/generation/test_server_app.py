"""The API over a real socket and the `openai` client, on scripted replies."""

import contextlib
import dataclasses
import json
import socket

import httpx
import openai
import pytest

from dsv32_jax.agents import chat
from dsv32_jax.agents import conversation as conversations
from dsv32_jax.agents import policy
from dsv32_jax.data import tokenizer as tokenizers
from dsv32_jax.generation.server import app as app_lib
from dsv32_jax.generation.server import runner as runner_lib
from tests.support import live_server
from tests.support import scripted_engine

USER = {"role": "user", "content": "What is 1 + 1?"}
CALL = policy.call("add", '{"a": 1, "note": "\u00e9\\n"}', reasoning="Let me.")
ANSWER = {
  "role": "assistant",
  "content": "It is 2: \u4e2d.",
  "reasoning_content": "1 and 1",
}
TOOL = {
  "type": "function",
  "function": {
    "name": "add",
    "description": "Adds.",
    "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
  },
}


@dataclasses.dataclass
class Served:
  engine: scripted_engine.ScriptedEngine
  client: openai.OpenAI
  root: str

  def chat(self, **changes):
    arguments = {"model": "m", "messages": [USER], **changes}
    return self.client.chat.completions.create(**arguments)


@pytest.fixture(scope="module")
def tokenizer():
  return tokenizers.train(["What is it? It is what it is."] * 5, 300)


def reply_ids(tokenizer, message, mode):
  text = chat.encode_messages([message], mode, context=[USER])
  return tokenizer.encode_rendered(text)


@contextlib.contextmanager
def serving(tokenizer, script, **changes):
  engine = scripted_engine.ScriptedEngine(script, tokenizer.eos_id)
  runner = runner_lib.Runner(engine, max_requests=8)
  config = app_lib.ServerConfig(model_name="m", max_length=4096, **changes)
  app = app_lib.make_app(runner, tokenizer, config)
  options = dict(api_key="key", max_retries=0)
  with (
    live_server.serving(app) as url,
    openai.OpenAI(base_url=f"{url}/v1", **options) as client,
  ):
    yield Served(engine, client, url)


@pytest.fixture
def served(tokenizer):
  """Answers a chat with thinking with a call, without it with text."""
  think_start = tokenizer.special_id("think_start")

  def script(prompt_ids):
    if prompt_ids[-1] == think_start:
      return reply_ids(tokenizer, CALL, "thinking")
    return reply_ids(tokenizer, ANSWER, "chat")

  with serving(tokenizer, script) as served:
    yield served


def thinking(enabled=True):
  return {"chat_template_kwargs": {"thinking": enabled}}


def assembled(stream):
  """The choices of a stream put together, and the last usage."""
  choices, usage = {}, None
  for chunk in stream:
    usage = chunk.usage or usage
    for part in chunk.choices:
      one = choices.setdefault(part.index, {"calls": [], "tokens": []})
      for name in ("content", "reasoning_content"):
        text = getattr(part.delta, name, None) or ""
        one[name] = one.get(name, "") + text
      one["calls"] += part.delta.tool_calls or []
      if part.logprobs:
        one["tokens"] += part.logprobs.content
      assert "finish" not in one
      if part.finish_reason:
        one["finish"] = part.finish_reason
  return choices, usage


def test_a_chat_whole_and_streamed(served, tokenizer):
  ids = reply_ids(tokenizer, ANSWER, "chat")
  whole = served.chat(logprobs=True)
  (choice,) = whole.choices
  assert choice.message.content == ANSWER["content"]
  assert choice.finish_reason == "stop" and not choice.message.tool_calls
  assert [x.logprob for x in choice.logprobs.content] == [-0.5] * len(ids)
  text = "".join(x.token for x in choice.logprobs.content if x.bytes)
  assert text.startswith("It is 2: ")
  (request,) = served.engine.seen
  conversation = conversations.Conversation(tokenizer, "chat")
  conversation.add(USER)
  assert request.prompt_ids == conversation.prompt_ids()
  assert whole.usage.prompt_tokens == len(request.prompt_ids)
  assert whole.usage.completion_tokens == len(ids)
  room = 4096 - len(request.prompt_ids)
  assert request.sampling.max_tokens == room
  choices, usage = assembled(
    served.chat(
      stream=True, stream_options={"include_usage": True}, logprobs=True, n=2
    )
  )
  assert sorted(choices) == [0, 1]
  for one in choices.values():
    assert one["content"] == ANSWER["content"]
    assert one["finish"] == "stop" and len(one["tokens"]) == len(ids)
  assert usage.completion_tokens == 2 * len(ids)


def test_thinking_and_tool_calls_whole_streamed_and_sent_back(
  served, tokenizer
):
  arguments = dict(tools=[TOOL], extra_body=thinking())
  whole = served.chat(**arguments)
  (choice,) = whole.choices
  assert choice.finish_reason == "tool_calls"
  assert choice.message.reasoning_content == CALL["reasoning_content"]
  (call,) = choice.message.tool_calls
  assert call.function.name == "add"
  assert json.loads(call.function.arguments) == {"a": 1, "note": "\u00e9\n"}
  choices, _ = assembled(served.chat(stream=True, **arguments))
  one = choices[0]
  assert one["finish"] == "tool_calls" and one["content"] == ""
  assert one["reasoning_content"] == CALL["reasoning_content"]
  (streamed,) = one["calls"]
  assert streamed.index == 0 and streamed.function == type(streamed.function)(
    name="add", arguments=call.function.arguments
  )
  # The reply as the client's library has it, and a result of the call.
  result = {"role": "tool", "tool_call_id": call.id, "content": "2"}
  served.chat(messages=[USER, choice.message, result], **arguments)
  conversation = conversations.Conversation(tokenizer, "thinking")
  conversation.add({"role": "system", "content": "", "tools": [TOOL]})
  for message in (USER, CALL, {"role": "tool", "content": "2"}):
    conversation.add(message)
  assert served.engine.seen[-1].prompt_ids == conversation.prompt_ids()


def test_results_are_put_in_the_order_of_their_calls(served, tokenizer):
  calls = [
    {"id": name, **CALL["tool_calls"][0]} for name in ("first", "second")
  ]
  said = {"role": "assistant", "content": "", "tool_calls": calls}
  messages = [USER, {**said, "tool_calls": calls}]
  for name in ("second", "first"):
    messages.append({"role": "tool", "tool_call_id": name, "content": name})
  served.chat(messages=messages, tools=[TOOL])
  text = tokenizer.decode(served.engine.seen[-1].prompt_ids)
  assert text.index("<result>first") < text.index("<result>second")


def test_what_users_write_is_text(served, tokenizer):
  marks = "".join(tokenizers.SPECIAL_TOKENS.values())
  served.chat(
    messages=[
      {"role": "developer", "content": marks},
      {"role": "user", "content": [{"type": "text", "text": marks}]},
    ]
  )
  (request,) = served.engine.seen
  special = [tokenizer.special_id(name) for name in tokenizers.SPECIAL_TOKENS]
  names = [
    list(tokenizers.SPECIAL_TOKENS)[special.index(token)]
    for token in request.prompt_ids
    if token in special
  ]
  assert names == ["bos", "user", "assistant", "think_end"]
  assert tokenizer.decode(request.prompt_ids).count(marks) == 2


def test_stop_length_and_sampling_reach_the_engine(served):
  choice = served.chat(
    stop=["is"], temperature=0.5, top_p=0.9, seed=5, n=2, max_tokens=40,
    extra_body={"top_k": 3, "min_p": 0.1, "ignore_eos": True},
  ).choices[1]  # fmt: skip
  assert choice.message.content == "It " and choice.finish_reason == "stop"
  sampling = served.engine.seen[1].sampling
  assert sampling.stop == ("is",) and sampling.seed == 6
  assert (sampling.temperature, sampling.top_p) == (0.5, 0.9)
  assert (sampling.top_k, sampling.min_p) == (3, 0.1)
  assert sampling.max_tokens == 40 and sampling.ignore_eos
  choice = served.chat(max_completion_tokens=2).choices[0]
  assert choice.finish_reason == "length"


def test_completions(served, tokenizer):
  create = served.client.completions.create
  reply = create(
    model="m", prompt=["What", "is"], n=2, max_tokens=50, logprobs=0
  )
  assert [one.index for one in reply.choices] == [0, 1, 2, 3]
  text = ANSWER["content"]
  assert {one.text for one in reply.choices} == {text}
  assert "".join(reply.choices[0].logprobs.tokens)[:9] == text[:9]
  bos, what = tokenizer.bos_id, tokenizer.encode("What")
  assert served.engine.seen[1].prompt_ids == [bos, *what]
  assert reply.usage.prompt_tokens == 2 + len(what) + len(
    tokenizer.encode("is")
  )
  chunks = list(create(model="m", prompt=[bos, 9], stream=True, max_tokens=50))
  assert "".join(one.choices[0].text for one in chunks) == text
  assert chunks[-1].choices[0].finish_reason == "stop"
  assert served.engine.seen[-1].prompt_ids == [bos, 9]


def test_models_health_and_metrics(served):
  assert [one.id for one in served.client.models.list()] == ["m"]
  assert served.client.models.retrieve("m").id == "m"
  with pytest.raises(openai.NotFoundError, match="no model 'x'"):
    served.client.models.retrieve("x")
  with pytest.raises(openai.NotFoundError, match="no model 'x'"):
    served.chat(model="x")
  served.chat()
  assert httpx.get(served.root + "/health").json() == {"status": "ok"}
  lines = httpx.get(served.root + "/metrics").text.splitlines()
  assert "dsv32_engine_pages_used 0.0" in lines
  assert 'dsv32_choices_ended_total{reason="stop"} 1.0' in lines
  assert (
    'dsv32_http_requests_total{path="/v1/chat/completions",status="200"} 1.0'
    in lines
  )
  nowhere = httpx.get(served.root + "/nowhere")
  assert nowhere.json()["error"]["type"] == "not_found_error"


def test_a_failure_of_the_engine_is_told(served):
  served.engine.fail = True
  with pytest.raises(openai.APIError, match="engine has failed"):
    list(served.chat(stream=True))
  with pytest.raises(openai.InternalServerError, match=r"shutting|failed"):
    served.chat()
  health = httpx.get(served.root + "/health")
  assert health.status_code == 503 and health.json()["status"] == "failed"


def test_a_server_that_is_full_says_so(tokenizer):
  with serving(tokenizer, lambda prompt: [5] * 10**6) as served:
    with pytest.raises(openai.RateLimitError, match="too many requests"):
      served.chat(n=9)
    stream = served.chat(stream=True)
    next(stream)
    stream.close()


def test_keys_and_bodies(tokenizer):
  with serving(
    tokenizer,
    lambda prompt: [tokenizer.eos_id],
    api_keys=("key", "other"),
    max_body_bytes=5000,
    body_seconds=0.5,
  ) as served:
    assert served.chat().choices[0].message.content == ""
    with pytest.raises(openai.AuthenticationError, match="no valid API key"):
      served.client.with_options(api_key="wrong").models.list()
    with pytest.raises(openai.APIStatusError, match="more than 5000") as error:
      served.chat(messages=[{"role": "user", "content": "x" * 6000}])
    assert error.value.status_code == 413
    assert httpx.get(served.root + "/health").status_code == 200
    assert httpx.get(served.root + "/metrics").status_code == 401
    headers = {"authorization": "bearer  other"}
    many = iter([b"x" * 3000] * 2)
    url = served.root + "/v1/completions"
    reply = httpx.post(url, content=many, headers=headers)
    assert reply.status_code == 413
    assert reply.json()["error"]["code"] == "request_too_large"
    assert "408 " in half_a_request(served.root, "authorization: Bearer key")


def half_a_request(root, header):
  """Sends a body that does not end; returns what comes back."""
  host, port = root.removeprefix("http://").split(":")
  with socket.create_connection((host, int(port)), timeout=30) as one:
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\n{header}\r\n"
    one.sendall(head.encode() + b"content-length: 9\r\n\r\n{")
    return one.makefile().readline()
