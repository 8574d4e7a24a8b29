"""An OpenAI-compatible server whose model is a script of the messages."""

import contextlib

import fastapi

from dsv32_jax.agents import policy as policies
from tests.support import live_server


@contextlib.contextmanager
def serving(script: policies.Script):
  """Yields the base URL of a server that replies as the script does."""
  app = fastapi.FastAPI()

  @app.post("/v1/chat/completions")
  async def complete(request: fastapi.Request):
    reply = script((await request.json())["messages"])
    calls = [
      {"id": f"call_{number}", **call}
      for number, call in enumerate(reply.get("tool_calls", []))
    ]
    message = {
      "role": "assistant",
      "content": reply.get("content", ""),
      "tool_calls": calls or None,
    }
    choice = {"index": 0, "finish_reason": "stop", "message": message}
    return {
      "id": "1",
      "object": "chat.completion",
      "created": 0,
      "model": "script",
      "choices": [choice],
    }

  with live_server.serving(app) as address:
    yield f"{address}/v1"
