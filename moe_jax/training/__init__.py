"""Training: loss, optimizer, step, and the loop around them."""
