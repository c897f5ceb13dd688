"""What is installed and active, and whether a checkpoint contradicts itself. Reads headers, never weights."""
