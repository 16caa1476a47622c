"""Text generation: prompts, the cache of keys and values, sampling and detokenization."""
