"""Text in, batches out: tokenizer, sources, grain pipeline."""
