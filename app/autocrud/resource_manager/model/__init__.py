"""A model and its stored form: the codec, the shape of JSON texts, and the verification of bodies."""
