"""Policies: a sampler of tokens, a script, an API through the openai client."""

import asyncio
import json
import types

import httpx
import openai
import pytest

from dsv32_jax.agents import chat
from dsv32_jax.agents import conversation as conversations
from dsv32_jax.agents import endpoint
from dsv32_jax.agents import policy as policies
from dsv32_jax.data import tokenizer as tokenizers

USER = {"role": "user", "content": "hi"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


@pytest.fixture(scope="module")
def tokenizer():
  return tokenizers.train(["the quick brown fox"] * 20, 300)


def conversation(tokenizer, *messages):
  made = conversations.Conversation(tokenizer, "thinking")
  for message in messages:
    made.add(message)
  return made


def complete(policy, made, max_tokens=100):
  return asyncio.run(policy.complete(made, max_tokens=max_tokens))


def test_tokens_go_in_and_out_as_they_are(tokenizer):
  asked = []
  end = tokenizer.special_id("think_end")
  drawn = [*tokenizer.encode("t"), end, *tokenizer.encode("ok"), 1]
  sampled = types.SimpleNamespace(
    token_ids=drawn,
    logprobs=[-0.5 * x for x in range(len(drawn))],
    finish_reason="stop",
  )

  async def sample(prompt_ids, max_tokens):
    asked.append((prompt_ids, max_tokens))
    return sampled

  made = conversation(tokenizer, USER)
  prompt = made.prompt_ids()
  completion = complete(policies.TokenPolicy(tokenizer, sample), made, 7)
  assert asked == [(prompt, 7)]
  assert completion.num_prompt_tokens == len(prompt)
  message = completion.add_to(made)
  assert message["content"] == "ok" and message["reasoning_content"] == "t"
  (part,) = made.parts()
  assert part.token_ids == (*prompt, *drawn)
  assert part.logprobs[len(prompt) :] == tuple(sampled.logprobs)
  assert part.records == (sampled,)


def test_a_sampler_that_gives_up_is_a_failure(tokenizer):
  async def sample(prompt_ids, max_tokens):
    return types.SimpleNamespace(
      token_ids=[], logprobs=[], finish_reason="cancelled"
    )

  policy = policies.TokenPolicy(tokenizer, sample)
  with pytest.raises(RuntimeError, match="cancelled"):
    complete(policy, conversation(tokenizer, USER))


def test_a_script_with_and_without_tokens(tokenizer):
  message = policies.call("f", '{"a": "<think>"}', reasoning="t")
  script = policies.replies(message)
  made = conversation(tokenizer, USER)
  completion = complete(policies.ScriptedPolicy(script, tokenizer), made, 500)
  assert completion.finish_reason == "stop"
  assert completion.add_to(made) == message
  without = conversation(None, USER)
  completion = complete(policies.ScriptedPolicy(script), without)
  assert completion.add_to(without) == message
  assert made.messages == without.messages
  cut = complete(
    policies.ScriptedPolicy(script, tokenizer),
    conversation(tokenizer, USER),
    3,
  )
  assert cut.finish_reason == "length" and len(cut.token_ids) == 3


def test_a_completion_is_tokens_or_a_message():
  with pytest.raises(ValueError, match="either token_ids or a message"):
    policies.Completion(finish_reason="stop")
  with pytest.raises(ValueError, match="must be stop or length"):
    policies.Completion(finish_reason="eos", message={})


def ask(response, *messages, options=None):
  """Asks a server that answers so; returns completion and request."""
  requests = []

  def handle(request):
    requests.append(json.loads(request.content))
    return httpx.Response(200, json=response)

  async def main():
    client = openai.AsyncOpenAI(
      base_url="http://model.invalid/v1",
      api_key="key",
      max_retries=0,
      http_client=httpx.AsyncClient(transport=httpx.MockTransport(handle)),
    )
    made = conversation(None, *messages)
    policy = endpoint.EndpointPolicy(client, "m", options)
    async with client:
      return await policy.complete(made, max_tokens=5)

  completion = asyncio.run(main())
  return completion, requests[0]


def response(message, finish_reason="stop", **more):
  return {
    "id": "1",
    "object": "chat.completion",
    "created": 1,
    "model": "m",
    "choices": [
      {
        "index": 0,
        "finish_reason": finish_reason,
        "message": {"role": "assistant", **message},
      }
    ],
    **more,
  }


def test_an_endpoint_gets_messages_and_tools_and_gives_a_message():
  first = policies.call("f", '{"a": 1}', reasoning="why")
  called = {"name": "f", "arguments": '{"a": NaN'}
  completion, request = ask(
    response(
      {
        "content": None,
        "reasoning_content": "because",
        "tool_calls": [{"id": "x", "type": "function", "function": called}],
      },
      "tool_calls",
      usage={"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13},
    ),
    {"role": "system", "content": "s", "tools": [TOOL]},
    USER,
    first,
    {"role": "tool", "content": "r"},
    options={"temperature": 0.5},
  )
  assert request == {
    "model": "m",
    "max_tokens": 5,
    "temperature": 0.5,
    "tools": [TOOL],
    "messages": [
      {"role": "system", "content": "s"},
      USER,
      {
        "role": "assistant",
        "content": "",
        "reasoning_content": "why",
        "tool_calls": [
          {
            "id": "call_2_0",
            "type": "function",
            "function": {"name": "f", "arguments": '{"a": 1}'},
          }
        ],
      },
      {"role": "tool", "content": "r", "tool_call_id": "call_2_0"},
    ],
  }
  assert completion.finish_reason == "stop"
  assert completion.num_prompt_tokens == 9
  assert completion.num_written_tokens == 4
  made = conversation(None, USER)
  message = completion.add_to(made)
  assert message["reasoning_content"] == "because"
  # Whatever a server took for a call stays, JSON or not.
  assert chat.tool_calls(message) == [("f", '{"a": NaN')]
  made.add({"role": "tool", "content": "no"})
  made.keep([0])
  assert made.messages == [USER]


def test_other_servers_name_thinking_otherwise_and_cut_replies_off():
  completion, request = ask(
    response({"content": "a", "reasoning": "r"}, "length"), USER
  )
  assert completion.message["reasoning_content"] == "r"
  assert completion.finish_reason == "length"
  assert completion.num_prompt_tokens == 0
  assert "tools" not in request


def test_a_malformed_reply_goes_to_a_server_as_plain_messages():
  messages, tools = endpoint.to_api(
    [
      USER,
      {"role": "assistant", "content": "<x", "malformed": "m"},
      {"role": "tool", "content": "error: m"},
    ]
  )
  assert tools == []
  assert messages == [
    USER,
    {"role": "assistant", "content": "<x"},
    {"role": "user", "content": "error: m"},
  ]


def test_a_server_without_an_answer_is_a_failure():
  with pytest.raises(RuntimeError, match="gave no choice"):
    ask({**response({"content": ""}), "choices": []}, USER)
