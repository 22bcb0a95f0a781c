"""Networks without a gradient: the weights of a teacher's forward, Gram network and anchor."""
