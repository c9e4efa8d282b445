"""The HTTP API: routes, schemas, middleware, authentication and the page."""
