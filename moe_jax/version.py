"""The version of this package, where everything may import it."""

__version__ = "0.2.0"
