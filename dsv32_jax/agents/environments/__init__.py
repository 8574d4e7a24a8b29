"""Environments of every family behind one protocol."""
