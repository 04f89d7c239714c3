"""The ready-made Flower app: configuration, ServerApp and ClientApp."""
