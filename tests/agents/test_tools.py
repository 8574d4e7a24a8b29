"""Calls as models write them, right and wrong in every way."""

import asyncio
import json
import time

import jsonschema
import pytest

from dsv32_jax.agents import tools

PARAMETERS = {
  "type": "object",
  "properties": {
    "city": {"type": "string"},
    "days": {"type": "integer", "minimum": 1},
    "tags": {"type": "array", "uniqueItems": True},
    "share": {"type": "number", "multipleOf": 0.5},
    "tree": {"$ref": "#/$defs/tree"},
  },
  "required": ["city"],
  "additionalProperties": False,
  "$defs": {
    "tree": {
      "type": "object",
      "additionalProperties": {"$ref": "#/$defs/tree"},
    }
  },
}


def tool(function, parameters=PARAMETERS, name="weather"):
  return tools.Tool(
    name=name, description="d", parameters=parameters, function=function
  )


def run(function, text, name="weather", **limits):
  box = tools.ToolBox([tool(function)], tools.ToolLimits(**limits))
  return asyncio.run(box.run(name, text))


def never(**arguments):
  raise AssertionError(f"called with {arguments}")


def test_a_call_reaches_the_function():
  def weather(city, days=1):
    return {"city": city, "days": days, "note": "\u00e9"}

  got = run(weather, '{"city": "Paris", "days": 2}')
  assert got == '{"city": "Paris", "days": 2, "note": "\u00e9"}'
  assert run(lambda city: city, '{"city": "plain text"}') == "plain text"


def test_a_coroutine_function():
  async def weather(city):
    await asyncio.sleep(0)
    return city

  assert run(weather, '{"city": "x"}') == "x"


WRONG = {
  "not JSON": ("{", "not JSON"),
  "empty": ("", "not JSON"),
  "trailing": ('{"city": "x"} x', "not JSON"),
  "no object": ('["x"]', "is not of type 'object'"),
  "missing": ("{}", "'city' is a required property"),
  "unknown": ('{"city": "x", "town": 1}', "'town' was unexpected"),
  "type": ('{"city": 5}', "$.city: 5 is not of type 'string'"),
  "quoted": ('{"city": "x", "days": "3"}', "$.days: '3' is not of type"),
  "float": ('{"city": "x", "days": 2.0}', "2.0 is not of type 'integer'"),
  "bool": ('{"city": "x", "days": true}', "True is not of type 'integer'"),
  "range": ('{"city": "x", "days": 0}', "$.days: 0 is less than"),
  "NaN": ('{"city": "x", "days": NaN}', "NaN, which is no number"),
  "-Infinity": ('{"city": "x", "days": -Infinity}', "-Infinity, which"),
  "1e999": ('{"city": "x", "days": 1e999}', "beyond all floats"),
  "twice": ('{"city": "x", "city": "y"}', "the key 'city' twice"),
  "twice within": ('{"city": "x", "tree": {"a": {}, "a": {}}}', "'a' twice"),
  "deep list": ("[" * 50_000, "nested too deeply"),
  "deep": ('{"city":' * 10_000 + "1" + "}" * 10_000, "nested too deeply"),
  "deep by schema": (
    '{"city": "x", "tree": ' + '{"a":' * 400 + "{}" + "}" * 401,
    "nested too deeply",
  ),
  "out of range": (
    '{"city": "x", "share": 1' + "0" * 400 + "}",
    "a number out of range",
  ),
  "long integer": ('{"days": ' + "9" * 5000 + "}", "not JSON"),
  "a megabyte": (json.dumps({"city": "x" * 2**20}), "more than 100000"),
  "surrogates": ('{"city": "x", "\\ud800": 1}', "was unexpected"),
}


@pytest.mark.parametrize("text, what", WRONG.values(), ids=WRONG)
def test_wrong_arguments_are_an_observation(text, what):
  start = time.process_time()
  got = run(never, text)
  assert got.startswith("error: ") and what in got
  assert "\n" not in got and len(got) < 800
  got.encode("utf-8")
  assert time.process_time() - start < 2


def test_an_unknown_tool_is_an_observation():
  assert run(never, "{}", name="wether") == (
    "error: no tool 'wether'; tools: weather"
  )
  assert len(run(never, "{}", name="x" * 2**20)) < 800


