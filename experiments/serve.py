"""Serves a checkpoint through an OpenAI-compatible API.

python -m experiments.serve --hf_checkpoint=DIR --port=8000

  curl http://127.0.0.1:8000/v1/chat/completions \
    -H 'content-type: application/json' -d '{"model": "NAME",
    "messages": [{"role": "user", "content": "Hello"}], "stream": true}'

Paths: /v1/chat/completions, /v1/completions, /v1/models, /health and, for
Prometheus, /metrics. The first line printed says where it listens. SIGTERM or
Ctrl-C: it takes no more requests, answers those that run for as long as
--drain_seconds, and ends.
"""

import asyncio
import ipaddress
import signal
import socket
import sys

from absl import flags
import uvicorn

from dsv32_jax.generation.server import app
from dsv32_jax.generation.server import connection
from dsv32_jax.generation.server import runner as runners
from experiments import common
from experiments import local_model

_HOST = flags.DEFINE_string(
  "host", "127.0.0.1", "Address to bind; 0.0.0.0: reached from everywhere."
)
_PORT = flags.DEFINE_integer("port", 8000, "0: a free one.", 0, 65535)
_NAME = flags.DEFINE_string(
  "model_name", None, "Of the API; none: the checkpoint's folder."
)
_THINKING = flags.DEFINE_bool(
  "thinking", False, "Whether a chat that does not say so thinks."
)
_KEYS = flags.DEFINE_string(
  "api_key_file", None, "File of keys, one a line; a request needs one of them."
)
_REQUESTS = flags.DEFINE_integer(
  "max_requests", 512, "Answers in work at once, waiting ones included."
)
_BODY = flags.DEFINE_float("max_body_mib", 8.0, "Size of a request, MiB.")
_DRAIN = flags.DEFINE_float(
  "drain_seconds", 60.0, "How long the end waits for requests that run."
)
_STRICT = flags.DEFINE_bool(
  "strict_schemas",
  False,
  "Holds replies and tool calls to strict schemas; needs the extra `grammar`.",
)
_BACKLOG = 2048
_LAST_SECONDS = 10.0


def read_keys(path: str | None) -> tuple[str, ...]:
  """Reads --api_key_file."""
  if path is None:
    return ()
  with open(path, encoding="utf-8") as file:
    keys = tuple(line.strip() for line in file if line.strip())
  if not keys:
    raise ValueError(f"--api_key_file={path} holds no key")
  return keys


def bind(host: str, port: int) -> socket.socket:
  """Takes the address, so that a wrong one shows before the model is loaded."""
  family = socket.AF_INET6 if ":" in host else socket.AF_INET
  bound = socket.socket(family, socket.SOCK_STREAM)
  try:
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind((host, port))
  except OSError as error:
    bound.close()
    raise ValueError(f"--host={host} --port={port}: {error}") from error
  return bound


def warn_if_open(host: str, keys: tuple[str, ...]) -> None:
  """Tells if others than this machine get in without a key."""
  try:
    local = ipaddress.ip_address(host).is_loopback
  except ValueError:
    local = host == "localhost"
  if not local and not keys:
    sys.stderr.write(
      f"warning: --host={host} without --api_key_file: whoever reaches it may"
      " use it\n"
    )


class Server(uvicorn.Server):
  """Gives a runner's requests up when they do not end in time."""

  def __init__(self, config: uvicorn.Config, runner: runners.Runner):
    super().__init__(config)
    self._runner = runner

  async def shutdown(self, sockets=None):
    """Waits for requests, tells those that are too long, and ends."""
    loop = asyncio.get_running_loop()
    late = loop.call_later(_DRAIN.value, self._runner.give_up)
    await super().shutdown(sockets)
    late.cancel()


def run(application, runner, name: str, bound: socket.socket) -> None:
  """Answers until a signal, and then what still runs."""
  server = Server(
    uvicorn.Config(
      application,
      http=connection.Connection,
      ws="none",
      lifespan="on",
      log_level="warning",
      # Of connections, once no request runs any more.
      timeout_graceful_shutdown=_DRAIN.value + _LAST_SECONDS,
      backlog=_BACKLOG,
    ),
    runner,
  )
  # Once it has drained, the server raises again what made it end.
  for kind in (signal.SIGTERM, signal.SIGINT):
    signal.signal(kind, lambda *_: setattr(server, "should_exit", True))
  host, port = bound.getsockname()[:2]
  where = f"[{host}]" if ":" in host else host
  bound.listen(_BACKLOG)
  print(f"{name}: http://{where}:{port}/v1", flush=True)
  server.run(sockets=[bound])


def main(argv):
  del argv
  keys = read_keys(_KEYS.value)
  name = _NAME.value or local_model.name()
  with bind(_HOST.value, _PORT.value) as bound:
    warn_if_open(_HOST.value, keys)
    model = local_model.load()
    config = app.ServerConfig(
      model_name=name,
      max_length=model.max_length,
      thinking=_THINKING.value,
      api_keys=keys,
      max_body_bytes=int(_BODY.value * 2**20),
      max_held_bytes=int(max(_BODY.value, 256) * 2**20),
      drain_seconds=_LAST_SECONDS,
    )
    runner = runners.Runner(model.engine, max_requests=_REQUESTS.value)
    grammars = None
    if _STRICT.value:
      from dsv32_jax.generation.server import json_grammar

      grammars = json_grammar.JsonGrammars(model.tokenizer)
    application = app.make_app(runner, model.tokenizer, config, grammars)
    run(application, runner, name, bound)
  ended = runner.drain(_LAST_SECONDS)
  if runner.failure is not None:
    raise RuntimeError("the engine failed") from runner.failure
  if not ended:
    sys.stderr.write("error: the engine did not come to its end\n")
    return 1
  print("drained")
  return 0


if __name__ == "__main__":
  common.run(main)
