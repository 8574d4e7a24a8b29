"""Environments for others, and others as environments; each needs an extra."""
