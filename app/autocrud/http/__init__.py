"""The HTTP API: routes, conditional requests, problem details, OpenAPI. Rooms:

messages    a request and a response, as thin as ASGI allows
problems    errors as problem details (RFC 9457)
conditions  ETags, If-Match, If-None-Match (RFC 9110)
searching   a query string as a Query, cursors
patching    JSON Merge Patch (RFC 7396) and JSON Patch (RFC 6902)
batches     the operations of POST /{model}/batch
routes      what each path and method of a model does
service     healthz, readyz, and putting it all onto an app or a router
openapi     the description of all that
docs        a local page that shows it
"""
