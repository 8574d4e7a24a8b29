"""Agents: chat encoding, conversations as tokens, tools, episodes, context."""
