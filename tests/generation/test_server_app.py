"""The API over a real socket and the `openai` client, on scripted replies."""

import json
import socket

import httpx
import openai
import pytest

from dsv32_jax.agents import chat
from dsv32_jax.agents import conversation as conversations
from dsv32_jax.data import tokenizer as tokenizers
from tests.support import scripted_api


@pytest.fixture(scope="module")
def tokenizer():
  return tokenizers.train(["What is it? It is what it is."] * 5, 300)


def reply_ids(tokenizer, message, mode):
  text = chat.encode_messages([message], mode, context=[scripted_api.USER])
  return tokenizer.encode_rendered(text)


@pytest.fixture
def served(tokenizer):
  """Answers a chat that thinks with a call, any other with text."""
  think_start = tokenizer.special_id("think_start")

  def script(prompt_ids):
    if prompt_ids[-1] == think_start:
      return reply_ids(tokenizer, scripted_api.CALL, "thinking")
    return reply_ids(tokenizer, scripted_api.ANSWER, "chat")

  with scripted_api.serving(tokenizer, script) as served:
    yield served


def test_a_chat_whole_and_streamed(served, tokenizer):
  ids = reply_ids(tokenizer, scripted_api.ANSWER, "chat")
  whole = served.chat(logprobs=True)
  (choice,) = whole.choices
  assert choice.message.content == scripted_api.ANSWER["content"]
  assert choice.finish_reason == "stop" and not choice.message.tool_calls
  assert [x.logprob for x in choice.logprobs.content] == [-0.5] * len(ids)
  text = "".join(x.token for x in choice.logprobs.content if x.bytes)
  assert text.startswith("It is 2: ")
  (request,) = served.engine.seen
  conversation = conversations.Conversation(tokenizer, "chat")
  conversation.add(scripted_api.USER)
  assert request.prompt_ids == conversation.prompt_ids()
  assert whole.usage.prompt_tokens == len(request.prompt_ids)
  assert whole.usage.completion_tokens == len(ids)
  room = 4096 - len(request.prompt_ids)
  assert request.sampling.max_tokens == room
  choices, usage = scripted_api.assembled(
    served.chat(
      stream=True, stream_options={"include_usage": True}, logprobs=True, n=2
    )
  )
  assert sorted(choices) == [0, 1]
  for one in choices.values():
    assert one["content"] == scripted_api.ANSWER["content"]
    assert one["finish"] == "stop" and len(one["tokens"]) == len(ids)
  assert usage.completion_tokens == 2 * len(ids)


def test_thinking_and_tool_calls_whole_streamed_and_sent_back(
  served, tokenizer
):
  arguments = dict(
    tools=[scripted_api.TOOL], extra_body=scripted_api.thinking()
  )
  whole = served.chat(**arguments)
  (choice,) = whole.choices
  assert choice.finish_reason == "tool_calls"
  assert (
    choice.message.reasoning_content == scripted_api.CALL["reasoning_content"]
  )
  (call,) = choice.message.tool_calls
  assert call.function.name == "add"
  assert json.loads(call.function.arguments) == {"a": 1, "note": "\u00e9\n"}
  choices, _ = scripted_api.assembled(served.chat(stream=True, **arguments))
  one = choices[0]
  assert one["finish"] == "tool_calls" and one["content"] == ""
  assert one["reasoning_content"] == scripted_api.CALL["reasoning_content"]
  (streamed,) = one["calls"]
  assert streamed.index == 0 and streamed.function == type(streamed.function)(
    name="add", arguments=call.function.arguments
  )
  # The reply as the client's library has it, and a result of the call.
  result = {"role": "tool", "tool_call_id": call.id, "content": "2"}
  served.chat(messages=[scripted_api.USER, choice.message, result], **arguments)
  conversation = conversations.Conversation(tokenizer, "thinking")
  conversation.add(
    {"role": "system", "content": "", "tools": [scripted_api.TOOL]}
  )
  for message in (
    scripted_api.USER,
    scripted_api.CALL,
    {"role": "tool", "content": "2"},
  ):
    conversation.add(message)
  assert served.engine.seen[-1].prompt_ids == conversation.prompt_ids()


def test_results_are_put_in_the_order_of_their_calls(served, tokenizer):
  calls = [
    {"id": name, **scripted_api.CALL["tool_calls"][0]}
    for name in ("first", "second")
  ]
  said = {"role": "assistant", "content": "", "tool_calls": calls}
  messages = [scripted_api.USER, {**said, "tool_calls": calls}]
  for name in ("second", "first"):
    messages.append({"role": "tool", "tool_call_id": name, "content": name})
  served.chat(messages=messages, tools=[scripted_api.TOOL])
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
  text = scripted_api.ANSWER["content"]
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
  with scripted_api.serving(tokenizer, lambda prompt: [5] * 10**6) as served:
    with pytest.raises(openai.RateLimitError, match="too many requests"):
      served.chat(n=9)
    stream = served.chat(stream=True)
    next(stream)
    stream.close()


def test_keys_and_bodies(tokenizer):
  with scripted_api.serving(
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
