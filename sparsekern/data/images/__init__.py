"""Image sets with known factors: dSprites and Shapes3D, rendered here or read from files."""
