"""All that knows torch.library, the compiled modules and the choice of a backend."""
