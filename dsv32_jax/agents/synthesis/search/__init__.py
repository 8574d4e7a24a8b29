"""Synthesis of search tasks: questions over a corpus, and helpful prompts."""
