"""flwr-moe: mixture-of-experts, split and overlay federated learning on Flower."""

__version__ = "0.1.0"
