"""How fast operations are on this machine, beside torch and other libraries."""
