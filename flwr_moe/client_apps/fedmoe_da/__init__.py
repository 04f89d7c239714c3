"""The client's side of FedMoE-DA."""
