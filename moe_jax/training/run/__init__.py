"""A training run: loop, session (its events), start_up, inputs, measurement, completion."""
