"""Edge overlays: refresh controller and ensemble."""
