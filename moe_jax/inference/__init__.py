"""From prompts to text: a cache of keys and values, sampling, and the loop that joins them."""
