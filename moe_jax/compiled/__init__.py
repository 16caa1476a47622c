"""Chips, programs compiled for chips that are not present, and estimates of their time."""
