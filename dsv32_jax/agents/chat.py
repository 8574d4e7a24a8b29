"""The chat encoding of DeepSeek-V3.2: messages to text, and a reply back.

Messages have the form of the OpenAI API. A user turn ends with the opening of
the reply, so there is no separate generation prompt. Thinking stays in the
text from the last user message on, across tool calls and their results, and
is left out before it; calls and results always stay (paper section 3.2.1).

Rendering yields pieces: those of type `SpecialToken` are single tokens that
the format itself places, all others are text, whatever their characters. Their
concatenation is the official string. Only pieces tell a special token from a
user's text that spells it, so whoever needs token ids takes the pieces.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from dsv32_jax.agents import chat_format
from dsv32_jax.agents import chat_parse

Message = Mapping[str, Any]
THINKING_MODES = ("thinking", "chat")


def encode_messages(
  messages: Sequence[Message],
  thinking_mode: str,
  context: Sequence[Message] | None = None,
  drop_thinking: bool = True,
  add_default_bos_token: bool = True,
) -> str:
  """Renders messages to the official string.

  Args:
    messages: to render, in the form of the OpenAI API, tools and
      response_format on a system or developer message.
    thinking_mode: "thinking" or "chat".
    context: messages before them, not rendered.
    drop_thinking: as in the official code, where it decides only whether a
      developer message before the last user turn is an error in thinking mode:
      thinking before the last user turn is never rendered.
    add_default_bos_token: whether to begin with bos, if there is no context.

  Raises:
    ValueError: the messages have no rendering.
  """
  return "".join(
    render(
      messages, thinking_mode, context, drop_thinking, add_default_bos_token
    )
  )


def render(
  messages: Sequence[Message],
  thinking_mode: str,
  context: Sequence[Message] | None = None,
  drop_thinking: bool = True,
  add_default_bos_token: bool = True,
) -> list[str]:
  """Renders messages to pieces; arguments as of `encode_messages`."""
  thinking = is_thinking(thinking_mode)
  context = list(context or ())
  everything = [*context, *messages]
  last_user = last_user_index(everything)
  if thinking and drop_thinking and messages:
    for message in everything[: max(last_user, 0)]:
      if message.get("role") not in ("user", "system", "tool", "assistant"):
        raise ValueError(
          f"role={message.get('role')!r} before the last user message has no"
          " place in thinking mode with drop_thinking"
        )
  pieces = [chat_format.BOS] if add_default_bos_token and not context else []
  order, calls = 0, 0
  for index, message in enumerate(everything):
    order = order + 1 if message.get("role") == "tool" else 0
    if not order:
      calls = _num_calls(message)
    if index >= len(context):
      pieces += render_message(
        message,
        thinking=thinking,
        current=index >= last_user,
        result=(order, calls),
      )
  return pieces


def is_thinking(thinking_mode: str) -> bool:
  """Returns whether the mode is "thinking"; raises ValueError for no mode."""
  if thinking_mode not in THINKING_MODES:
    raise ValueError(f"{thinking_mode=} is none of {THINKING_MODES}")
  return thinking_mode == "thinking"


def last_user_index(messages: Sequence[Message]) -> int:
  """Index of the last user or developer message, -1 without one."""
  for index, message in enumerate(messages):
    if not isinstance(message, Mapping):
      raise ValueError(
        f"message {index} is {type(message).__name__}, no mapping"
      )
  for index in reversed(range(len(messages))):
    if messages[index].get("role") in ("user", "developer"):
      return index
  return -1


def render_message(
  message: Message,
  *,
  thinking: bool,
  current: bool,
  result: tuple[int, int] = (0, 0),
) -> list[str]:
  """Renders one message to pieces.

  Args:
    message: as of `encode_messages`.
    thinking: whether the mode is thinking.
    current: whether no user or developer message follows.
    result: of a tool message: its place among the results of one assistant
      message, from 1, and the number of calls of that message.

  Raises:
    ValueError: the message has no rendering.
  """
  role, content = message.get("role"), message.get("content")
  tools = [_field(tool, "function") for tool in _items(message, "tools")]
  calls = tool_calls(message)
  extra = []
  if role in ("system", "developer"):
    extra = chat_format.tools_block(tools)
    extra += chat_format.response_format_block(message.get("response_format"))
  opening = (
    chat_format.THINK_START if thinking and current else chat_format.THINK_END
  )
  if role == "system":
    return [str(content or ""), *extra]
  if role == "user":
    return [chat_format.USER, str(content), chat_format.ASSISTANT, opening]
  if role == "developer":
    if not content:
      raise ValueError(f"{role=} needs content, not {content!r}")
    return [
      chat_format.USER,
      *extra,
      chat_format.DEVELOPER,
      str(content),
      chat_format.ASSISTANT,
      opening,
    ]
  if role == "tool":
    order, count = result
    if not 1 <= order <= count:
      raise ValueError(f"result {order} of {count} tool calls has no call")
    pieces = ["\n\n<function_results>"] if order == 1 else []
    pieces += ["\n<result>", str(content), "</result>"]
    if order == count:
      pieces += ["\n</function_results>\n\n", opening]
    return pieces
  if role == "assistant":
    pieces = []
    if thinking and current:
      reasoning = message.get("reasoning_content")
      if not reasoning and not calls:
        raise ValueError(
          "an assistant message after the last user message needs"
          " reasoning_content or tool_calls in thinking mode"
        )
      pieces = [str(reasoning or ""), chat_format.THINK_END]
    return [
      *pieces,
      str(content or ""),
      *chat_format.calls_block(calls),
      chat_format.EOS,
    ]
  raise ValueError(f"{role=} is unknown")


def tool_calls(message: Message) -> list[tuple[str, str]]:
  """Returns (name, arguments as JSON text) of each call of a message."""
  functions = [_field(x, "function") for x in _items(message, "tool_calls")]
  return [(_field(f, "name"), _field(f, "arguments")) for f in functions]


def parse_message_from_completion_text(
  text: str, thinking_mode: str
) -> dict[str, Any]:
  """Reads a completion back into an assistant message.

  Takes exactly what the official code takes: the format, not attempts at it.
  A last call that breaks off behind a parameter is still taken, so a caller
  asks first why generation ended.

  Args:
    text: what the model wrote behind the prompt, its eos included: the prompt
      holds the opening `<think>` or `</think>`.
    thinking_mode: "thinking" or "chat".

  Returns:
    role, content, reasoning_content, and tool_calls without ids; the arguments
    are text put together from what the model wrote, and need not be JSON.

  Raises:
    ValueError: the text does not have the format.
  """
  return chat_parse.parse(text, thinking=is_thinking(thinking_mode))


def _items(message: Message, name: str) -> Sequence[Any]:
  items = message.get(name) or ()
  if not isinstance(items, list | tuple):
    raise ValueError(f"{name} of a message is no list")
  return items


def _num_calls(message: Message) -> int:
  if message.get("role") != "assistant":
    return 0
  return len(_items(message, "tool_calls"))


def _field(value: Any, name: str) -> Any:
  if not isinstance(value, Mapping) or name not in value:
    raise ValueError(f"an entry of tools or tool_calls lacks {name!r}")
  return value[name]
