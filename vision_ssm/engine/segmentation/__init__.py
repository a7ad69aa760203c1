"""Label maps: predicted, measured, drawn, and bundled with their network."""
