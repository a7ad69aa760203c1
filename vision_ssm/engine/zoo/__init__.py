"""Published checkpoints, and the tables of models that are rendered from their cards."""
