"""Photos: a model with files. `docs/files.md` explains its API, and `photos.html` is a page that uses it.

export CRUDSTACK_STORAGE=disk CRUDSTACK_DATA_DIR=./data
.venv/bin/python -m examples.photos serve                                            # in one terminal
.venv/bin/python -m http.server 8001 --bind 127.0.0.1 --directory examples           # in another
Then open http://127.0.0.1:8001/photos.html.
"""

from __future__ import annotations

from msgspec import Struct

from app import cli, models
from app.autocrud import AutoCRUD, Blob


class Video(Struct):
    """A video with a caption."""

    file: Blob
    caption: str = ""


class Photo(Struct):
    """A photo, with other files that belong to it."""

    title: str
    image: Blob | None = None
    attachments: list[Blob] = []
    video: Video | None = None


def register(crud: AutoCRUD) -> None:
    """Add the model, as `app/models.py` does with its models."""
    crud.add_model(Photo, indexed_fields=["title"])


def main() -> None:
    """Run the command `crudstack` with this model instead of those in `app/models.py`."""
    models.register = register
    cli.main()


if __name__ == "__main__":
    main()
