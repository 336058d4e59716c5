"""Many devices and processes: the layout of arrays, and how a group starts and ends."""
