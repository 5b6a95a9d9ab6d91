"""The serving side: what runs in the process that serves a model."""
