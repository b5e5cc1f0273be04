"""What is timed: a file for each kind of operation; those of users are the package's own."""
