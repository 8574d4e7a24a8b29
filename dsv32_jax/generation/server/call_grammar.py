"""A grammar of replies whose tool calls keep to the schemas of strict tools.

Content is free; where tool calls begin, each is one of the tools' and has the
form of the chat format. Of a strict tool the parameters are there in the order
of its schema, once each. A string stands as it is, where nothing but its type
or a list of values bounds it; all else is JSON, which `llguidance` holds to its
schema. (Nothing keeps the text of JSON from holding the end of a parameter: a
reply that does is told as one that failed.)
"""

from collections.abc import Iterator, Mapping, Sequence
import json
import re
from typing import Any, NamedTuple

from dsv32_jax.agents import chat_format
from dsv32_jax.agents import chat_parse
from dsv32_jax.agents import tools as tools_lib
from dsv32_jax.generation.server import schema_parts

# What a schema may say besides what it demands.
_NOTES = frozenset(
  {"title", "description", "default", "examples", "$comment", "deprecated"}
)
_MOST_REFERENCES = 32
_DEFINITION = re.compile(r"#/(\$defs|definitions)/[^/]+")
_ANY = "(?s:.*)"
_DSML = str(chat_format.DSML)
# An end that is none would end the parameter all the same; the parser says so.
_TERMINALS = f"""
pre[lazy]: /{_ANY}@start@/
PLAIN: ~/{_ANY}@start@{_ANY}/
raw[lazy]: RAW
RAW: /{_ANY}<@end@>/ & ~/({_ANY}[^<])?@end@{_ANY}/ & ~/{_ANY}@end@[^>]{_ANY}/
KEY: /[^"<\\x00-\\x1f]+/
""".replace("@start@", chat_parse.CALLS_START.replace("\n", r"\n")).replace(
  "@end@", chat_parse.PARAMETER_END.replace("/", r"\/")
)


class CallRules(NamedTuple):
  """Which calls a reply may have.

  Attributes:
    tools: that may be called; calls of strict ones keep to their schemas.
    forced: whether one has to be called, and nothing be said before.
    most_calls: 1, or None: any number.
  """

  tools: Sequence[schema_parts.ToolFunction]
  forced: bool = False
  most_calls: int | None = None


def lark(rules: CallRules, options: Mapping[str, Any]) -> str:
  """Returns the grammar of a reply, without thinking.

  Args:
    rules: that its calls keep to.
    options: `x-guidance` of JSON.

  Raises:
    ValueError: a strict tool's parameters are not as strict ones have to be.
  """
  tools, forced, most_calls = rules
  begin = _text(chat_parse.CALLS_START) if forced else "pre"
  # Every part takes the line end before it along: the longest text that could
  # be a literal is taken for it.
  lines = [
    f"start: {'' if forced else 'PLAIN | '}{begin} calls",
    f"calls: {_text('>')} call{'' if most_calls == 1 else '+'} {_CALLS_CLOSE}",
    "call: " + " | ".join(f"call{n}" for n in range(len(tools))),
    f"free: {_key(None, True)} raw | {_key(None, False)} any {_CLOSE}",
    f"any: %json {_json({'x-guidance': options})}",
  ]
  for number, tool in enumerate(tools):
    opening = _text(f'\n{chat_parse.INVOKE_START} name="{tool.name}">')
    inner = f"({_EMPTY} | free+ {_CALL_CLOSE})"
    if tool.strict:
      names = [f"call{number}_{n}" for n in range(len(_properties(tool)))]
      inner = " ".join([*names, _CALL_CLOSE]) if names else _EMPTY
      lines += _parameters(tool, names, options)
    lines.append(f"call{number}: {opening} {inner}")
  return "\n".join(lines) + _TERMINALS


def _properties(tool: schema_parts.ToolFunction) -> Mapping[str, Any]:
  """Returns the schemas of a strict tool's parameters by their names.

  Raises:
    ValueError: they are not what the API demands of strict ones.
  """
  schema = tool.parameters or {"type": "object", "additionalProperties": False}
  where = f"tools: strict function {tool.name!r}"
  properties = schema.get("properties", {})
  known = _NOTES | {
    *("type", "properties", "required", "additionalProperties"),
    *("$defs", "definitions", "$schema"),
  }
  if schema.get("type") != "object" or not isinstance(properties, dict):
    raise ValueError(f"{where}: parameters have to be of type object")
  if schema.get("additionalProperties") is not False:
    raise ValueError(f"{where}: additionalProperties has to be false")
  if sorted(schema.get("required", [])) != sorted(properties):
    raise ValueError(f"{where}: required has to name every one of properties")
  for name in schema.keys() - known:
    raise ValueError(f"{where}: {name!r} is not supported beside properties")
  if _DSML in _json(schema):
    raise ValueError(f"{where}: parameters hold {_DSML!r}, a mark of calls")
  # A parameter's schema becomes a root of its own, with the same definitions.
  for reference in tools_lib.references(schema):
    if not _DEFINITION.fullmatch(reference):
      raise ValueError(f"{where}: {reference=} is no definition of it")
  for name in properties:
    if not name or '"' in name or not name.isprintable():
      raise ValueError(f"{where}: {name!r} cannot name a parameter")
  return properties


