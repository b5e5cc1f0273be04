"""How it is timed: loops, memory, the machine and its roofline, and the library under test."""
