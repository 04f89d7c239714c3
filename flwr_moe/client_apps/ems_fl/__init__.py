"""The device's side of EMS-FL."""