def test_what_functions_raise():
  def refuse(city):
    raise tools.ToolError(f"no city {city}")

  def bug(city):
    raise KeyError(city)

  async def own_timeout(city):
    raise TimeoutError(city)

  assert run(refuse, '{"city": "x"}') == "error: no city x"
  with pytest.raises(KeyError):
    run(bug, '{"city": "x"}')
  with pytest.raises(TimeoutError, match="x"):
    run(own_timeout, '{"city": "x"}')


def test_a_slow_function_is_given_up():
  async def slow(city):
    await asyncio.sleep(60)

  got = run(slow, '{"city": "x"}', seconds=0.05)
  assert got == "error: no result in 0.05 s"


def test_long_and_broken_results():
  got = run(
    lambda city: "a" * 500 + "b" * 500, '{"city": "x"}', result_chars=10
  )
  assert got == "aaaaa\n... 990 characters left out ...\nbbbbb"
  assert run(lambda city: "\ud800!", '{"city": "x"}') == "?!"
  assert tools.clip("abc", 3) == "abc"
  assert tools.clip("abcd", 1) == "a\n... 3 characters left out ...\n"


def test_unique_items_take_linear_time():
  items = [[number] for number in range(10_000)] + [None]
  text = json.dumps({"city": "x", "tags": items})
  start = time.process_time()
  assert run(lambda city, tags: str(len(tags)), text) == "10001"
  assert "not all different" in run(
    never, json.dumps({"city": "x", "tags": [*items, [0.0]]})
  )
  assert time.process_time() - start < 2


@pytest.mark.parametrize(
  "items",
  [[1, 1.0], [1, True], [0, False], [{"a": 1}, {"a": 1.0}], ["1", 1], []],
)
def test_unique_items_are_those_of_the_library(items):
  schema = {"type": "object", "properties": {"tags": {"uniqueItems": True}}}
  checker = tools.CallChecker([tool(never, schema)])
  arguments = {"tags": items}
  if jsonschema.Draft202012Validator(schema).is_valid(arguments):
    assert checker.arguments("weather", json.dumps(arguments)) == arguments
  else:
    with pytest.raises(tools.ToolError, match="not all different"):
      checker.arguments("weather", json.dumps(arguments))


@pytest.mark.parametrize(
  "parameters, what",
  [
    ({"type": "string"}, "no schema of an object"),
    (None, "no schema of an object"),
    ({"type": "object", "required": "city"}, "is not of type 'array'"),
    (
      {"type": "object", "properties": {"a": {"$ref": "http://x/y"}}},
      "leads outside",
    ),
    ({"type": "object", "allOf": [{"$ref": "#/$defs/no"}]}, "does not exist"),
  ],
)
def test_bad_schemas_are_refused(parameters, what):
  with pytest.raises(ValueError, match=what):
    tools.CallChecker([tool(never, parameters)])


def test_bad_tools_are_refused():
  for name in ("", 'f"', "a b", "x" * 129):
    with pytest.raises(ValueError, match="is not of the form"):
      tools.CallChecker([tool(never, name=name)])
  with pytest.raises(ValueError, match="tools of equal name"):
    tools.CallChecker([tool(never), tool(never)])
  with pytest.raises(ValueError, match="seconds=0"):
    tools.ToolLimits(seconds=0)


def test_a_schema_that_never_ends_is_an_observation():
  endless = {"type": "object", "$ref": "#"}
  checker = tools.CallChecker([tool(never, endless)])
  with pytest.raises(tools.ToolError, match="nested too deeply"):
    checker.arguments("weather", "{}")


def test_descriptions_have_the_form_of_the_api():
  (got,) = tools.CallChecker([tool(never)]).descriptions()
  assert got == {
    "type": "function",
    "function": {
      "name": "weather",
      "description": "d",
      "parameters": PARAMETERS,
    },
  }


def test_a_schema_that_changed_is_read_anew():
  """Validators of equal schemas are shared, those of the same dict are not."""
  parameters = {"type": "object", "properties": {"n": {"type": "integer"}}}
  tool = tools.Tool(
    name="t", description="", parameters=parameters, function=lambda n: n
  )
  tools.CallChecker([tool]).check("t", {"n": 1})
  parameters["properties"]["n"]["type"] = "string"
  tools.CallChecker([tool]).check("t", {"n": "1"})
  with pytest.raises(tools.ToolError, match="not of type 'string'"):
    tools.CallChecker([tool]).check("t", {"n": 1})
