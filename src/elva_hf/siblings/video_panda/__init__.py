"""Video-Panda: a spatio-temporal alignment block of 45M parameters in front of a text decoder."""
