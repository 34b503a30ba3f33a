"""A device and the platform: a socket for each of its processes, what is said over it, and what is left without."""
