"""Networks without a gradient: the weights of a teacher's forward, the Gram network."""
