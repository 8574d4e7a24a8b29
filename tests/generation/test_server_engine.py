"""The API over a real engine, on one device and over a mesh of eight."""

import contextlib
import functools
import json
from typing import Annotated, Literal

from flax import nnx
import jax
import jsonschema
import openai
import pydantic
import pytest

from dsv32_jax import sharding
from dsv32_jax.agents import chat_format
from dsv32_jax.generation import engine as engine_lib
from dsv32_jax.generation.server import app as app_lib
from dsv32_jax.generation.server import json_grammar
from dsv32_jax.generation.server import runner as runner_lib
from dsv32_jax.generation.server import text_stream
from tests.support import live_server
from tests.support import models

pytestmark = pytest.mark.slow

USER = {"role": "user", "content": "hi there, what is it?"}
TOOLS = [
  {"type": "function", "function": {"name": name}} for name in ("add", "adds")
]


@pytest.fixture(scope="module")
def model(tokenizer):
  return models.tiny_model(
    num_layers=2,
    num_dense_layers=1,
    num_mtp_layers=0,
    vocab_size=tokenizer.vocab_size + 5,
    max_length=2048,
  )


@contextlib.contextmanager
def serving(model, tokenizer):
  engine = engine_lib.Engine(
    model,
    engine_lib.EngineConfig(
      max_batch=4, page_size=8, num_pages=512, prefill_chunk=32, max_length=2048
    ),
    eos_id=tokenizer.eos_id,
    detokenize=functools.partial(text_stream.decode, tokenizer),
  )
  runner = runner_lib.Runner(engine, max_requests=32)
  config = app_lib.ServerConfig(model_name="m", max_length=2048)
  grammars = json_grammar.JsonGrammars(tokenizer)
  app = app_lib.make_app(runner, tokenizer, config, grammars)
  with (
    live_server.serving(app) as url,
    openai.OpenAI(
      base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=240
    ) as client,
  ):
    yield client


@pytest.fixture(scope="module")
def client(model, tokenizer):
  with serving(model, tokenizer) as client:
    yield client


def asked(client, **changes):
  given = dict(model="m", messages=[USER], max_tokens=12, seed=1)
  return client.chat.completions.create(**given | changes).choices


def greedy(client):
  """Texts of answers of one token after the other, asked for together."""
  whole = asked(client, temperature=0, n=3)
  texts = [one.message.content for one in whole]
  stream = client.completions.create(
    model="m",
    prompt=["hi", "what is it, there?", "it"],
    temperature=0,
    max_tokens=20,
    stream=True,
  )
  parts = {}
  for chunk in stream:
    for one in chunk.choices:
      parts[one.index] = parts.get(one.index, "") + one.text
  return [*texts, *(parts[index] for index in sorted(parts))]


@pytest.mark.parametrize(
  "sizes", [dict(tensor=2, expert=4), dict(data=2, fsdp=2, tensor=2)]
)
def test_text_of_a_mesh_equals_that_of_one_device(
  model, tokenizer, client, sizes
):
  mesh = sharding.make_mesh(sharding.MeshConfig(**sizes))
  graph, state = nnx.split(model)
  layout = sharding.parameter_shardings(state, mesh)
  spread = nnx.merge(graph, jax.device_put(state, layout))
  want = greedy(client)
  assert len(want) == 6 and all(want)
  with serving(spread, tokenizer) as other:
    assert greedy(other) == want


def test_choices_of_a_prompt_share_it_and_differ(client):
  many = asked(client, n=8, temperature=1.0)
  assert len({one.message.content for one in many}) > 4
  alone = [asked(client, seed=1 + place)[0] for place in range(8)]
  assert [x.message.content for x in alone] == [x.message.content for x in many]


