"""The library under test, and which of its sources a row was measured with."""
