"""Cutting a model in two, pruning its client half, and codecs for the cut."""
