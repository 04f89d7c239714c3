"""Tensors between nodes outside Flower messages: store, server and client."""
