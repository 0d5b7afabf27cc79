"""BlobStores, which keep the content of files by key. The contract is `BlobStore` in `basic`.

simple  in memory, and as files of one directory
s3      one object per blob on S3
keys    keys and errors of all of them
spool   the temporary file that receives an upload
"""
