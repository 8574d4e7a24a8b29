"""Text from a model: prefill, decode through the cache, sampling."""
