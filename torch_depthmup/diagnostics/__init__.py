"""Instruments: what a network's features do, beside what the theory predicts."""
