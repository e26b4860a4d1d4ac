"""How fast images come and predictions go."""
