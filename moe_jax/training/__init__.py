"""Training: loss, optimiser, step, and the loop around them."""
