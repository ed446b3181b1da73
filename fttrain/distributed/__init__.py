"""Ranks: rendezvous, process group, collectives, and the watch over ranks and nodes."""
