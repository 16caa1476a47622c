"""The parts of a decoder layer that know nothing of adapters."""
