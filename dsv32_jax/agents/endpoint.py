"""A model behind any OpenAI-compatible API."""

from collections.abc import Mapping
from typing import Any

from dsv32_jax.agents import chat
from dsv32_jax.agents import conversation as conversations
from dsv32_jax.agents import policy

# Servers differ in what they call it.
_REASONING = ("reasoning_content", "reasoning")


class EndpointPolicy:
  """Asks `/chat/completions`; see `policy.Policy`.

  The server renders, samples and parses, so there are no tokens to train on.
  Thinking goes back to the server with the messages: it decides by the rule of
  its own format what of it the model sees.
  """

  def __init__(
    self, client, model: str, options: Mapping[str, Any] | None = None
  ):
    """Takes a client, which holds address, key, retries and timeouts.

    Args:
      client: `openai.AsyncOpenAI` or the like.
      model: its name on the server.
      options: further arguments of each request, such as temperature, top_p
        or extra_body={"chat_template_kwargs": {"thinking": True}}.
    """
    self.tokenizer = None
    self._client, self._model = client, model
    self._options = dict(options or {})

  async def complete(
    self, conversation: conversations.Conversation, *, max_tokens: int
  ) -> policy.Completion:
    """See Policy; what the client raises is raised."""
    messages, tools = to_api(conversation.messages)
    options = {**self._options, **({"tools": tools} if tools else {})}
    response = await self._client.chat.completions.create(
      model=self._model, messages=messages, max_tokens=max_tokens, **options
    )
    if not response.choices:
      raise RuntimeError(f"{self._model}: the server gave no choice")
    choice = response.choices[0]
    usage = response.usage
    return policy.Completion(
      finish_reason="length" if choice.finish_reason == "length" else "stop",
      message=from_api(choice.message),
      num_prompt_tokens=usage.prompt_tokens if usage else 0,
      num_written_tokens=usage.completion_tokens if usage else 0,
    )


def to_api(
  messages: list[dict[str, Any]],
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
  """Returns messages as the API wants them, and the tools they declare.

  Calls and results get ids by their place. A reply that was not of the format
  and what answered it go as plain messages.
  """
  found, tools, waiting = [], [], []
  for index, message in enumerate(messages):
    sent = {"role": message["role"], "content": message.get("content") or ""}
    if message["role"] == "assistant":
      waiting = []
      if message.get("reasoning_content"):
        sent["reasoning_content"] = message["reasoning_content"]
      if message.get("tool_calls"):
        waiting = [
          f"call_{index}_{place}" for place in range(len(message["tool_calls"]))
        ]
        sent["tool_calls"] = [
          {
            "id": call_id,
            "type": "function",
            "function": {"name": name, "arguments": arguments},
          }
          for call_id, (name, arguments) in zip(
            waiting, chat.tool_calls(message)
          )
        ]
    elif message["role"] == "tool":
      if waiting:
        sent["tool_call_id"] = waiting.pop(0)
      else:
        sent["role"] = "user"
    tools += message.get("tools") or []
    found.append(sent)
  return found, tools


def from_api(message) -> dict[str, Any]:
  """Returns the message of a response without what only the API needs."""
  reasoning = (getattr(message, name, None) for name in _REASONING)
  return {
    "role": "assistant",
    "content": message.content or "",
    "reasoning_content": next((text for text in reasoning if text), ""),
    "tool_calls": [
      {
        "type": "function",
        "function": {
          "name": call.function.name,
          "arguments": call.function.arguments,
        },
      }
      for call in message.tool_calls or []
    ],
  }
