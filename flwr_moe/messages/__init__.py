"""What travels between server and nodes: one file a method, a dataclass for each record."""