def test_a_bias_of_a_hundred_is_nearly_a_command(client, tokenizer):
  (token,) = tokenizer.encode("hi")[:1]
  (one,) = asked(
    client, logit_bias={str(token): 100}, logprobs=True, top_logprobs=2
  )
  assert one.message.content == tokenizer.decode([token]) * 12
  for place in one.logprobs.content:
    first, second = place.top_logprobs
    assert first.logprob == place.logprob > second.logprob > -130
  # Every repetition costs twice 2: the others' turn comes.
  (other,) = asked(
    client,
    logit_bias={str(token): 10},
    presence_penalty=2,
    frequency_penalty=2,
    temperature=0,
  )
  times = other.message.content.count(tokenizer.decode([token]))
  assert 1 <= times < 12


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("name", ["add", "adds", None])
def test_the_start_of_a_forced_call(client, tokenizer, name, thinking):
  """Random weights write no arguments: the reply is cut before they end."""
  choice = {"type": "function", "function": {"name": name}}
  kwargs = {"chat_template_kwargs": {"thinking": thinking}, "ignore_eos": True}
  # So that the thinking ends at all.
  bias = {str(tokenizer.special_id("think_end")): 100} if thinking else {}
  (one,) = asked(
    client,
    tools=TOOLS,
    tool_choice=choice if name else "required",
    max_tokens=150,
    logprobs=True,
    logit_bias=bias,
    extra_body=kwargs,
  )
  assert one.finish_reason == "length"
  text = "".join(part.token for part in one.logprobs.content)
  if thinking:
    nothing, _, text = text.partition(chat_format.THINK_END)
    assert nothing == ""
  starts = [
    "".join(chat_format.first_call_block(n))
    for n in ("add", "adds")
    if name in (n, None)
  ]
  assert any(text.startswith(start) for start in starts)
  # Nothing else could have been drawn there, and much behind it.
  certain = [part.logprob == 0 for part in one.logprobs.content]
  assert sum(certain) > 10 and (thinking or not all(certain))


SCHEMA = {
  "type": "object",
  "properties": {
    "answer": {"enum": ["it", "there"]},
    "sure": {"type": "boolean"},
    "places": {"type": "array", "items": {"type": "integer"}, "maxItems": 2},
  },
  "required": ["answer", "sure", "places"],
  "additionalProperties": False,
}


def test_replies_of_a_random_model_keep_to_a_schema(client):
  """The integers are of any length: one that is cut is no reply."""
  schema = {"name": "reply", "schema": SCHEMA, "strict": True}
  choices = asked(
    client,
    n=6,
    max_tokens=900,
    temperature=1.0,
    response_format={"type": "json_schema", "json_schema": schema},
  )
  whole = [one for one in choices if one.finish_reason == "stop"]
  assert len(whole) > 3
  for one in whole:
    jsonschema.validate(json.loads(one.message.content), SCHEMA)


class Look(pydantic.BaseModel):
  """Looks for something."""

  what: Literal["it", "there"]
  sure: bool
  times: Annotated[int, pydantic.Field(ge=0, le=99)]
  where: Literal["hi"] | None


def test_calls_of_a_random_model_keep_to_strict_tools(client):
  """The client makes the tool of a class, and reads the arguments as one."""
  reply = client.chat.completions.parse(
    model="m",
    messages=[USER],
    tools=[openai.pydantic_function_tool(Look)],
    tool_choice="required",
    parallel_tool_calls=False,
    n=3,
    max_tokens=400,
    seed=1,
  )
  for one in reply.choices:
    (call,) = one.message.tool_calls
    assert one.finish_reason == "tool_calls"
    assert isinstance(call.function.parsed_arguments, Look)


@pytest.mark.parametrize(
  "changes,message",
  [
    (dict(tools=TOOLS), "goes with no tools"),
    (dict(tools=TOOLS, tool_choice="required"), "goes with no tools"),
  ],
)
def test_strict_replies_and_calls_exclude_each_other(client, changes, message):
  with pytest.raises(openai.BadRequestError, match=message):
    asked(client, response_format={"type": "json_object"}, **changes)


def test_a_schema_that_cannot_be_kept_to(client):
  schema = {"name": "a", "schema": {"not": {}}, "strict": True}
  with pytest.raises(openai.BadRequestError, match=r"response_format: .*not"):
    asked(
      client,
      response_format={"type": "json_schema", "json_schema": schema},
    )
