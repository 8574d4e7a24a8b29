"""Episodes with environments and policies that behave in every way."""

import asyncio
import json
import logging

import pytest

from dsv32_jax.agents import chat
from dsv32_jax.agents import loop
from dsv32_jax.agents import policy as policies
from dsv32_jax.agents.environments import general
from dsv32_jax.agents.environments import protocol
from dsv32_jax.agents.synthesis.general import export
from dsv32_jax.agents.synthesis.general import pipeline
from dsv32_jax.data import tokenizer as tokenizers

DSML = "\uff5cDSML\uff5c"
EOS = tokenizers.SPECIAL_TOKENS["eos"]
ADD = protocol.ToolSchema(
  name="add",
  description="Adds to the sum.",
  parameters={
    "type": "object",
    "properties": {"number": {"type": "integer"}},
    "required": ["number"],
    "additionalProperties": False,
  },
)


class Summing:
  """Done once the sum is 10; the reward is the tenth of the sum."""

  def __init__(self, **replaced):
    self.total, self.closed = None, 0
    for name, function in replaced.items():
      setattr(self, name, function)

  async def reset(self):
    self.total = 0
    return protocol.Start(observation="Make it 10.", tools=[ADD])

  async def step(self, call):
    self.total += call.arguments["number"]
    return protocol.Step(
      observation=f"The sum is {self.total}.", done=self.total >= 10
    )

  async def verify(self):
    return self.total / 10

  async def close(self):
    self.closed += 1


@pytest.fixture(scope="module")
def tokenizer():
  return tokenizers.train(["Make it 10. The sum is"] * 20, 300)


def add(number):
  return policies.call("add", json.dumps({"number": number}), reasoning="hm")


FINAL = {"role": "assistant", "content": "ok", "reasoning_content": "enough"}


def run(environment, policy, **options):
  episode = asyncio.run(
    loop.run_episode(policy, lambda: environment, episode_id="e", **options)
  )
  return episode.result, episode.conversation


def scripted(*replies, tokenizer=None):
  return policies.ScriptedPolicy(policies.replies(*replies), tokenizer)


@pytest.mark.parametrize("with_tokens", [False, True])
def test_an_episode_until_the_environment_is_done(tokenizer, with_tokens):
  environment = Summing()
  policy = scripted(
    add(4), add(6), tokenizer=tokenizer if with_tokens else None
  )
  result, conversation = run(environment, policy, system_prompt="Be quick.")
  assert (result.finish, result.reward, result.error) == ("done", 1.0, "")
  assert (result.num_turns, result.num_calls, result.num_bad_calls) == (2, 2, 0)
  assert environment.closed == 1 and result.seconds >= 0
  messages = result.messages
  assert [x["role"] for x in messages] == [
    "system",
    "user",
    "assistant",
    "tool",
    "assistant",
    "tool",
  ]
  assert messages[0]["content"] == "Be quick."
  assert messages[0]["tools"][0]["function"]["name"] == "add"
  assert messages[3]["content"] == "The sum is 4."
  assert json.loads(json.dumps(result.row())) == result.row()
  if with_tokens:
    (part,) = conversation.parts()
    written = [t for t, w in zip(part.token_ids, part.written) if w]
    assert result.num_written_tokens == len(written)
    assert tokenizer.decode(part.token_ids) == (
      chat.encode_messages(messages[:-1], "thinking")
    )


def test_an_episode_until_the_model_answers(tokenizer):
  result, _ = run(Summing(), scripted(add(3), FINAL, tokenizer=tokenizer))
  assert (result.finish, result.reward, result.num_turns) == (
    "answered",
    0.3,
    2,
  )


def raw_call(body):
  return (
    f"t</think>\n\n<{DSML}function_calls>\n{body}\n</{DSML}function_calls>{EOS}"
  )


def raw_invoke(value, name="add", kind="false"):
  return (
    f'<{DSML}invoke name="{name}">\n<{DSML}parameter name="number"'
    f' string="{kind}">{value}</{DSML}parameter>\n</{DSML}invoke>'
  )


