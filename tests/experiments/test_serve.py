"""experiments.serve as a process of its own, under the `openai` client."""

import asyncio
import re
import signal
import socket
import subprocess
import sys
import time

import httpx
import openai
import pytest

from dsv32_jax.agents import endpoint
from experiments import common
from experiments import serve
from tests.support import served_model

NUM_STREAMS = 240
USER = {"role": "user", "content": "hi there, what is it?"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("serve") / "tiny"
  folder.mkdir()
  served_model.save_checkpoint(folder)
  return folder


def client(url):
  return openai.AsyncOpenAI(
    base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=240
  )


def arguments(number, **changes):
  """A request whose answer is the same whenever it is asked."""
  body = {"thinking": {"type": "enabled" if number % 2 else "disabled"}}
  return dict(
    model="tiny",
    messages=[{**USER, "content": USER["content"] * (1 + number % 5)}],
    max_tokens=64 + 8 * (number % 9),
    seed=number,
    extra_body={**body, "ignore_eos": True},
    **changes,
  )


async def streamed(api, number, leave_after=None):
  """Returns all text of a stream, or None where the client vanishes."""
  seen, text = 0, ""
  given = arguments(number, stream=True)
  if leave_after is not None:
    given["max_tokens"] = 300
  async with await api.chat.completions.create(**given) as stream:
    async for chunk in stream:
      if seen == leave_after:
        return None
      seen += 1
      delta = chunk.choices[0].delta
      text += getattr(delta, "reasoning_content", None) or ""
      text += delta.content or ""
  assert chunk.choices[0].finish_reason == "length"
  return text


async def whole_until(api, number, seconds):
  """Asks for an answer that takes longer, and vanishes."""
  with pytest.raises(TimeoutError):
    async with asyncio.timeout(seconds):
      await api.chat.completions.create(
        **{**arguments(number), "max_tokens": 300}
      )


async def load(url):
  """Runs many requests at once, a third of which vanish in some way."""
  async with client(url) as api:

    async def one(number):
      if number % 3:
        return await streamed(api, number)
      if number % 2:
        # Some before the first token: the first chunk comes with none.
        return await streamed(api, number, leave_after=number % 4)
      return await whole_until(api, number, 0.2 * (1 + number % 4))

    return await asyncio.gather(*map(one, range(NUM_STREAMS)))


async def alone(url, numbers):
  async with client(url) as api:
    return {number: await streamed(api, number) for number in numbers}


def value(url, name):
  page = httpx.get(f"{url}/metrics").text
  return float(re.search(rf"^{re.escape(name)} (.*)$", page, re.M).group(1))


def wait_for(url, name, wanted):
  deadline = time.monotonic() + 60
  while (found := value(url, name)) != wanted:
    assert time.monotonic() < deadline, (name, found)
    time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_hundreds_of_streams_whose_clients_vanish(folder):
  # 83 pages of 8 tokens for 32 sequences: some give theirs back and wait.
  flags = ("--max_batch=32", "--cache_gib=0.0002", "--max_requests=300")
  with served_model.server(folder, *flags) as (process, url):
    texts = asyncio.run(load(url))
    wait_for(url, "dsv32_engine_pages_used", 0)
    wait_for(url, "dsv32_http_requests_open", 1)  # the question itself
    ended = 'dsv32_choices_ended_total{reason="%s"}'
    # How many of the impatient ones ask at all depends on the machine.
    assert value(url, ended % "cancelled") >= NUM_STREAMS // 8
    assert value(url, "dsv32_engine_preemptions_total") > 0
    assert value(url, "dsv32_engine_running") == 0
    assert value(url, "dsv32_engine_waiting") == 0
    for number, text in enumerate(texts):
      assert (text is None) == (number % 3 == 0)
    sample = [number for number in range(1, NUM_STREAMS, 40) if number % 3]
    for number, text in asyncio.run(alone(url, sample)).items():
      assert texts[number] == text
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    assert process.stdout.read() == "drained\n"


def begin(api):
  """Asks for the longest stream that there can be."""
  return api.completions.create(
    model="tiny",
    prompt="hi",
    max_tokens=450,
    stream=True,
    extra_body={"ignore_eos": True},
  )


async def last_chunk(stream):
  """Returns the last chunk, None where the stream ends with an error."""
  try:
    async for chunk in stream:
      last = chunk
  except openai.APIError as error:
    assert "the server is shutting down" in str(error)
    return None
  return last


async def drained(process, url):
  """Asks, lets the server end, and returns the last of what came."""
  async with client(url) as api:
    streams = [await begin(api) for _ in range(3)]
    process.send_signal(signal.SIGTERM)
    await asyncio.sleep(0.3)
    with pytest.raises(openai.APIConnectionError):
      await client(url).models.list()
    return [await last_chunk(stream) for stream in streams]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_sigterm_lets_what_runs_come_to_its_end(folder):
  with served_model.server(folder) as (process, url):
    for chunk in asyncio.run(drained(process, url)):
      assert chunk.choices[0].finish_reason == "length"
    assert process.wait(60) == 0
    assert process.stdout.read() == "drained\n"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_does_not_end_in_time_is_given_up(folder):
  flags = ("--drain_seconds=0.5", "--max_batch=1")

  async def ask(process, url):
    async with client(url) as api:
      streams = [await begin(api) for _ in range(20)]
      process.send_signal(signal.SIGTERM)
      ends = [await last_chunk(stream) for stream in streams]
    return sum(end is None for end in ends)

  with served_model.server(folder, *flags) as (process, url):
    assert asyncio.run(ask(process, url)) > 10
    assert process.wait(30) == 0
    assert process.stdout.read() == "drained\n"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_agent_behind_the_api_and_a_key(folder, tmp_path):
  keys = tmp_path / "keys"
  keys.write_text("first\n\nsecond\n")
  flags = (f"--api_key_file={keys}", "--model_name=named", "--thinking")
  with served_model.server(folder, *flags) as (_, url):
    with openai.OpenAI(
      base_url=f"{url}/v1", api_key="none", max_retries=0
    ) as api:
      with pytest.raises(openai.AuthenticationError):
        api.models.list()
      api = api.with_options(api_key="second")
      assert [one.id for one in api.models.list()] == ["named"]

    async def ask():
      async with openai.AsyncOpenAI(
        base_url=f"{url}/v1", api_key="first"
      ) as api:
        policy = endpoint.EndpointPolicy(api, "named", {"seed": 3})
        return await policy.complete(Messages([USER]), max_tokens=9)

    completion = asyncio.run(ask())
    assert completion.num_written_tokens == 9
    assert completion.finish_reason == "length"
    # Without an end of the thinking all of it is.
    assert completion.message["reasoning_content"]
    assert not completion.message["content"]


class Messages:
  """A conversation of which only the messages are asked for."""

  def __init__(self, messages):
    self.messages = messages


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    ([], "give one of --hf_checkpoint and --checkpoint"),
    (["--checkpoint=/nowhere/checkpoints"], "/nowhere/tokenizer.json"),
    (["--checkpoint=/nowhere", "--host=256.1.1.1"], "--host=256.1.1.1"),
    (["--checkpoint=/nowhere", "--api_key_file=/nokeys"], "/nokeys"),
    (["--checkpoint=/nowhere", "--api_key_file=/dev/null"], "holds no key"),
  ],
)
def test_mistakes_are_told(flags, message):
  common.parse_flags(["--port=0", *flags])
  with pytest.raises((ValueError, OSError), match=message):
    serve.main([])


def test_a_port_in_use_is_one_line(folder):
  with socket.create_server(("127.0.0.1", 0)) as taken:
    port = taken.getsockname()[1]
    done = subprocess.run(
      [
        *(sys.executable, "-m", "experiments.serve", f"--port={port}"),
        f"--checkpoint={folder / 'checkpoints'}",
      ],
      check=False,
      capture_output=True,
      text=True,
    )
  assert done.returncode == 1
  (line,) = done.stderr.splitlines()
  assert line.startswith("error: ") and f"--port={port}" in line


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_an_open_door_is_told(host, capsys):
  serve.warn_if_open(host, ())
  assert f"--host={host} without --api_key_file" in capsys.readouterr().err
  serve.warn_if_open(host, ("key",))
  for loopback in ("127.0.0.1", "::1", "localhost"):
    serve.warn_if_open(loopback, ())
  assert not capsys.readouterr().err