def json_schemas(tool: schema_parts.ToolFunction) -> Iterator[dict[str, Any]]:
  """Yields the schemas of what a strict tool takes as JSON.

  Raises:
    ValueError: as `lark` does.
  """
  for one in _properties(tool).values():
    for part in _parts(one, tool.parameters or {}):
      if _strings(part) is None:
        yield _as_root(part, tool)


def _parameters(tool, names, options) -> list[str]:
  """Rules of a strict tool's parameters, by the names of the rules."""
  rules = []
  for name, (key, one) in zip(names, _properties(tool).items()):
    forms = []
    for number, part in enumerate(_parts(one, tool.parameters or {})):
      values = _strings(part)
      if values is None:
        rule = f"{name}_{number}"
        whole = _json(_as_root(part, tool) | {"x-guidance": options})
        rules.append(f"{rule}: %json {whole}")
        forms.append(f"{_key(key, False)} {rule} {_CLOSE}")
      elif values:
        told = " | ".join(map(_text, values))
        forms.append(f"{_key(key, True)} ({told}) {_CLOSE}")
      else:
        forms.append(f"{_key(key, True)} raw")
    rules.append(f"{name}: {' | '.join(forms)}")
  return rules


def _as_root(part: Mapping[str, Any], tool) -> dict[str, Any]:
  """A part of a tool's parameters with the definitions that it refers to."""
  schema = tool.parameters or {}
  shared = {x: schema[x] for x in ("$defs", "definitions") if x in schema}
  return {**part, **shared}


def _parts(schema: Any, root: Mapping[str, Any]) -> list[dict[str, Any]]:
  """Takes apart what may be of several types, so that strings stand alone."""
  schema = _resolved(schema, root)
  branches = [schema]
  if schema.keys() - _NOTES == {"anyOf"}:
    branches = [_resolved(one, root) for one in schema["anyOf"]]
  parts = []
  for one in branches:
    types = one.get("type")
    is_list = isinstance(types, list) and one.keys() - _NOTES == {"type"}
    parts += [{"type": name} for name in types] if is_list else [one]
  return parts


def _resolved(schema: Any, root: Mapping[str, Any]) -> dict[str, Any]:
  """Follows a schema that only refers to a definition."""
  for _ in range(_MOST_REFERENCES):
    if not isinstance(schema, dict) or schema.keys() - _NOTES != {"$ref"}:
      break
    _, place, name = schema["$ref"].split("/", 2)
    if name not in root.get(place, {}):
      break
    schema = root[place][name]
  if isinstance(schema, bool):
    return {} if schema else {"not": {}}
  return schema


def _strings(part: Mapping[str, Any]) -> list[str] | None:
  """Values of a string that stands as it is, none for any; None: not such."""
  demands = part.keys() - _NOTES
  if demands == {"type"} and part["type"] == "string":
    return []
  if part.get("type", "string") != "string":
    return None
  values = None
  if demands - {"type"} == {"enum"}:
    values = part["enum"]
  elif demands - {"type"} == {"const"}:
    values = [part["const"]]
  if not isinstance(values, list) or not values:
    return None
  return values if all(map(_is_plain, values)) else None


def _is_plain(value: Any) -> bool:
  """Whether a value can stand as it is, and be a literal of the grammar."""
  return isinstance(value, str) and all(
    letter.isprintable() or letter in "\n\t" for letter in value
  )


def _key(name: str | None, is_string: bool) -> str:
  """What opens a parameter; without a name, of any."""
  opening = f'\n{chat_parse.PARAMETER_START} name="'
  kind = f'" string="{"true" if is_string else "false"}">'
  if name is None:
    return f"{_text(opening)} KEY {_text(kind)}"
  return _text(f"{opening}{name}{kind}")


def _text(text: str) -> str:
  """A literal."""
  return _json(text)


def _json(value: Any) -> str:
  return json.dumps(value, ensure_ascii=False)


_CLOSE = _text(f"<{chat_parse.PARAMETER_END}>")
_CALL_CLOSE = _text(f"\n{chat_parse.INVOKE_END}>")
# An empty line stands where a call has no parameter.
_EMPTY = _text(f"\n\n{chat_parse.INVOKE_END}>")
_CALLS_CLOSE = _text(f"\n{chat_parse.CALLS_END}")
