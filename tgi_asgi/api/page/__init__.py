"""The pages for people: a chat at `/`, the API's description with forms at `/docs`, as static files."""
