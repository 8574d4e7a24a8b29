"""What a chat request demands of the tokens of its reply."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from dsv32_jax.data import tokenizer as tokenizers
from dsv32_jax.generation import requests
from dsv32_jax.generation.server import call_grammar
from dsv32_jax.generation.server import forced_calls
from dsv32_jax.generation.server import schemas

Maker = Callable[[], requests.Constraint | None]


class Grammars(Protocol):
  """What keeps replies to schemas; `json_grammar.JsonGrammars` is one."""

  def constraints(
    self, schema: Any, *, thinking: bool
  ) -> Callable[[], requests.Constraint]:
    """Returns a function that makes a constraint for each answer."""

  def calls(
    self, rules: call_grammar.CallRules, *, thinking: bool
  ) -> Callable[[], requests.Constraint]:
    """The same for a reply whose calls keep to strict tools."""


def maker(
  request: schemas.ChatRequest,
  tokenizer: tokenizers.Tokenizer,
  grammars: Grammars | None,
  *,
  thinking: bool,
) -> Maker:
  """Returns what makes a choice's constraint.

  Args:
    request: what is asked.
    tokenizer: of the model.
    grammars: keep to strict schemas; None: those are refused.
    thinking: whether the reply begins with thinking.

  Raises:
    ValueError: the request cannot be honoured.
  """
  names, schema = request.forced_names, request.strict_schema
  if schema is None:
    if request.has_strict_tools:
      return _strict_calls(request, grammars, names, thinking)
    if not names:
      return lambda: None
    forced = forced_calls.ForcedCalls(tokenizer, names, thinking=thinking)
    return lambda: forced
  if request.active_tools:
    raise ValueError("response_format: what is strict goes with no tools")
  if request.ignore_eos:
    raise ValueError("ignore_eos=true: what is strict ends with its JSON text")
  if grammars is None:
    raise ValueError(
      "response_format: this server holds no reply to a schema; it would with"
      " --strict_schemas"
    )
  return grammars.constraints(schema, thinking=thinking)


def _strict_calls(request, grammars, names: Sequence[str], thinking) -> Maker:
  if request.ignore_eos:
    raise ValueError("ignore_eos=true: a reply with strict tools has an end")
  if grammars is None:
    raise ValueError(
      "tools: this server holds no call to a strict schema; it would with"
      " --strict_schemas"
    )
  functions = [tool.function for tool in request.active_tools]
  rules = call_grammar.CallRules(
    [one for one in functions if not names or one.name in names],
    forced=bool(names),
    most_calls=request.most_calls,
  )
  return grammars.calls(rules, thinking=thinking)
