"""MetaStores: the truth about resources."""
