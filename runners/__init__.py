"""Effects: models, processes, files, tracking."""
