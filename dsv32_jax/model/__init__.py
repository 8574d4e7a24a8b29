"""The model: configuration, layers, attention, experts, cache."""
