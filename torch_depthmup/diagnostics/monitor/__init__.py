"""Watches features while a network trains."""
