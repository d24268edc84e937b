"""ReLax: post-training of language models in JAX, as a functional trainer library."""

__version__ = "0.1.0"
