"""The workloads of each operation: made, checked, and done by other means."""
