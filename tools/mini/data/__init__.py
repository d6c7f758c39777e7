"""Makes the data of `mini`: images, videos, sounds, conversations and texts, in this order."""
