"""Memory of a rank, on its device and on the host: reserved, allocated, measured, explained."""
