"""Motif domains: inputs made of known motifs, whose places and labels are known, too."""