BAD_REPLIES = {
  "bad JSON": (raw_call(raw_invoke("{")), "error: the arguments are not JSON"),
  "deep": (raw_call(raw_invoke("[" * 20_000)), "nested too deeply"),
  "NaN": (raw_call(raw_invoke("NaN")), "NaN, which is no number"),
  "keys": (raw_call(raw_invoke('{"a": 1, "a": 2}')), "the key 'a' twice"),
  "unknown": (raw_call(raw_invoke("1", name="ad")), "error: no tool 'ad'"),
  "type": (raw_call(raw_invoke("1", kind="true")), "is not of type 'integer'"),
  "unclosed": (
    raw_call(raw_invoke("1").replace(f"</{DSML}parameter>", "")),
    "error: completion: a parameter is malformed",
  ),
  "twice": (
    raw_call(
      f'<{DSML}invoke name="add">\n'
      + f'<{DSML}parameter name="a" string="true">x</{DSML}parameter>\n' * 2
      + f"</{DSML}invoke>"
    ),
    "error: completion: a parameter is given twice",
  ),
  "no end of thinking": ("thoughts" + EOS, "the thinking does not end"),
  "megabyte": (
    raw_call(raw_invoke('"' + "x" * 2**20 + '"')),
    "more than 100000",
  ),
}


@pytest.mark.parametrize("reply, what", BAD_REPLIES.values(), ids=BAD_REPLIES)
def test_a_wrong_call_is_an_observation_and_the_episode_goes_on(
  tokenizer, reply, what
):
  policy = scripted(reply, add(10), tokenizer=tokenizer)
  result, _ = run(
    Summing(),
    policy,
    limits=loop.EpisodeLimits(window=2**22, turn_tokens=2**21),
  )
  assert (result.finish, result.reward) == ("done", 1.0)
  assert (result.num_turns, result.num_calls, result.num_bad_calls) == (2, 1, 1)
  observation = result.messages[3]
  assert observation["role"] == "tool" and what in observation["content"]
  assert len(observation["content"]) < 1000


def test_two_calls_one_wrong(tokenizer):
  reply = raw_call(f"{raw_invoke('{')}\n{raw_invoke('10')}")
  result, _ = run(Summing(), scripted(reply, tokenizer=tokenizer))
  assert (result.finish, result.num_calls, result.num_bad_calls) == (
    "done",
    1,
    1,
  )
  assert [x["content"][:12] for x in result.messages[3:]] == [
    "error: the a",
    "The sum is 1",
  ]


def test_limits_of_turns_and_tokens(tokenizer):
  forever = policies.ScriptedPolicy(lambda messages: add(1), tokenizer)
  result, _ = run(Summing(), forever, limits=loop.EpisodeLimits(turns=3))
  assert (result.finish, result.reward, result.num_turns) == (
    "max_turns",
    0.3,
    3,
  )
  full, conversation = run(
    Summing(), forever, limits=loop.EpisodeLimits(window=3000)
  )
  assert full.finish == "max_tokens" and full.num_turns >= 2
  (part,) = conversation.parts()
  assert len(part.token_ids) <= 3000
  # One that is cut off is not carried out, however far it came.
  cut, _ = run(Summing(), forever, limits=loop.EpisodeLimits(turn_tokens=5))
  assert (cut.finish, cut.num_calls) == ("max_tokens", 0)
  with pytest.raises(ValueError, match="window=0"):
    loop.EpisodeLimits(window=0)


class Waiting:
  """A policy that takes its time and notes when it is given up."""

  tokenizer = None
  given_up = False

  async def complete(self, conversation, *, max_tokens):
    del conversation, max_tokens
    try:
      await asyncio.sleep(60)
    except asyncio.CancelledError:
      self.given_up = True
      raise


def test_wall_time_ends_the_reply_and_what_was_reached_counts():
  policy, environment = Waiting(), Summing()
  result, _ = run(environment, policy, limits=loop.EpisodeLimits(seconds=0.05))
  assert (result.finish, result.reward) == ("wall_time", 0.0)
  assert policy.given_up and environment.closed == 1


def raising(error):
  async def function(*unused):
    raise error

  return function


