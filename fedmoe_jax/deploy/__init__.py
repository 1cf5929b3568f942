"""Real clients: the round of the simulation with messages in place of its local training, and Flower to carry them."""
