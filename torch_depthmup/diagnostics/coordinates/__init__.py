"""Coordinate checks: short runs over a grid, slopes against the rule's."""
