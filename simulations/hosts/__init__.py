"""The system in the world: the real cores and actors, each on a host, in a shell of a few lines."""
