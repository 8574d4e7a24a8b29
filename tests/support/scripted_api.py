"""A server of scripted replies, under the `openai` client."""

import contextlib
import dataclasses

import openai

from dsv32_jax.agents import policy
from dsv32_jax.generation.server import app as app_lib
from dsv32_jax.generation.server import connection
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


@contextlib.contextmanager
def serving(
  tokenizer, script, http=connection.Connection, grammars=None, **changes
):
  engine = scripted_engine.ScriptedEngine(script, tokenizer.eos_id)
  runner = runner_lib.Runner(engine, max_requests=8)
  config = app_lib.ServerConfig(model_name="m", max_length=4096, **changes)
  app = app_lib.make_app(runner, tokenizer, config, grammars)
  options = dict(api_key="key", max_retries=0)
  with (
    live_server.serving(app, http) as url,
    openai.OpenAI(base_url=f"{url}/v1", **options) as client,
  ):
    yield Served(engine, client, url)


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
