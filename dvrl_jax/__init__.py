"""Deep Variational Reinforcement Learning in JAX."""
