"""Our own way of running the app: hypercorn on our own socket, signals, the terminal, TGI's launcher."""
