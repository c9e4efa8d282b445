"""Sources: text in files, archives and URIs, in several formats."""
