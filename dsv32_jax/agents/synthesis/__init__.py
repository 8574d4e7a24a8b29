"""Synthesis of agentic tasks: environments, tools, tasks and verifiers."""
