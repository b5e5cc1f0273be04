"""The sections of a report: each function adds its own to a document."""
