"""Re-exports `app.autocrud.testing.model` under its former name."""

from app.autocrud.testing.model import *  # noqa: F403
