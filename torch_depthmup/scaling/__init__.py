"""Traced branches -> plan -> scaled model."""
