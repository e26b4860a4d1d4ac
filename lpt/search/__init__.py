"""`lpt fit`: candidates from cheap to dear, compared on held-out training images under a budget of time."""
