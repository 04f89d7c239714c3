"""A small Flower project that plugs EMS-FL in."""
