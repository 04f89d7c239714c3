"""ClientApps and mods that match the strategies."""
