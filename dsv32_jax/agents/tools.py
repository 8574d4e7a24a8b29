"""Tools that a model may call, and what becomes of a call that is wrong.

Arguments are text that a model wrote. They are read strictly and checked
against the tool's JSON schema before any function sees them; whatever is wrong
with a call becomes an observation that begins with "error: ", and the episode
goes on.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
import dataclasses
import functools
import inspect
import json
import math
import re
from typing import Any, NoReturn, Protocol

import jsonschema
from jsonschema import validators
import referencing
import referencing.jsonschema

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")
_SHOWN_CHARS = 300


class ToolError(Exception):
  """What a model did wrong, told in words that it may read."""


class Schema(Protocol):
  """What a model is told about a tool, whatever carries it."""

  name: str
  description: str
  parameters: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tool:
  """A function and what a model is told about it.

  Attributes:
    name: letters, digits, "_", "." and "-".
    description: what it does.
    parameters: JSON schema of its arguments, of type object, with no reference
      to anything outside it.
    function: takes the arguments by name; returns text or what has a JSON
      form. It may be a coroutine function, and is one if it may wait. A
      ToolError becomes an observation, any other exception is a bug.
  """

  name: str
  description: str
  parameters: Mapping[str, Any]
  function: Callable[..., Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToolLimits:
  """Bounds of one call.

  Attributes:
    argument_chars: of the text of all arguments.
    result_chars: of an observation; the rest is left out.
    seconds: that a coroutine function may take.
  """

  argument_chars: int = 100_000
  result_chars: int = 20_000
  seconds: float = 120.0

  def __post_init__(self):
    for field in dataclasses.fields(self):
      if not getattr(self, field.name) > 0:
        raise ValueError(
          f"{field.name}={getattr(self, field.name)} must be positive"
        )


class CallChecker:
  """Reads the arguments of calls as the schemas of some tools demand."""

  def __init__(
    self, schemas: Sequence[Schema], limits: ToolLimits = ToolLimits()
  ):
    """Checks the schemas.

    Raises:
      ValueError: a name is malformed or there twice, or a schema is not one.
    """
    self.limits = limits
    self._schemas = {schema.name: schema for schema in schemas}
    if len(self._schemas) < len(schemas):
      names = sorted(schema.name for schema in schemas)
      raise ValueError(f"tools of equal name: {names}")
    self._validators = {
      schema.name: _validator(schema.name, schema.parameters)
      for schema in schemas
    }

  def descriptions(self) -> list[dict[str, Any]]:
    """Returns the tools as a system message of the chat format has them."""
    return [
      {
        "type": "function",
        "function": {
          "name": schema.name,
          "description": schema.description,
          "parameters": dict(schema.parameters),
        },
      }
      for schema in self._schemas.values()
    ]

  def arguments(self, name: str, text: str) -> dict[str, Any]:
    """Reads the arguments of a call.

    Args:
      name: of the tool.
      text: JSON text, as the model wrote it.

    Raises:
      ToolError: the tool does not exist, or the arguments do not fit it.
    """
    self._check_name(name)
    if len(text) > self.limits.argument_chars:
      raise ToolError(
        f"the arguments have {len(text)} characters, more than"
        f" {self.limits.argument_chars}"
      )
    arguments = strict_json(text)
    self.check(name, arguments)
    return arguments

  def check(self, name: str, arguments: Any) -> None:
    """Checks the arguments of a call that came as values, not as text.

    Raises:
      ToolError: the tool does not exist, or the arguments do not fit it.
    """
    self._check_name(name)
    try:
      error = next(self._validators[name].iter_errors(arguments), None)
    except RecursionError:
      raise ToolError("the arguments are nested too deeply") from None
    # Of numbers that a comparison of the schema turns into floats.
    except ArithmeticError:
      raise ToolError("the arguments hold a number out of range") from None
    if error is not None:
      where = error.json_path
      raise ToolError(f"arguments: {_short(where)}: {_short(error.message)}")

  def _check_name(self, name):
    if name not in self._validators:
      known = ", ".join(self._schemas) or "none"
      raise ToolError(f"no tool {_short(repr(name))}; tools: {_short(known)}")


class ToolBox(CallChecker):
  """Tools that are run here."""

  def __init__(self, tools: Sequence[Tool], limits: ToolLimits = ToolLimits()):
    """Checks the tools; raises ValueError as CallChecker does."""
    super().__init__(tools, limits)
    self._functions = {tool.name: tool.function for tool in tools}

  async def run(self, name: str, text: str) -> str:
    """Carries out a call and returns the observation.

    Args:
      name: of the tool.
      text: its arguments, as the model wrote them.
    """
    try:
      arguments = self.arguments(name, text)
      result = self._functions[name](**arguments)
      if inspect.isawaitable(result):
        result = await self._within_time(result)
    except ToolError as error:
      return observation_of_error(error)
    if not isinstance(result, str):
      result = json.dumps(result, ensure_ascii=False)
    return clip(result, self.limits.result_chars)

  async def _within_time(self, result: Awaitable[Any]) -> Any:
    timeout = asyncio.timeout(self.limits.seconds)
    try:
      async with timeout:
        return await result
    except TimeoutError:
      if not timeout.expired():  # the function's own
        raise
      raise ToolError(f"no result in {self.limits.seconds:g} s") from None


def observation_of_error(error: ToolError) -> str:
  """Returns the observation that tells a model what it did wrong."""
  return clip(f"error: {error}", ToolLimits().result_chars)


def clip(text: str, most: int) -> str:
  """Makes an observation of any text: valid Unicode, no longer than bearable.

  Args:
    text: what a tool gave; characters without a UTF-8 form become "?".
    most: characters that stay, half from each end.
  """
  text = text.encode("utf-8", "replace").decode("utf-8")
  if len(text) <= most:
    return text
  head, tail = most - most // 2, most // 2
  left_out = len(text) - most
  end = text[len(text) - tail :]
  return f"{text[:head]}\n... {left_out} characters left out ...\n{end}"


def strict_json(text: str) -> Any:
  """Reads JSON as its standard has it.

  Python's reader takes NaN, the last of equal keys and numbers beyond any
  float. Here each is an error, as are nesting and integers too deep or long.

  Raises:
    ToolError: saying what is wrong.
  """
  try:
    return json.loads(
      text,
      object_pairs_hook=_without_repeats,
      parse_constant=_refuse_constant,
      parse_float=_finite,
    )
  except RecursionError:
    raise ToolError("the arguments are nested too deeply") from None
  except ValueError as error:
    raise ToolError(
      f"the arguments are not JSON: {_short(str(error))}"
    ) from error


def _validator(name: str, parameters: Mapping[str, Any]):
  """The validator of a tool; those of equal tools are made once."""
  try:
    text = json.dumps([name, parameters])
  except (TypeError, ValueError, RecursionError):
    return _made_validator(name, parameters)
  return _known_validator(text)


@functools.lru_cache(maxsize=4096)
def _known_validator(text: str):
  return _made_validator(*json.loads(text))


def _made_validator(name: str, parameters: Mapping[str, Any]):
  if not isinstance(name, str) or not _NAME.fullmatch(name):
    raise ValueError(f"tool {name=} is not of the form {_NAME.pattern}")
  if not isinstance(parameters, Mapping) or parameters.get("type") != "object":
    raise ValueError(f"tool {name!r}: parameters are no schema of an object")
  for reference in references(parameters):
    if not reference.startswith("#"):
      raise ValueError(f"tool {name!r}: {reference=} leads outside the schema")
  schema = dict(parameters)
  try:
    _Validator.check_schema(schema)
    registry = referencing.Registry()
    validator = _Validator(schema, registry=registry)
    # An unresolved reference shows only when it is followed.
    resolver = registry.resolver_with_root(
      referencing.Resource.from_contents(schema, DRAFT)
    )
    for reference in references(schema):
      resolver.lookup(reference)
  except jsonschema.SchemaError as error:
    raise ValueError(f"tool {name!r}: {error.message}") from error
  except (RecursionError, referencing.exceptions.Unresolvable) as error:
    raise ValueError(f"tool {name!r}: {error}") from error
  return validator


def references(schema: Any) -> Iterable[str]:
  """Yields what `$ref` and `$dynamicRef` anywhere in a schema refer to."""
  waiting = [schema]
  while waiting:
    value = waiting.pop()
    if isinstance(value, Mapping):
      for key in ("$ref", "$dynamicRef"):
        if isinstance(value.get(key), str):
          yield value[key]
      waiting += value.values()
    elif isinstance(value, list | tuple):
      waiting += value


def _unique_items(validator, unique, instance, schema):
  """`uniqueItems` in linear time; the library's is quadratic."""
  del schema
  if unique and validator.is_type(instance, "array"):
    seen = {json.dumps(_canonical(x), sort_keys=True) for x in instance}
    if len(seen) < len(instance):
      yield jsonschema.ValidationError("the items are not all different")


