"""The HTTP API: routes, conditional requests, problem details and OpenAPI.

messages       a request and a response, as thin wrappers of ASGI
problems       errors as problem details (RFC 9457)
guard          authentication of requests
conditions     ETags, If-Match and If-None-Match (RFC 9110)
options        ids, the Idempotency-Key, and options in the query string
header_values  parameters, file names and digests in header fields
multipart      a body of multipart/form-data with one file
ranges         ranges of a response
streaming      a response that is sent in pieces
transfers      limits on concurrent uploads and downloads
searching      query strings as queries, and cursors
patching       patches of a request: JSON Merge Patch (RFC 7396) and JSON Patch (RFC 6902)
json_patch     applies a JSON Patch, with bounds on its cost
json_diff      computes a JSON Patch from two documents
batches        the operations of POST /{model}/batch
answers        responses with resources, and pages that fit into a response
model_context  the parts that all routes of a model share: policy, access control, the target of a write
collection     the routes of a model's collection
resource       the routes of one resource
blobs          the routes of files
history        the routes of revisions and differences
routes         finds the route of a request to a model
service        /healthz and /readyz; adds all routes to an application or a router
openapi        the OpenAPI document
openapi_blobs  the part of the OpenAPI document for files
openapi_parts  the parts of the OpenAPI document that all models share
value_schemas  JSON Schemas of single values
docs           a docs page with local assets
"""
