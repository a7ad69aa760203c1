"""Video: the tasks on clips, what goes on with them, and how far it drifts."""
