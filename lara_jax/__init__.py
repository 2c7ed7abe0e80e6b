"""LaRA-VLA in JAX: latent-reasoning vision-language-action policies at TPU scale."""

__version__ = "0.1.0"
