"""The networks: Flax NNX modules, no training state, no I/O."""
