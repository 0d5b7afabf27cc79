"""Drivers of the systems that data is stored in: SQLite, S3, PostgreSQL, Redis and RabbitMQ."""
