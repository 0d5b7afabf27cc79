"""AutoCRUD: msgspec Structs in, a versioned CRUD service out. It knows nothing of the rest of the app, nor of any cloud."""

from .core import AutoCRUD
from .query import Query, field
from .resource_manager.basic import Encoding, IndexedField
from .resource_manager.engine.operations import Retention

__all__ = ["AutoCRUD", "Encoding", "IndexedField", "Query", "Retention", "field"]
