"""The native way to run the app: the socket, hypercorn, signals, the terminal, TGI's launcher flags."""
