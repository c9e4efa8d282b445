"""Reading text: files, archives and URIs in several formats."""
