"""The Lambda handlers of `create_db_user`, under the names that deployed stacks call."""

from .create_db_user import inside, outside

__all__ = ["inside", "outside"]
