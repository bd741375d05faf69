"""Learning-rate sweeps over depth, and what they say."""
