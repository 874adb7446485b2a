"""lina_jax: train and sample LINA (arXiv 2601.22630) on TPU pods, GPU clusters and laptops."""

__version__ = "0.1.0"
