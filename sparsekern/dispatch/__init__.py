"""All that knows torch's dispatcher, the compiled modules and the choice of a backend."""
