"""The entry point of the Lambda function for backups, `app.backup.handler`. See `backup_function`."""

from __future__ import annotations

from . import settings
from .backup_function import BackupFunction

handler = BackupFunction(settings.load())
