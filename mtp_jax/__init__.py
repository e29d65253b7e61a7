"""Multi-token prediction in JAX. Importing the package does no work."""
