"""From adapters in memory to files other programs read, checked after writing."""
