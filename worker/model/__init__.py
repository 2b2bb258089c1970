"""Models: weights, tokenizer and transformers with paged attention registered."""
