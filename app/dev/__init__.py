"""Tools for developers: an S3 server on this machine, the `pulumi` command, and the AWS account of a stack."""
