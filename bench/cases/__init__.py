"""What is timed: a file for each kind of operation, and the peers it is compared with."""
