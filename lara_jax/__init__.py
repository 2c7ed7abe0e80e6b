"""LaRA-VLA in JAX: latent-reasoning vision-language-action policies, trained and run at TPU scale."""

__version__ = "0.1.0"
