"""Training, evaluation and prediction behind mmengine's Config and Runner."""
