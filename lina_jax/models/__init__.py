"""The networks: Flax NNX modules, no training state, no I/O.

In shapes: B images, R repeats of the head, N tokens (of the image, or all that a layer reads), K selected ones, L text
tokens; D width, H heads, d and e channels of a head; C latent channels, p side of a patch.
"""
