"""What a person needs at hand: an S3 server for this machine, the `pulumi` command and the AWS account of a stack."""
