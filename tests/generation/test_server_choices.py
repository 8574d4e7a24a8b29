"""What a request may ask of the drawing: penalties, biases, forced calls."""

import json

import openai
import pytest

from dsv32_jax.agents import chat
from dsv32_jax.agents import chat_format
from dsv32_jax.data import tokenizer as tokenizers
from dsv32_jax.generation.server import json_grammar
from tests.support import scripted_api


@pytest.fixture(scope="module")
def tokenizer():
  return tokenizers.train(["What is it? It is what it is."] * 5, 300)


@pytest.fixture
def served(tokenizer):
  script = [*tokenizer.encode("It is what it is."), tokenizer.eos_id]
  with scripted_api.serving(tokenizer, lambda prompt: script) as served:
    yield served


def test_penalties_biases_and_likeliest_tokens(served, tokenizer):
  choice = served.chat(
    presence_penalty=0.5, frequency_penalty=-1, logit_bias={"7": 2, "9": -3.5},
    logprobs=True, top_logprobs=3, max_tokens=4,
  ).choices[0]  # fmt: skip
  sampling = served.engine.seen[0].sampling
  assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.5, -1)
  assert sampling.logit_bias == ((7, 2), (9, -3.5))
  for one in choice.logprobs.content:
    assert [x.logprob for x in one.top_logprobs] == [-40.5, -41.5, -42.5]
    want = [tokenizer.decode([n]) for n in (40, 41, 42)]
    assert [x.token for x in one.top_logprobs] == want
    assert bytes(one.top_logprobs[0].bytes).decode() == want[0]
  (choice,) = served.client.completions.create(
    model="m", prompt="What", max_tokens=4, logprobs=2
  ).choices
  want = {tokenizer.decode([n]): -0.5 - n for n in (40, 41)}
  assert choice.logprobs.top_logprobs == [want] * 4


FORCED = {"type": "function", "function": {"name": "add"}}
OTHER = {
  "type": "function",
  "function": {"name": "sub", "parameters": {"type": "object"}},
}


@pytest.mark.parametrize("mode", ["chat", "thinking"])
@pytest.mark.parametrize("choice", ["required", FORCED])
def test_a_call_that_has_to_be_made(tokenizer, choice, mode):
  """A script that says something else first, and knows the arguments."""
  begun = "".join(chat_format.first_call_block("add"))
  text = chat.encode_messages(
    [scripted_api.CALL], mode, context=[scripted_api.USER]
  )
  thought, _, rest = text.partition(begun)
  script = tokenizer.encode_rendered(thought) + tokenizer.encode_rendered(rest)
  asked = dict(
    tools=[scripted_api.TOOL, OTHER],
    tool_choice=choice,
    extra_body=scripted_api.thinking(mode == "thinking"),
  )
  with scripted_api.serving(tokenizer, lambda prompt: script) as served:
    whole = served.chat(**asked).choices[0]
    parts, _ = scripted_api.assembled(served.chat(stream=True, **asked))
  (call,) = whole.message.tool_calls
  assert (call.function.name, whole.finish_reason) == ("add", "tool_calls")
  want = json.loads(scripted_api.CALL["tool_calls"][0]["function"]["arguments"])
  assert json.loads(call.function.arguments) == want
  reasoning = getattr(whole.message, "reasoning_content", None)
  assert reasoning == (
    scripted_api.CALL["reasoning_content"] if thought else None
  )
  assert parts[0]["calls"][0].function.name == "add"
  assert parts[0]["finish"] == "tool_calls"


def test_a_forced_call_that_the_model_spoils(tokenizer):
  def script(prompt_ids):
    del prompt_ids
    return [*tokenizer.encode("It is"), tokenizer.eos_id]

  asked = dict(tools=[scripted_api.TOOL], tool_choice="required")
  with scripted_api.serving(tokenizer, script) as served:
    with pytest.raises(openai.InternalServerError, match="what it wrote is"):
      served.chat(**asked)
    with pytest.raises(openai.APIError, match="what it wrote is none"):
      list(served.chat(stream=True, **asked))
    (cut,) = served.chat(max_tokens=9, **asked).choices
    assert cut.finish_reason == "length" and not cut.message.tool_calls


