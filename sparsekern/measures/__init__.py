"""What is measured on trained models: activity of units, disentanglement, errors of motifs."""
