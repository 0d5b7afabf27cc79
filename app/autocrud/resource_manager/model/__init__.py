"""A model and its stored form.

blob             a field type that refers to a file
blob_references  finds the references to blobs in data
codec            decodes, validates, encodes and indexes the data of a model
fields           the paths to indexed fields
json_shape       the size and depth of a JSON text, before it is decoded
resource         the result of most methods of a ResourceManager
unknown_fields   fields of a body that the model does not have
verification     compares stored bodies with their hash, and remembers damaged resources
"""
