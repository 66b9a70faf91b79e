"""The gateway: HTTP for clients that people already have, over the queue. It keeps no state of its own."""