def _canonical(value: Any) -> Any:
  """1.0 is 1 in a schema."""
  if isinstance(value, float) and value.is_integer():
    return int(value)
  if isinstance(value, list):
    return [_canonical(item) for item in value]
  if isinstance(value, dict):
    return {key: _canonical(item) for key, item in value.items()}
  return value


def _is_integer(checker, value):
  """A schema takes 1.0 for an integer; functions that count with it do not."""
  del checker
  return isinstance(value, int) and not isinstance(value, bool)


DRAFT = referencing.jsonschema.DRAFT202012
_Validator = validators.extend(
  jsonschema.Draft202012Validator,
  {"uniqueItems": _unique_items},
  type_checker=jsonschema.Draft202012Validator.TYPE_CHECKER.redefine(
    "integer", _is_integer
  ),
)


def _without_repeats(pairs):
  found = {}
  for key, value in pairs:
    if key in found:
      raise ToolError(f"the arguments hold the key {_short(repr(key))} twice")
    found[key] = value
  return found


def _refuse_constant(text: str) -> NoReturn:
  raise ToolError(f"the arguments hold {text}, which is no number")


def _finite(text: str) -> float:
  number = float(text)
  if not math.isfinite(number):
    raise ToolError("the arguments hold a number beyond all floats")
  return number


def _short(text: str) -> str:
  text = " ".join(text.split())
  if len(text) <= _SHOWN_CHARS:
    return text
  return text[:_SHOWN_CHARS] + "..."
