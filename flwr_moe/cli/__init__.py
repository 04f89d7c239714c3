"""The ``flwr-moe`` command, one file a command."""
