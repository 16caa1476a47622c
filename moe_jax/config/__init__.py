"""Configuration: frozen dataclasses and the strict parser that builds them."""
