"""Our own way of running the app: the socket, hypercorn, signals, the terminal, TGI's launcher flags."""
