"""Chats: their rows, the template that renders them, and which of its tokens are supervised."""
