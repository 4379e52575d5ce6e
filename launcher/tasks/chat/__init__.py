"""Chats: their rows, the template that writes them out, and which tokens of that are learned."""
