"""Split learning: SplitFed and Lightweight FedSL."""
