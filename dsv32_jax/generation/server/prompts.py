"""From the messages of a request to the token ids that the model continues."""

from collections.abc import Sequence
import json
from typing import Any

from dsv32_jax.agents import chat
from dsv32_jax.agents import token_stream
from dsv32_jax.agents import tools as tools_lib
from dsv32_jax.data import tokenizer as tokenizers
from dsv32_jax.generation.server import schema_parts
from dsv32_jax.generation.server import schemas

# Checking a schema costs far more than rendering it.
MAX_TOOL_CHARS = 200_000
_NO_PARAMETERS = {"type": "object", "properties": {}}


def chat_ids(
  tokenizer: tokenizers.Tokenizer,
  request: schemas.ChatRequest,
  *,
  thinking: bool,
) -> list[int]:
  """Renders a chat; what messages hold is text, whatever it spells.

  Raises:
    ValueError: the messages, tools or response format have no rendering.
  """
  messages = format_messages(request)
  mode = "thinking" if thinking else "chat"
  pieces = [
    token_stream.Piece(text=text) for text in chat.render(messages, mode)
  ]
  token_stream.require_unicode(pieces)
  return token_stream.TokenStream(_Released(tokenizer), pieces).token_ids()


class _Released:
  """A tokenizer that holds up no other thread, however long the text is."""

  def __init__(self, tokenizer: tokenizers.Tokenizer):
    self.encode = tokenizer.encode_released
    self.special_id = tokenizer.special_id


def completion_ids(
  tokenizer: tokenizers.Tokenizer,
  prompt: str | Sequence[int],
  *,
  with_bos: bool,
) -> list[int]:
  """Encodes a prompt of text; one of token ids stays as it is.

  Raises:
    ValueError: the text has no UTF-8 form.
  """
  if not isinstance(prompt, str):
    return list(prompt)
  token_stream.require_unicode([token_stream.Piece(text=prompt)])
  return [tokenizer.bos_id] * with_bos + tokenizer.encode_released(prompt)


def format_messages(request: schemas.ChatRequest) -> list[dict[str, Any]]:
  """Returns the messages as the chat format has them.

  A developer message is a system message, as the API means it. (The format's
  own developer role is another thing: a user turn of its search agents.) Tool
  results stand in the order of their calls.

  Raises:
    ValueError: a result without its call or the other way round, an end where
      it is not the model's turn, or tools that cannot be called.
  """
  tools = _tools(request)
  messages, waiting = [], []
  results: dict[str, dict[str, Any]] = {}
  for place, given in enumerate(request.messages):
    where = f"messages.{place}"
    if given.role == "tool":
      if given.tool_call_id not in waiting or given.tool_call_id in results:
        raise ValueError(
          f"{where}: tool_call_id={given.tool_call_id!r} answers none of the"
          f" open calls {waiting}"
        )
      results[given.tool_call_id] = {
        "role": "tool",
        "content": _require_text(given, where),
      }
      if len(results) == len(waiting):
        messages += [results[call_id] for call_id in waiting]
        waiting, results = [], {}
      continue
    if waiting:
      raise ValueError(f"{where}: results of calls are missing before it")
    messages.append(_message(given, where))
    if given.role == "assistant":
      waiting = [call.id for call in given.tool_calls or []]
      if len(set(waiting)) < len(waiting):
        raise ValueError(f"{where}: ids of calls are there twice: {waiting}")
  if waiting:
    raise ValueError("messages: the results of the last calls are missing")
  if messages[-1]["role"] not in ("user", "tool"):
    raise ValueError(
      "messages: the last one has to be of role user or tool, not"
      f" {request.messages[-1].role}"
    )
  return _with_system(messages, tools, request.response_format)


def _message(given: schema_parts.Message, where: str) -> dict[str, Any]:
  if given.tool_call_id is not None:
    raise ValueError(f"{where}: tool_call_id is for messages of role tool")
  if given.role == "assistant":
    calls = [call.model_dump() for call in given.tool_calls or []]
    return {
      "role": "assistant",
      "content": given.text or "",
      "reasoning_content": given.reasoning_content or "",
      "tool_calls": calls,
    }
  for name in ("tool_calls", "reasoning_content"):
    if getattr(given, name):
      raise ValueError(f"{where}: {name} is for messages of role assistant")
  role = "system" if given.role == "developer" else given.role
  return {"role": role, "content": _require_text(given, where)}


def _require_text(given: schema_parts.Message, where: str) -> str:
  if given.text is None:
    raise ValueError(f"{where}: a message of role {given.role} has no content")
  return given.text


def _tools(request: schemas.ChatRequest) -> list[dict[str, Any]]:
  """Checks all tools and returns those that the model is shown."""
  functions = [
    tool.function.model_dump(exclude_unset=True) for tool in request.tools or []
  ]
  size = len(json.dumps(functions))
  if size > MAX_TOOL_CHARS:
    raise ValueError(f"tools: {size} characters are more than {MAX_TOOL_CHARS}")
  shown = [
    tools_lib.Tool(
      name=function["name"],
      description=function.get("description", ""),
      parameters=function.get("parameters") or _NO_PARAMETERS,
      function=lambda: None,
    )
    for function in functions
  ]
  try:
    tools_lib.CallChecker(shown)
  except ValueError as error:
    raise ValueError(f"tools: {error}") from error
  if not request.active_tools:
    return []
  return [{"type": "function", "function": one} for one in functions]


def _with_system(messages, tools, response_format) -> list[dict[str, Any]]:
  """Puts tools and a schema of the reply into the first system message."""
  extra: dict[str, Any] = {"tools": tools} if tools else {}
  if response_format is not None and response_format.json_schema is not None:
    extra["response_format"] = response_format.json_schema.schema_
  if not extra:
    return messages
  if messages[0]["role"] != "system":
    messages = [{"role": "system", "content": ""}, *messages]
  return [{**messages[0], **extra}, *messages[1:]]