async def stubborn(*unused):
  """Hangs, and will not be cancelled."""
  for _ in range(10):
    try:
      await asyncio.sleep(0.05)
    except asyncio.CancelledError:
      continue


async def nan():
  return float("nan")


CRASHES = {
  "reset": ("reset", raising(OSError("disk\nfull")), "OSError: disk full"),
  "step": ("step", raising(KeyError("k")), "steps: KeyError: 'k'"),
  "verify": ("verify", raising(ValueError("v")), "verifies: ValueError: v"),
  "timeout": ("step", raising(TimeoutError("own")), "steps: own"),
  "exit": ("step", raising(SystemExit(3)), "exits with 3"),
  "cancelled": ("step", raising(asyncio.CancelledError()), "from within"),
  "hang": ("step", stubborn, "steps: more than 0.1 s"),
  "nan": ("verify", nan, "reward=nan is not finite"),
}


@pytest.mark.parametrize("name, function, what", CRASHES.values(), ids=CRASHES)
def test_a_crashed_environment_is_a_result(name, function, what, caplog):
  environment = Summing(**{name: function})
  limits = loop.EpisodeLimits(environment_seconds=0.1)
  with caplog.at_level(logging.WARNING):
    result, _ = run(environment, scripted(add(10)), limits=limits)
  assert (result.finish, result.reward) == ("crashed", 0.0)
  assert what in result.error and "\n" not in result.error
  assert environment.closed == 1 and what in caplog.text


def test_an_environment_that_cannot_be_made_is_a_result():
  async def make():
    raise OSError("no sandbox")

  episode = asyncio.run(loop.run_episode(scripted(), make, episode_id="e"))
  assert episode.result.finish == "crashed"
  assert "is made: OSError: no sandbox" in episode.result.error


def test_a_failing_close_keeps_the_reward(caplog):
  environment = Summing(close=raising(OSError("gone")))
  result, _ = run(environment, scripted(add(10)))
  assert (result.finish, result.reward) == ("done", 1.0)
  assert "closes: OSError: gone" in caplog.text


def test_what_a_policy_raises_is_raised_and_the_environment_closed():
  environment = Summing()
  with pytest.raises(ValueError, match="the script has 0 replies"):
    run(environment, scripted())
  assert environment.closed == 1
  with pytest.raises(ValueError, match="thinking_mode="):
    run(Summing(), scripted(), thinking_mode="loud")


def test_chat_mode_and_no_tools(tokenizer):
  async def reset():
    environment.total = 0
    return protocol.Start(observation="Say ok.", tools=[])

  environment = Summing(reset=reset)
  policy = scripted(f"ok{EOS}", tokenizer=tokenizer)
  result, _ = run(environment, policy, thinking_mode="chat")
  assert (result.finish, len(result.messages)) == ("answered", 2)
  called, _ = run(
    Summing(reset=reset), scripted(add(1), FINAL), thinking_mode="chat"
  )
  assert "no tool 'add'; tools: none" in called.messages[2]["content"]


def test_a_synthesised_environment_is_played_to_its_reward(tokenizer):
  record = pipeline.synthesize(
    pipeline.SynthesisConfig(
      seed=3, num_environments=1, num_tasks=2, workers=1
    ),
    0,
  )[0]
  task = record["tasks"][0]
  played, _ = export.trajectory(record, task)
  moves = [
    policies.call(
      call["function"]["name"], call["function"]["arguments"], reasoning="next"
    )
    for message in played
    for call in message.get("tool_calls", ())
  ]
  # An unknown tool first: it costs a turn and nothing else.
  script = policies.replies(policies.call("no", "{}"), *moves)
  episode = asyncio.run(
    loop.run_episode(
      policies.ScriptedPolicy(script, tokenizer),
      lambda: general.GeneralEnvironment(record, task),
      episode_id="e",
      limits=loop.EpisodeLimits(window=2**20),
    )
  )
  result = episode.result
  assert (result.finish, result.reward) == ("done", 1.0), result.error
  assert (result.num_calls, result.num_bad_calls) == (len(moves), 1)
  texts = [
    [m["content"] for m in messages if m["role"] == "tool"]
    for messages in (played, result.messages)
  ]
  assert texts[1][1:] == texts[0]
