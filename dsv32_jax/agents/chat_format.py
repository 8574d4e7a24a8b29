"""What the chat format consists of: special tokens, fixed text, tool calls.

A message is rendered to pieces: those of type `SpecialToken` are single tokens
that the format itself places, all others are text, whatever their characters.
"""

from collections.abc import Sequence
import json
import re
from typing import Any

from dsv32_jax.data import tokenizer


class SpecialToken(str):
  """The string of a special token, as opposed to text that spells it.

  Attributes:
    name: a key of `tokenizer.SPECIAL_TOKENS`.
  """

  name: str

  def __new__(cls, name: str):
    token = super().__new__(cls, tokenizer.SPECIAL_TOKENS[name])
    token.name = name
    return token


BOS, EOS = SpecialToken("bos"), SpecialToken("eos")
USER, ASSISTANT = SpecialToken("user"), SpecialToken("assistant")
THINK_START = SpecialToken("think_start")
THINK_END = SpecialToken("think_end")
DSML = SpecialToken("dsml")
_MARKS = {"@dsml@": DSML, "@start@": THINK_START, "@end@": THINK_END}

# The text of the format, byte for byte.
_TOOLS = """## Tools

You have access to a set of tools you can use to answer the user's question.
You can invoke functions by writing a "<@dsml@function_calls>" block like the\
 following as part of your reply to the user:
<@dsml@function_calls>
<@dsml@invoke name="$FUNCTION_NAME">
<@dsml@parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE\
</@dsml@parameter>
...
</@dsml@invoke>
<@dsml@invoke name="$FUNCTION_NAME2">
...
</@dsml@invoke>
</@dsml@function_calls>

String and scalar parameters should be specified as is without any escaping or\
 quotes, while lists and objects should use JSON format. The "string" attribute\
 should be set to "true" for string type parameters and "false" for other types\
 (numbers, booleans, arrays, objects).

If the thinking_mode is enabled, then after function results you should\
 strongly consider outputting a thinking block. Here is an example:

<@dsml@function_calls>
...
</@dsml@function_calls>

<function_results>
...
</function_results>

@start@...thinking about results@end@

Here are the functions available in JSONSchema format:
<functions>
"""
_TOOLS_END = "\n</functions>\n"
_RESPONSE_FORMAT = (
  "\n\n## Response Format:\n\nYou MUST strictly adhere to the following schema"
  " to reply:\n"
)
DEVELOPER = "\n\n# The user's message is: "


def _split_marks(text: str) -> list[str]:
  parts = re.split("(" + "|".join(_MARKS) + ")", text)
  return [_MARKS.get(part, part) for part in parts if part]


# What stands between special tokens, names and values of calls and results.
PHRASES = (
  "\n\n<",
  "function_calls>\n<",
  'invoke name="',
  '">\n<',
  '">\n\n</',
  'parameter name="',
  '" string="true">',
  '" string="false">',
  "</",
  "parameter>\n<",
  "parameter>\n</",
  "invoke>\n<",
  "invoke>\n</",
  "function_calls>",
  "\n\n<function_results>\n<result>",
  "</result>\n<result>",
  "</result>\n</function_results>\n\n",
)
_TOOLS_PIECES = _split_marks(_TOOLS)
_CALLS_OPEN = _split_marks("\n\n<@dsml@function_calls>\n")
_CALLS_CLOSE = _split_marks("\n</@dsml@function_calls>")
_INVOKE_OPEN = _split_marks('<@dsml@invoke name="')
_INVOKE_CLOSE = _split_marks("\n</@dsml@invoke>")
_PARAMETER_OPEN = _split_marks('<@dsml@parameter name="')
_PARAMETER_CLOSE = _split_marks("</@dsml@parameter>")


def to_json(value: Any) -> str:
  """Returns JSON text as the format has it; ValueError if there is none."""
  try:
    return json.dumps(value, ensure_ascii=False)
  except (TypeError, RecursionError) as error:
    raise ValueError(f"a value has no JSON form: {error}") from error


def tools_block(tools: Sequence[Any]) -> list[str]:
  """Pieces that describe functions to the model, none for no function."""
  if not tools:
    return []
  schemas = "\n".join(to_json(tool) for tool in tools)
  return ["\n\n", *_TOOLS_PIECES, schemas, _TOOLS_END]


def response_format_block(schema: Any) -> list[str]:
  """Pieces that demand a schema of the answer, none for no schema."""
  return [_RESPONSE_FORMAT, to_json(schema)] if schema else []


def calls_block(calls: Sequence[tuple[str, str]]) -> list[str]:
  """Pieces of tool calls, none for no call.

  Args:
    calls: name, and arguments as the text of a JSON object.

  Raises:
    ValueError: the arguments are not that.
  """
  if not calls:
    return []
  pieces = [*_CALLS_OPEN]
  for place, (name, arguments) in enumerate(calls):
    pieces += ["\n"] if place else []
    pieces += [*_INVOKE_OPEN, str(name), '">\n']
    for number, (key, value) in enumerate(_load(arguments).items()):
      is_string = isinstance(value, str)
      pieces += ["\n"] if number else []
      pieces += [*_PARAMETER_OPEN, key]
      pieces += ['" string="true">' if is_string else '" string="false">']
      pieces += [value if is_string else to_json(value), *_PARAMETER_CLOSE]
    pieces += _INVOKE_CLOSE
  return [*pieces, *_CALLS_CLOSE]


def first_call_block(name: str) -> list[str]:
  """Pieces of tool calls up to where the arguments of the first one begin."""
  return [*_CALLS_OPEN, *_INVOKE_OPEN, name, '">\n']


def _load(arguments: str) -> dict[str, Any]:
  try:
    loaded = json.loads(arguments)
  except (ValueError, TypeError, RecursionError) as error:
    raise ValueError(f"a call's arguments are not JSON: {error}") from error
  if not isinstance(loaded, dict):
    raise ValueError(f"a call's arguments are {type(loaded).__name__}, no dict")
  return loaded
