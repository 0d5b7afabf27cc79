"""The Pulumi program: read the config, register what it asks for, export what the app has to know."""

import pulumi

from app.autocrud.errors import ConfigError
from infra.config import project_values, read
from infra.stack import build

try:
    for name, value in build(read(project_values())).items():
        pulumi.export(name, value)
except ConfigError as error:
    raise pulumi.RunError(error.detail) from None