@pytest.mark.parametrize("mode", ["chat", "thinking"])
@pytest.mark.parametrize("parallel", [None, True, False])
def test_at_most_one_call_where_that_is_asked_for(tokenizer, parallel, mode):
  calls = scripted_api.CALL["tool_calls"] * 3
  text = chat.encode_messages(
    [scripted_api.CALL | {"tool_calls": calls}],
    mode,
    context=[scripted_api.USER],
  )
  script = tokenizer.encode_rendered(text)
  asked = dict(
    tools=[scripted_api.TOOL],
    extra_body=scripted_api.thinking(mode == "thinking"),
    **({} if parallel is None else {"parallel_tool_calls": parallel}),
  )
  with scripted_api.serving(tokenizer, lambda prompt: script) as served:
    reply = served.chat(**asked)
    parts, usage = scripted_api.assembled(
      served.chat(stream=True, stream_options={"include_usage": True}, **asked)
    )
    assert not served.engine.has_work
  (whole,), want = reply.choices, 1 if parallel is False else 3
  assert len(whole.message.tool_calls) == len(parts[0]["calls"]) == want
  assert whole.finish_reason == parts[0]["finish"] == "tool_calls"
  arguments = json.loads(calls[0]["function"]["arguments"])
  for call in whole.message.tool_calls:
    assert json.loads(call.function.arguments) == arguments
  # What is not read is not drawn: of three calls about a third.
  drawn = reply.usage.completion_tokens
  assert usage.completion_tokens == drawn
  assert (drawn < 0.7 * len(script)) == (parallel is False)
  assert not whole.message.content and not parts[0]["content"]


STRICT = {
  "type": "function",
  "function": {
    "name": "add",
    "strict": True,
    "parameters": {
      "type": "object",
      "properties": {
        "a": {"type": "integer"},
        "note": {"type": ["string", "null"]},
      },
      "required": ["a", "note"],
      "additionalProperties": False,
    },
  },
}


def test_arguments_of_a_strict_tool_keep_to_its_schema(tokenizer):
  """A script that writes letters where the schema has an integer."""
  right = chat.encode_messages(
    [scripted_api.CALL], "chat", context=[scripted_api.USER]
  )
  wrong = right.replace('string="false">1<', 'string="false">1x<')
  assert wrong != right
  script = tokenizer.encode_rendered(wrong)
  grammars = json_grammar.JsonGrammars(tokenizer)

  def asked(served, tool):
    return served.chat(tools=[tool], max_tokens=len(script) + 60).choices[0]

  with scripted_api.serving(
    tokenizer, lambda prompt: script, grammars=grammars
  ) as served:
    free = asked(served, scripted_api.TOOL)
    held = asked(served, STRICT)
    with pytest.raises(openai.BadRequestError, match="'add': additionalProp"):
      asked(
        served,
        {
          "type": "function",
          "function": {**scripted_api.TOOL["function"], "strict": True},
        },
      )
  assert free.finish_reason == "stop" and not free.message.tool_calls
  (call,) = held.message.tool_calls
  found = json.loads(call.function.arguments)
  assert isinstance(found.pop("a"), int) and list(found) == ["note"]
  # Without the library it is refused, and told what for.
  with scripted_api.serving(tokenizer, lambda prompt: script) as served:
    with pytest.raises(openai.BadRequestError, match="--strict_schemas"):
      asked(served, STRICT)
    # A tool that is not shown holds nothing to anything.
    served.chat(tools=[STRICT], tool_choice="none", max_tokens=4)


def test_a_value_that_ends_its_parameter_is_a_failure(tokenizer):
  """Of JSON it may be a part, and the format has no way to say so."""
  bounded = {"type": "string", "maxLength": 60}
  function = STRICT["function"] | {
    "parameters": STRICT["function"]["parameters"]
    | {"properties": {"note": bounded}, "required": ["note"]}
  }
  # All else is certain, and no part of the script.
  value = f'</{chat_format.DSML}parameter>"'
  script = [*tokenizer.encode_rendered(value), tokenizer.eos_id]
  grammars = json_grammar.JsonGrammars(tokenizer)
  with scripted_api.serving(
    tokenizer, lambda prompt: script, grammars=grammars
  ) as served:
    tool = {"type": "function", "function": function}
    with pytest.raises(openai.InternalServerError, match="holds what ends it"):
      served.chat(
        tools=[tool], tool_choice="required", parallel_tool_calls=False
      )
