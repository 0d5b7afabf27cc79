"""S3 object storage: clients, credentials and errors."""
