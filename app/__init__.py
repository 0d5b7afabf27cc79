"""What runs, here and in the cloud: your models, the settings, and the engine (`autocrud`) between them."""
