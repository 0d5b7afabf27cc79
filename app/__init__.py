"""The application, on your machine and in the cloud: your models, the settings, and the engine (`autocrud`)."""
