"""The tools of a Model Context Protocol server as an environment.

Needs the mcp extra. A server is whatever `mcp.Client` takes: a command to
start, a URL, a server of this process. It belongs to the trusted side: it runs
outside any sandbox, and with what powers is the caller's affair.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
import dataclasses
import inspect
from typing import Any

import mcp

from dsv32_jax.agents import tools
from dsv32_jax.agents.environments import checked
from dsv32_jax.agents.environments import protocol

MAX_STEPS = 500
SUBMIT = protocol.ToolSchema(
  name="submit_result",
  description="Submits the answer and ends the work.",
  parameters={
    "type": "object",
    "properties": {"answer_text": {"type": "string"}},
    "required": ["answer_text"],
    "additionalProperties": False,
  },
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class McpCall:
  """A call that reached the server.

  Attributes:
    name: of the tool.
    arguments: of the call.
    text: what came of it.
    is_error: whether the server says that it failed.
  """

  name: str
  arguments: Mapping[str, Any]
  text: str
  is_error: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class McpTask:
  """What is to be done with the tools of a server.

  Attributes:
    id: of the task.
    prompt: the user's message.
    verify: function of the calls so far and the answer, None before it is
      submitted; returns the reward, 0 to 1. It may be a coroutine function.
    tools: names of those shown; None: all.
  """

  id: str
  prompt: str
  verify: Callable[[Sequence[McpCall], str | None], float | Awaitable[float]]
  tools: tuple[str, ...] | None = None


class McpEnvironment(checked.CheckedEnvironment):
  """One task with a server of its own; see protocol.Environment."""

  def __init__(
    self,
    task: McpTask,
    make_client: Callable[[], mcp.Client],
    *,
    max_steps: int = MAX_STEPS,
  ):
    """Takes the task; nothing is started yet.

    Args:
      task: what is to be done.
      make_client: gives a client that is not entered, such as
        `lambda: mcp.Client(mcp.StdioServerParameters(command=...))`. Each
        episode has a new one, so a server that is started has no past.
      max_steps: after as many calls an episode is done.

    Raises:
      ValueError: max_steps is less than 1.
    """
    super().__init__(task.id, tools.CallChecker(()), max_steps)
    self.task = task
    self._make_client = make_client
    self._session: _Session | None = None

  async def reset(self) -> protocol.Start:
    """Starts the server.

    Raises:
      ValueError: a tool that the task names is not there, or one has no
        schema of an object.
    """
    schemas = await self._renew()
    self.begin(answer=None, calls=[])
    return protocol.Start(observation=self.task.prompt, tools=schemas)

  async def verify(self) -> float:
    calls = [McpCall(**call) for call in self.state["calls"]]
    reward = self.task.verify(calls, self.state["answer"])
    return await reward if inspect.isawaitable(reward) else reward

  def snapshot(self) -> dict[str, Any]:
    """Returns the state; of the server, the calls that led to its own."""
    calls = [dict(call) for call in self.state["calls"]]
    return {"task": self.task.id, "state": {**self.state, "calls": calls}}

  async def restore(self, snapshot: Mapping[str, Any]) -> None:
    """Makes the calls of the snapshot again, to a new server.

    Raises:
      ValueError: the snapshot is of another task.
    """
    self.check_snapshot(snapshot)
    await self._renew()
    state = snapshot["state"]
    self._state = {**state, "calls": [dict(call) for call in state["calls"]]}
    for call in state["calls"]:
      await self._session.call(call["name"], call["arguments"])

  async def close(self) -> None:
    if self._session is not None:
      session, self._session = self._session, None
      await session.close()

  async def carry_out(self, call: protocol.ToolCall) -> str:
    arguments = dict(call.arguments)
    if call.name == SUBMIT.name:
      self.state.update(done=True, answer=arguments["answer_text"])
      return "The answer is submitted."
    text, is_error = await self._session.call(call.name, arguments)
    self.state["calls"].append(
      {
        "name": call.name,
        "arguments": arguments,
        "text": text,
        "is_error": is_error,
      }
    )
    return f"error: {text}" if is_error else text

  async def _renew(self) -> tuple[protocol.ToolSchema, ...]:
    await self.close()
    self._session = _Session(self._make_client())
    found = await self._session.start()
    schemas = {
      tool.name: protocol.ToolSchema(
        name=tool.name,
        description=tool.description or tool.title or "",
        parameters=tool.input_schema,
      )
      for tool in found
    }
    wanted = self.task.tools if self.task.tools is not None else tuple(schemas)
    for name in wanted:
      if name not in schemas:
        raise ValueError(f"the server has no tool {name!r}: {sorted(schemas)}")
    chosen = (*(schemas[name] for name in wanted), SUBMIT)
    self._checker = tools.CallChecker(chosen)
    return chosen


class _Session:
  """A connection in a task of its own, which has to open and close it."""

  def __init__(self, client: mcp.Client):
    self._client = client
    self._orders: asyncio.Queue = asyncio.Queue()
    self._task: asyncio.Task | None = None
    self._is_busy = True

  async def start(self) -> list[mcp.Tool]:
    """Connects; returns the server's tools."""
    ready = asyncio.get_running_loop().create_future()
    self._task = asyncio.create_task(self._serve(ready))
    await asyncio.wait({ready, self._task}, return_when=asyncio.FIRST_COMPLETED)
    if not ready.done():
      ready.cancel()
      await self._task  # Raises what went wrong.
    return ready.result()

  async def call(self, name: str, arguments: Any) -> tuple[str, bool]:
    """Returns the text of a result and whether it is an error.

    Raises:
      RuntimeError: the connection is over.
    """
    answer = asyncio.get_running_loop().create_future()
    await self._orders.put((name, arguments, answer))
    await asyncio.wait(
      {answer, self._task}, return_when=asyncio.FIRST_COMPLETED
    )
    if not answer.done():
      answer.cancel()
      raise RuntimeError(f"the server ended in a call of {name}")
    return answer.result()

  async def close(self) -> None:
    """Ends the connection, and with it a server that it started."""
    if self._is_busy:  # With what nobody waits for any more.
      self._task.cancel()
    await self._orders.put(None)
    await asyncio.wait({self._task})
    if not self._task.cancelled():
      self._task.exception()  # It has been told, or nobody waits for it.

  async def _serve(self, ready):
    async with self._client as client:
      listed, cursor = [], None
      while True:
        page = await client.list_tools(cursor=cursor)
        listed += page.tools
        cursor = page.next_cursor
        if not cursor:
          break
      ready.set_result(listed)
      self._is_busy = False
      while (order := await self._orders.get()) is not None:
        name, arguments, answer = order
        self._is_busy = True
        told = await self._told(client, name, arguments)
        self._is_busy = False
        if not answer.done():
          answer.set_result(told)

  async def _told(self, client, name, arguments):
    try:
      result = await client.call_tool(name, arguments)
    except mcp.MCPError as error:
      # What the server refuses is the caller's fault; its end is not.
      if error.code == mcp.types.CONNECTION_CLOSED:
        raise
      return " ".join(str(error).split()), True
    return "\n".join(map(_text, result.content)), bool(result.is_error)


def _text(block) -> str:
  """Returns a block of content as text; pictures and sounds only by name."""
  if block.type == "text":
    return block.text
  if block.type == "resource" and hasattr(block.resource, "text"):
    return block.resource.text
  what = getattr(block, "mime_type", None) or getattr(block, "uri", block.type)
  return f"[{block.type}: {what}]"
