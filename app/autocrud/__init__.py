"""The engine: AutoCRUD makes a versioned CRUD API of msgspec Structs.

The engine imports nothing from the rest of the app, and works without a cloud. These are its public names; each of
them has a docstring. The names for authors of stores are in `resource_manager.basic`, all errors in `errors`.

core              AutoCRUD: models, their stores and the HTTP API
query             filters, sorting and pages, with one meaning for all stores
values            keys: the form of indexed values that all stores compare in the same way
access            principals and permissions
errors            the errors of the engine
secret            passwords, and addresses that hold passwords
http              the HTTP API
resource_manager  resources, revisions and stores
testing           the conformance suite for stores
"""

from .access import Permissions, Principal, Unauthenticated, anyone, own, role
from .core import AutoCRUD
from .errors import ConfigError, CrudError
from .query import Filter, Query, field
from .resource_manager.basic import Encoding, IndexedField
from .resource_manager.core import Resource, ResourceManager
from .resource_manager.engine.operations import Retention
from .resource_manager.model.blob import Blob

__all__ = [
    "AutoCRUD",
    "Blob",
    "ConfigError",
    "CrudError",
    "Encoding",
    "Filter",
    "IndexedField",
    "Permissions",
    "Principal",
    "Query",
    "Resource",
    "ResourceManager",
    "Retention",
    "Unauthenticated",
    "anyone",
    "field",
    "own",
    "role",
]
