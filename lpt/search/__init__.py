"""`lpt fit`: candidates in order of cost, compared on held-out training images under a budget of time."""
