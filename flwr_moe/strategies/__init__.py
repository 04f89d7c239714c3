"""Flower strategies, one algorithm a file."""
