"""The web pages as static files: a chat at `/`, the API's description with forms at `/docs`."""
